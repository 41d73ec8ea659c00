"""RMSNorms removed from T5, encoder, decoder and cross-attention: exact in float64, and trained on spans."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from hf_lnfree.cli.main import main
from hf_lnfree.conversion import fold, to_stock
from hf_lnfree.errors import ModelError
from hf_lnfree.models.removal import RemovalNorm
from hf_lnfree.removal.procedure import removable
from hf_lnfree.removal.schedule import norm_groups

from ..conftest import GATED_T5, T5, WHISPER
from ..conversion.conftest import trained

t5 = pytest.mark.parametrize("family", [T5, GATED_T5], ids=lambda f: f.name)


class PlainRMSNorm(nn.Module):
    """T5's own works in float32; `sigma` takes the place of the root mean square."""

    def __init__(self, norm, sigma=None):
        super().__init__()
        self.weight, self.eps, self.sigma = norm.weight, norm.variance_epsilon, sigma

    def forward(self, x):
        wide = (x.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return x / (wide if self.sigma is None else self.sigma) * self.weight


def stock_t5(family):
    torch.manual_seed(0)
    return trained(T5ForConditionalGeneration(T5Config(**family.tiny, initializer_factor=0.5))).double()


def with_plain_norms(stock, sigmas):
    for name, sigma in sigmas.items():
        stock.set_submodule(name, PlainRMSNorm(stock.get_submodule(name), sigma))
    return stock


def batch():
    """The second text is shorter, padded on the right."""
    generator = torch.Generator().manual_seed(0)
    ids, decoded = (torch.randint(3, 99, (2, length), generator=generator) for length in (7, 5))
    there = torch.ones_like(ids)
    there[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": there, "decoder_input_ids": decoded}


@torch.no_grad()
def scores(model):
    return model.eval()(**batch()).logits


def norms(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, RemovalNorm)}


@t5
def test_it_begins_as_rmsnorm_and_sees_the_first_token_of_each_stack_apart(family):
    stock = stock_t5(family)
    model = removable(stock)
    found = norms(model)
    assert len(found) == 2 * 2 + 3 * 3 + 2
    wanted = scores(with_plain_norms(stock, dict.fromkeys(found)))
    torch.testing.assert_close(scores(model), wanted, rtol=0, atol=1e-12)
    seen = {}
    for name, norm in found.items():
        norm.observing = True
        norm.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[0]}))
    scores(model)
    for name, norm in found.items():
        sigma = (seen[name].square().mean(-1) + norm.eps).sqrt()
        there = batch()["attention_mask"].bool() if name.startswith("encoder") else torch.ones(2, 5, dtype=torch.bool)
        others = sigma[:, 1:][there[:, 1:]]
        torch.testing.assert_close(norm.sigma, torch.stack([sigma[:, 0].mean(), others.mean()]), rtol=1e-6, atol=1e-7)


