"""Checkpoints: out into a process without the package, in from stock models, and broken ones."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, pipeline

from ..conftest import EVERY, HEADS

IDS = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))

DETACHED = """
import json, sys, warnings
warnings.simplefilter("ignore")
class Blocked:  # an import hook, so that an installed package is no help either
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_lnfree":
            raise ModuleNotFoundError("hf_lnfree is not here")
sys.meta_path.insert(0, Blocked())
import torch, transformers
for folder in sys.argv[1:]:
    ids = torch.load(folder + "/ids.pt")
    shapes = {}
    for head in ("CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"):
        if "AutoModelFor" + head not in json.load(open(folder + "/config.json"))["auto_map"]:
            continue
        auto = getattr(transformers, "AutoModelFor" + head)
        torch.manual_seed(0)
        model = auto.from_pretrained(folder, trust_remote_code=True).eval()
        assert type(model).__module__.startswith("transformers_modules"), type(model)
        if head == "CausalLM":
            torch.save(model(ids).logits, folder + "/detached.pt")
            generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
            torch.save(generated, folder + "/generated.pt")
            model.save_pretrained(folder + "/again")
            reloaded = transformers.AutoModelForCausalLM.from_pretrained(folder + "/again", trust_remote_code=True)
            assert torch.equal(reloaded.eval()(ids).logits, model(ids).logits)
        shapes[head] = [list(v.shape) for v in model(ids).values() if isinstance(v, torch.Tensor)]
    json.dump(shapes, open(folder + "/shapes.json", "w"))
"""


def mixed(family, scope):
    return family.model(
        layer_activations=["learnable_leaky_relu", "gelu", "learnable_leaky_relu"],
        layer_norms=["none", family.norm, "none"],
        slope_scope=scope,
        linear_bias="query_key",
    )


@pytest.fixture(scope="module")
def detached(tmp_path_factory):
    """Folders of saved models by family and scope of the slope, after another process has loaded each."""
    root = tmp_path_factory.mktemp("detached")
    folders = {(f.name, scope): root / f.name / scope for f in EVERY for scope in ("layer", "global")}
    for family in EVERY:
        for scope in ("layer", "global"):
            mixed(family, scope).save_pretrained(folders[family.name, scope])
            torch.save(IDS, folders[family.name, scope] / "ids.pt")
    result = subprocess.run(
        [sys.executable, "-c", DETACHED, *map(str, folders.values())],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "HF_HOME": str(root / "home"), "PYTHONPATH": ""},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return folders


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_checkpoint_works_where_the_package_cannot_be_imported(family, scope, detached):
    folder, model = detached[family.name, scope], mixed(family, scope)
    shapes = {
        "CausalLM": [[2, 12, 99]],
        "SequenceClassification": [[2, 2]],
        "TokenClassification": [[2, 12, 2]],
        "QuestionAnswering": [[2, 12], [2, 12]],
    }
    assert json.loads((folder / "shapes.json").read_text()) == {head: shapes[head] for head in family.heads}
    assert torch.equal(torch.load(folder / "detached.pt"), model(IDS).logits)
    generated = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False)
    assert torch.equal(torch.load(folder / "generated.pt"), generated)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder / "again")(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("head", HEADS)
def test_every_head_loads_through_its_auto_class(family, head, tmp_path):
    import transformers

    if head not in family.heads:
        pytest.skip("transformers has none")
    model = family.model(head=head)
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, f"AutoModelFor{head}").from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert type(transformers.AutoModel.from_pretrained(tmp_path)) is type(model.base_model)


def test_stock_weights_give_equal_logits(family, input_ids, tmp_path):
    stock = family.stock_model()
    with torch.no_grad():  # biases and gains away from their initial zeros and ones, and a head of its own
        for parameter in stock.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    stock.save_pretrained(tmp_path)
    ours, info = family.head("CausalLM").from_pretrained(tmp_path, norm=family.norm, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(ours(input_ids).logits, stock(input_ids).logits)


def test_loading_into_norm_free_names_what_was_dropped(family, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    family.stock_model().save_pretrained(tmp_path)
    _, info = family.head("CausalLM").from_pretrained(
        tmp_path, norm="none", final_norm="none", output_loading_info=True
    )
    norms = {
        "gpt2": ("ln_1", "ln_2", "ln_f"),
        "gpt_neox": ("input_layernorm", "post_attention_", "final_layer_norm"),
        "opt": ("self_attn_layer_norm", "final_layer_norm"),
    }.get(family.name, ("input_layernorm", "post_attention_layernorm", "model.norm"))
    assert len(info["unexpected_keys"]) == (1 if family.gated else 2) * (2 * 3 + 1)  # RMSNorms have no bias
    assert all(any(n in key for n in norms) for key in info["unexpected_keys"])
    assert not info["missing_keys"]
    assert "UNEXPECTED" in caplog.text
    assert norms[0] in caplog.text


def test_text_generation_pipeline(family, tmp_path):
    from transformers import AutoTokenizer

    from hf_lnfree.data.tokenization import train_bpe

    tokenizer = train_bpe(["def f(x):\n    return x\n"] * 5, 300)
    model = family.model(vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path), tokenizer=AutoTokenizer.from_pretrained(tmp_path))
    outputs = generator(["def f", "return x + x"], max_new_tokens=3, do_sample=False, batch_size=2)
    assert [o[0]["generated_text"].startswith(p) for o, p in zip(outputs, ["def f", "return x + x"], strict=True)]


@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_broken_checkpoint_is_an_error_and_left_alone(family, damage, tmp_path):
    family.model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    data = weights.read_bytes()
    broken = data[: len(data) // 2] if damage == "truncated" else b"\0" * 100 + data[100:]
    weights.write_bytes(broken)
    with pytest.raises((SafetensorError, OSError)):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert weights.read_bytes() == broken
