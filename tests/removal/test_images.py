"""Norms removed from a ViT: exact in float64 against the stock class, and from the command line on digits."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_lnfree.cli.main import main
from hf_lnfree.conversion import fold, to_stock
from hf_lnfree.errors import ModelError
from hf_lnfree.models.removal import FirstPosition, RemovalNorm
from hf_lnfree.removal.procedure import removable

from ..conftest import BERT, VIT
from ..conversion.conftest import trained


def images(dtype=torch.float64):
    return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)


def scores(model, x):
    with torch.no_grad():
        return model.eval()(x).logits


def stock_vit(**fields):
    torch.manual_seed(0)
    return trained(VIT.stock_class("ForImageClassification")(VIT.stock_config(initializer_range=0.2, **fields)))


def norms(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, RemovalNorm)}


def test_it_begins_as_layernorm_and_sees_the_class_token_apart():
    stock = stock_vit().double()
    model = removable(stock)
    assert len(norms(model)) == 7
    torch.testing.assert_close(scores(model, images()), scores(stock, images()), rtol=0, atol=1e-12)
    seen = {}
    for name, norm in norms(model).items():
        norm.observing = True
        norm.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[0]}))
    scores(model, images())
    for name, norm in norms(model).items():
        sigma = (seen[name].var(-1, correction=0) + norm.eps).sqrt()  # 3 images, a class token and 16 patches
        expected = torch.stack([sigma[:, 0].mean(), sigma[:, 1:].mean()])
        torch.testing.assert_close(norm.sigma, expected, rtol=1e-6, atol=1e-7)


def test_as_many_channels_as_tokens_are_no_tokens():
    """The first position is found among tokens, not in the shape [B, C, H, W] of images."""
    first = FirstPosition()
    first.locate(nn.Module(), (), {"pixel_values": torch.zeros(2, 17, 8, 8)})
    assert first.mask is None
    first.locate(nn.Module(), (torch.zeros(2, 17, 8, 8),), {})
    assert first.mask is None


def test_a_finished_removal_is_the_stock_graph_with_fixed_scales():
    """Independent of RemovalNorm and of folding: the stock class, each LayerNorm (x - mean) * g / sigma + b."""
    stock = stock_vit().double()
    model = removable(stock)
    for index, norm in enumerate(norms(model).values()):
        norm.gate.fill_(1.0)
        norm.first_gate.fill_(1.0)
        norm.sigma.fill_(0.6 + 0.1 * index)
    sigmas = {name: norm.sigma[1].item() for name, norm in norms(model).items()}

    class Fixed(nn.Module):
        def __init__(self, norm, sigma):
            super().__init__()
            self.weight, self.bias, self.sigma = norm.weight, norm.bias, sigma

        def forward(self, x):
            return (x - x.mean(-1, keepdim=True)) / self.sigma * self.weight + self.bias

    for name, sigma in sigmas.items():
        stock.set_submodule(name, Fixed(stock.get_submodule(name), sigma))
    expected = scores(stock, images())
    torch.testing.assert_close(scores(model, images()), expected, rtol=0, atol=1e-11)
    folded, told = fold(model)
    assert (folded.config.norm, folded.config.final_norm, told.divisions) == ("none", "none", 0)
    torch.testing.assert_close(scores(folded, images()), expected, rtol=0, atol=1e-11)
    back = to_stock(folded)
    assert type(back) is type(stock)
    torch.testing.assert_close(scores(back, images()), expected, rtol=0, atol=1e-8)


ALONE = """
import sys
sys.modules["hf_lnfree"] = None
import torch
from transformers import AutoModelForImageClassification
images, folder = torch.load(sys.argv[1])
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
torch.save(model(images).logits.detach(), sys.argv[2])
"""


@pytest.mark.parametrize("extra", [[], ["--lora_rank", "2", "--baseline", "false"]], ids=["weights", "lora"])
def test_from_the_command_line_on_digits(extra, cache_dir, tmp_path, capsys):
    labels = {number: str(number) for number in range(10)}
    stock_vit(num_labels=10, id2label=labels, label2id={v: k for k, v in labels.items()}).save_pretrained(
        tmp_path / "vit"
    )
    shared = ["remove-norms", str(tmp_path / "vit"), "--data", "digits", "--cache_dir", cache_dir, "--max_steps", "20"]
    shared += ["--per_device_train_batch_size", "16", "--learning_rate", "1e-3", "--removal_windows", "16"]
    shared += ["--use_cpu", "--disable_tqdm", "true", "--probe_steps", "0", "--output_dir", str(tmp_path / "run")]
    assert main([*shared, *extra]) == 0
    summary = json.loads((tmp_path / "run" / "removal.json").read_text())
    assert (summary["norms_left"], summary["objective"]) == ("none", "image")
    parts = [*["all"] * 3, *["query_key"] * 3, *["value"] * 3, "all", "first"]
    assert [event["part"] for event in summary["events"]] == parts
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert summary["accuracy"]["after"] == results["eval_accuracy"]
    assert set(summary["accuracy"]) == {"before", "after"} | (set() if extra else {"plain"})
    assert "accuracy" in capsys.readouterr().out
    page = (tmp_path / "run" / "report.html").read_text()
    assert "held-out loss (nats an image)" in page
    assert "nats a token" not in page
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    assert not [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert AutoImageProcessor.from_pretrained(tmp_path / "run", backend="pil").size["height"] == 8
    torch.save((images(torch.float32), str(tmp_path / "run")), tmp_path / "in.pt")
    command = [sys.executable, "-W", "ignore", "-c", ALONE, str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.equal(torch.load(tmp_path / "out.pt"), scores(model, images(torch.float32)))


def test_norms_behind_branches_are_refused_by_name():
    model = BERT.stock_class("ForMaskedLM")(BERT.stock_config())
    with pytest.raises(
        ModelError, match=r"bert\.encoder\.layer\.0\.attention\.output\.LayerNorm stands behind the sum"
    ):
        removable(model)
