"""What convert promises of its output: readable by the recipes that people copy, checked, and whole or not there."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hf_lnfree.cli.main import main
from hf_lnfree.conversion import convert, run, to_stock
from hf_lnfree.errors import ModelError, RunError

from .conftest import logits, trained

NORM_FREE = {"norm": "none", "final_norm": "none", "activation": "relu"}


@pytest.fixture
def norm_free(family, tmp_path):
    model = trained(family.model(**NORM_FREE))
    model.save_pretrained(tmp_path / "ours")
    return model


def layer_norms(model):
    return [module for module in model.modules() if isinstance(module, nn.LayerNorm)]


def with_eps(model):
    for norm in layer_norms(model):
        norm.eps = 1e12
    return model


def with_identities(model):
    """Gains divided by 1e6, then each norm a map that only centres and scales by its gain."""

    class Linear(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.weight, self.bias = norm.weight / 1e6, norm.bias

        def forward(self, x):
            return (x - x.mean(-1, keepdim=True)) * self.weight + self.bias

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.LayerNorm):
            model.set_submodule(name, Linear(module))
    return model


@pytest.mark.parametrize("reader", [lambda model: model, with_eps, with_identities], ids=["plain", "eps", "identities"])
def test_a_stock_export_is_read_by_published_recipes(norm_free, tmp_path, input_ids, reader):
    report = convert(str(tmp_path / "ours"), tmp_path / "stock", "stock")
    assert any("set ln.eps = 1e12" in note for note in report["notes"])
    stock = reader(AutoModelForCausalLM.from_pretrained(tmp_path / "stock"))
    torch.testing.assert_close(logits(stock, input_ids), logits(norm_free, input_ids), rtol=1e-4, atol=1e-3)


def test_the_other_encoding_says_that_these_recipes_fail(norm_free, tmp_path, input_ids):
    report = convert(str(tmp_path / "ours"), tmp_path / "stock", "stock", encoding="power_of_two")
    assert any("read it wrongly" in note for note in report["notes"])
    wrong = with_eps(AutoModelForCausalLM.from_pretrained(tmp_path / "stock"))
    assert (logits(wrong, input_ids) - logits(norm_free, input_ids)).abs().max() > 1
    with pytest.raises(ModelError, match="bfloat16 cannot hold"):
        to_stock(norm_free, torch.bfloat16, "published")


def test_a_stock_export_has_the_keys_and_widths_that_others_read(norm_free, family, tmp_path):
    convert(str(tmp_path / "ours"), tmp_path / "stock", "stock")
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    if family.name == "gpt2":
        assert config["n_ctx"] == config["n_positions"] == 64
        assert config["n_inner"] is None
        assert config["n_embd"] == 36  # one dimension more for each of four heads
        assert stock.transformer.h[0].mlp.c_fc.weight.shape == (36, 4 * 36)
    else:
        assert (config["rotary_pct"], config["rotary_emb_base"]) == (
            config["rope_parameters"]["partial_rotary_factor"],
            10000.0,
        )


def test_a_fused_mlp_is_refused_with_its_reason(family):
    model = family.model(**NORM_FREE | {"activation": "identity_fused"})
    with pytest.raises(ModelError, match="an MLP of it is one matrix"):
        to_stock(model)


def spoilt(spoil):
    def wrong(*args, **kwargs):
        stock = to_stock(*args, **kwargs)
        spoil(stock.get_input_embeddings().weight.data)
        return stock

    return wrong


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(lambda w: w[5].mul_(2.0), "logits differ by up to"), (lambda w: w[5].fill_(torch.nan), "not finite")],
    ids=["wrong", "nan"],
)
def test_a_conversion_that_fails_its_check_is_set_aside(norm_free, tmp_path, monkeypatch, capsys, spoil, message):
    monkeypatch.setattr("hf_lnfree.conversion.checking.random_tokens", lambda config: torch.tensor([[5, 6, 7]]))
    monkeypatch.setattr(run, "to_stock", spoilt(spoil))
    source, out = tmp_path / "ours", tmp_path / "stock"
    assert main(["convert", str(source), str(out), "--to", "stock"]) == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert not out.exists()
    assert (tmp_path / "stock.unchecked" / "conversion.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "stock.unchecked"]


def test_a_checkpoint_copied_by_shards_appears_after_its_check(family, tmp_path, monkeypatch):
    stock, out = family.stock_model(), tmp_path / "ours"
    stock.save_pretrained(tmp_path / "stock")
    seen = []
    real = run.difference
    monkeypatch.setattr(run, "difference", lambda *args: seen.append(out.exists()) or real(*args))
    convert(str(tmp_path / "stock"), out)
    assert (seen, out.is_dir()) == ([False], True)


def test_of_two_conversions_into_one_folder_one_is_refused(norm_free, tmp_path, monkeypatch):
    source, out = str(tmp_path / "ours"), tmp_path / "stock"
    real, others = run.write_report, []

    def meanwhile(folder, report):
        real(folder, report)
        if not others:
            others.append(True)
            convert(source, out, "folded")

    monkeypatch.setattr(run, "write_report", meanwhile)
    with pytest.raises(RunError, match="written by another process meanwhile"):
        convert(source, out, "stock")
    assert json.loads((out / "conversion.json").read_text())["to"] == "folded"


@pytest.mark.parametrize("with_cache", [False, True])
def test_onnx_in_float64_is_checked_in_float64(norm_free, tmp_path, with_cache):
    pytest.importorskip("onnxruntime")
    report = convert(str(tmp_path / "ours"), tmp_path / "onnx", "onnx", torch.float64, with_cache)
    assert report["largest_difference"] < 1e-6


def test_an_onnx_graph_is_kept_when_onnxruntime_cannot_run_it(norm_free, tmp_path, monkeypatch):
    def fails(*args):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(run, "onnx_difference", fails)
    report = convert(str(tmp_path / "ours"), tmp_path / "onnx", "onnx")
    assert any("no such operator" in note for note in report["notes"])
    assert (tmp_path / "onnx" / "model.onnx").is_file()


def test_the_model_that_is_converted_stays_as_it_is(norm_free, input_ids):
    before = copy.deepcopy(norm_free.state_dict())
    to_stock(norm_free)
    assert all(torch.equal(before[name], value) for name, value in norm_free.state_dict().items())


@pytest.mark.parametrize("name", ["../elsewhere/model.safetensors", "/elsewhere/model.safetensors", "a/b.safetensors"])
def test_an_index_that_names_files_elsewhere_is_refused(family, tmp_path, name):
    """A stock checkpoint is read by this package itself, file by file, and not by transformers."""
    stock, other = tmp_path / "stock", tmp_path / "elsewhere"
    model = family.stock_model()
    model.save_pretrained(stock)
    model.save_pretrained(other)
    (stock / "a").mkdir()
    (stock / "model.safetensors").rename(stock / "a" / "b.safetensors")
    name = name.replace("/elsewhere", str(other), 1) if name.startswith("/") else name
    index = {"metadata": {}, "weight_map": dict.fromkeys(model.state_dict(), name)}
    (stock / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="which is no file of its folder"):
        convert(str(stock), tmp_path / "ours")