@t5
def test_a_finished_removal_is_the_stock_graph_with_fixed_scales(family):
    """The gain of the encoder's final norm goes into keys and values of every cross-attention."""
    stock = stock_t5(family)
    model = removable(stock)
    for index, norm in enumerate(norms(model).values()):
        norm.gate.fill_(1.0)
        norm.first_gate.fill_(1.0)
        norm.sigma.fill_(0.6 + 0.1 * index)
    wanted = scores(with_plain_norms(stock, {name: norm.sigma[1].item() for name, norm in norms(model).items()}))
    torch.testing.assert_close(scores(model), wanted, rtol=0, atol=1e-10)
    folded, told = fold(model)
    assert (folded.config.norm, folded.config.final_norm, told.divisions) == ("none", "none", 0)
    assert not [name for name, module in folded.named_modules() if "Norm" in type(module).__name__]
    torch.testing.assert_close(scores(folded), wanted, rtol=0, atol=1e-10)
    back = to_stock(folded)
    assert type(back) is T5ForConditionalGeneration
    torch.testing.assert_close(scores(back), wanted, rtol=0, atol=1e-4)  # whose norms, which do nothing, are in float32


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_half_a_removal_keeps_its_own_input_for_values(stack):
    """Queries and keys from the fixed scale, values from the living norm."""
    model, seen = removable(stock_t5(T5)), {}
    branch = model.get_submodule(f"{stack}.block.1.layer.0")
    norm, projections = branch.layer_norm, {part: branch.get_submodule(f"SelfAttention.{part}") for part in "qkv"}
    norm.sigma.copy_(torch.tensor([2.0, 3.0]))
    norm.gate.copy_(torch.tensor([1.0, 0.0]))
    norm.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    for part, projection in projections.items():
        projection.register_forward_hook(lambda module, args, out, part=part: seen.update({part: out}))
    scores(model)
    x = seen["x"]
    fixed = torch.tensor([2.0] + [3.0] * (x.shape[1] - 1), dtype=torch.float64)[:, None]
    live = (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    for part, divisor in (("q", fixed), ("k", fixed), ("v", live)):
        wanted = (x / divisor * norm.weight) @ projections[part].weight.T
        torch.testing.assert_close(seen[part], wanted, rtol=0, atol=1e-10)


def test_the_groups_of_a_schedule_hold_every_norm_of_both_stacks():
    groups = norm_groups(removable(stock_t5(T5)))
    encoder, decoder = ([f"{stack}.block.{i}.layer" for i in range(n)] for stack, n in (("encoder", 2), ("decoder", 3)))
    attention = [f"{layer}.0.layer_norm" for layer in encoder + decoder]
    cross = [f"{layer}.1.layer_norm" for layer in decoder]
    assert groups["mlp"] == [
        (f"{layer}.{i}.layer_norm", "all") for part, i in ((encoder, 1), (decoder, 2)) for layer in part
    ]
    assert groups["attention"] == [(name, "all") for name in attention + cross]
    assert groups["query_key"] == [*((name, "query_key") for name in attention), *((name, "all") for name in cross)]
    assert groups["value"] == [(name, "value") for name in attention]
    assert groups["final"] == [(f"{stack}.final_layer_norm", "all") for stack in ("encoder", "decoder")]


def test_a_head_of_its_own_stays_one():
    """As T5 1.1 is published: not the embedding, and not scaled."""
    torch.manual_seed(0)
    stock = T5ForConditionalGeneration(T5Config(**GATED_T5.tiny, tie_word_embeddings=False))
    stock.lm_head.weight = nn.Parameter(torch.randn(99, 32))
    stock = trained(stock).double()
    model = removable(stock)
    assert torch.equal(model.lm_head.weight, stock.lm_head.weight)
    assert torch.equal(model.shared.weight, stock.shared.weight)
    wanted = scores(with_plain_norms(stock, dict.fromkeys(norms(model))))
    torch.testing.assert_close(scores(model), wanted, rtol=0, atol=1e-11)


def test_whisper_is_refused_with_the_reason():
    with pytest.raises(ModelError, match="does not declare what its residual stream begins with"):
        removable(WHISPER.model(head="ConditionalGeneration", norm="layernorm"))


ALONE = """
import sys
sys.modules["hf_lnfree"] = None
import torch
from transformers import AutoModelForSeq2SeqLM
batch, folder = torch.load(sys.argv[1])
model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True).eval()
torch.save(model(**batch).logits.detach(), sys.argv[2])
"""


def test_from_the_command_line_on_spans(corpus, cache_dir, tmp_path):
    """A model of `hf-lnfree train --family t5` goes on with what it was trained for."""
    shared = [
        "--data",
        str(corpus),
        "--cache_dir",
        cache_dir,
        "--context_length",
        "32",
        "--max_validation_windows",
        "8",
    ]
    shared += ["--per_device_train_batch_size", "4", "--use_cpu", "--disable_tqdm", "true", "--probe_steps", "0"]
    sizes = "{num_layers: 2, num_decoder_layers: 1, d_model: 32, d_kv: 16, num_heads: 2, d_ff: 64}"
    made = ["train", "--family", "t5", "--row", "SM+LN+G", "--config_overrides", sizes, "--vocab_size", "300"]
    assert main([*made, *shared, "--max_steps", "2", "--output_dir", str(tmp_path / "t5")]) == 0
    removal = ["remove-norms", str(tmp_path / "t5"), "--removal_windows", "4", "--max_steps", "12"]
    removal += ["--eval_strategy", "steps", "--eval_steps", "6"]
    assert main([*removal, *shared, "--output_dir", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "removal.json").read_text())
    assert (summary["norms_left"], summary["objective"]) == ("none", "span")
    assert {(e["norm"], e["part"]) for e in summary["events"]} >= {
        ("decoder.block.0.layer.1.layer_norm", "all"),
        ("encoder.block.1.layer.0.layer_norm", "value"),
        ("encoder.final_layer_norm", "all"),
        ("decoder.final_layer_norm", "all"),
    }
    before_folding, folded = [loss for step, loss in summary["curves"]["removal"] if step == 12]
    assert folded == pytest.approx(before_folding, abs=1e-5)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run")
    assert not [name for name, module in model.named_modules() if "Norm" in type(module).__name__]
    torch.save((batch(), str(tmp_path / "run")), tmp_path / "in.pt")
    command = [sys.executable, "-W", "ignore", "-c", ALONE, str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), scores(model), rtol=1e-5, atol=1e-5)
