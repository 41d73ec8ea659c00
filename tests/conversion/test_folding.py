"""Folding changes no logit: both families, every form, and the ways in which GPT-2 without LayerNorm is published."""

import accelerate
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from hf_lnfree.conversion import Checkpoint, convert, fold, load, to_stock
from hf_lnfree.conversion.stock_to_ours import ours
from hf_lnfree.errors import ModelError
from hf_lnfree.models.removal import RemovalNorm

from .conftest import logits, trained

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_folding_keeps_the_logits(family, form, dtype, input_ids):
    model = trained(family.model(norm="layernorm", **form)).to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded, report = fold(model)
    assert folded.dtype == dtype
    assert (logits(folded, input_ids) - logits(model, input_ids)).abs().max() <= TOLERANCE[dtype]
    assert not [m for m in folded.modules() if isinstance(m, nn.LayerNorm)]
    assert not [name for name, _ in folded.named_parameters() if "ln_" in name or "norm" in name]
    assert (folded.config.norm, folded.config.final_norm) == ("rmspre", "rmspre")
    assert set(report.norms.values()) == {("layernorm", "rmspre")}
    assert report.untied == model.config.tie_word_embeddings
    assert [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])] == []


@pytest.mark.parametrize(
    "fields",
    [
        {"norm": "none"},
        {"layer_norms": ["layernorm", "none", "layernorm"]},
        {"final_norm": "none"},
        {"linear_bias": "query_key"},
        {"layer_activations": ["learnable_leaky_relu", "relu", "gelu"], "slope_scope": "global"},
    ],
)
def test_mixed_models_fold_as_far_as_is_exact(family, fields, input_ids, tmp_path):
    """Where something reads the stream as it is, its mean has to stay, and so does the centring of the other norms."""
    model = trained(family.model(**{"norm": "layernorm", **fields})).double()
    folded, report = fold(model)
    torch.testing.assert_close(logits(folded, input_ids), logits(model, input_ids), rtol=0, atol=1e-12)
    for module in folded.modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    mixed = len({*model.config.block_norms, model.config.final_norm}) > 1
    assert any("still centre" in note for note in report.notes) == mixed
    folded.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(reloaded, input_ids), logits(folded, input_ids))


def test_biases_are_made_where_there_are_none(input_ids):
    from ..conftest import GPT_NEOX

    model = trained(GPT_NEOX.model(norm="layernorm", attention_bias=False)).double()
    folded, _ = fold(model)
    assert folded.config.attention_bias
    torch.testing.assert_close(logits(folded, input_ids), logits(model, input_ids), rtol=0, atol=1e-12)


def test_cross_attention_and_token_types(input_ids):
    from ..conftest import GPT2

    model = trained(GPT2.model(norm="layernorm", add_cross_attention=True)).double()
    folded, _ = fold(model)
    encoded = torch.randn(2, 5, 32, dtype=torch.float64)
    inputs = {"encoder_hidden_states": encoded, "token_type_ids": input_ids % 7}
    with torch.no_grad():
        expected, found = (m(input_ids, **inputs).logits for m in (model, folded))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("head", ["TokenClassification", "SequenceClassification"])
def test_a_head_that_takes_no_bias_leaves_the_final_norm_its_own(family, head, input_ids):
    model = trained(family.model(head=head, norm="layernorm")).double()
    folded, report = fold(model)
    keeps = head == "SequenceClassification"
    assert folded.config.final_norm == ("layernorm" if keeps else "rmspre")
    assert any("keeps its gain and bias" in note for note in report.notes) == keeps
    torch.testing.assert_close(logits(folded, input_ids), logits(model, input_ids), rtol=0, atol=1e-12)


def test_a_backbone_folds_without_a_head(family, input_ids):
    model = trained(family.model(norm="layernorm")).double().base_model
    folded, _ = fold(model)
    with torch.no_grad():
        expected, found = (m(input_ids).last_hidden_state for m in (model, folded))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def removed(model, finished=True):
    for module in model.modules():
        if isinstance(module, RemovalNorm):
            module.gate.fill_(1.0)
            module.first_gate.fill_(1.0 if finished else 0.0)
            module.sigma.copy_(torch.tensor([5.0, 0.7]))
    return model


def test_a_finished_removal_folds_to_nothing(family, form, input_ids):
    model = removed(trained(family.model(norm="removal", final_norm="removal", **form))).double()
    folded, report = fold(model)
    torch.testing.assert_close(
        logits(folded, input_ids), logits(model, input_ids), rtol=1e-13, atol=1e-12
    )  # logits up to 160
    assert (folded.config.norm, folded.config.final_norm, report.divisions) == ("none", "none", 0)


def test_half_a_removal_is_refused(family):
    with pytest.raises(ValueError, match=r"half removed.*first position"):
        fold(removed(family.model(norm="removal"), finished=False))


def test_a_layer_with_one_norm_removed_is_refused(family):
    model = trained(family.model(norm="removal"))
    norm = next(m for m in model.modules() if isinstance(m, RemovalNorm))
    norm.gate.fill_(1.0)
    norm.first_gate.fill_(1.0)
    with pytest.raises(ValueError, match="Layer 0 has norms that are removed and others that are not"):
        fold(model)


def disabled(model):
    """The published encoding: LayerNorm stays, eps = 1e12, gains a million times what they should be."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e12
            with torch.no_grad():
                module.weight *= 1e6
    for name in ("layer_norm_epsilon", "layer_norm_eps"):
        if hasattr(model.config, name):
            setattr(model.config, name, 1e12)
    return model


def test_norms_disabled_by_epsilon_become_no_norms(family, form, input_ids, tmp_path):
    model = disabled(trained(family.stock_model(**form))).double()
    model.save_pretrained(tmp_path / "published")
    report = convert(str(tmp_path / "published"), tmp_path / "ours")
    assert set(report["norms"]) == {"disabled layernorm -> none"}
    assert any("1e+12 disables its LayerNorms" in note for note in report["notes"])
    assert any("weights of its own" in note for note in report["notes"]) == report["untied"]
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert not [m for m in converted.modules() if isinstance(m, nn.LayerNorm)]
    assert 1e-5 in (getattr(converted.config, name, None) for name in ("layer_norm_epsilon", "layer_norm_eps"))
    torch.testing.assert_close(
        logits(converted, input_ids), logits(model, input_ids), rtol=1e-7, atol=1e-8
    )  # var / 2 eps


@pytest.mark.parametrize("final", ["layernorm", "disabled"])
def test_identities_in_the_blocks_and_a_final_norm(family, final, input_ids, tmp_path):
    """The other published form, and its independent truth: the stock model with its block norms taken out by hand."""
    model = trained(family.stock_model()).double()
    if final == "disabled":
        disabled(model)
    block_norms = [n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm) and n.count(".") > 1]
    for name in block_norms:
        model.set_submodule(name, nn.Identity())
    model.save_pretrained(tmp_path / "published")
    convert(str(tmp_path / "published"), tmp_path / "ours")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert converted.config.norm == "none"
    assert converted.config.final_norm == ("none" if final == "disabled" else "layernorm")
    torch.testing.assert_close(logits(converted, input_ids), logits(model, input_ids), rtol=1e-9, atol=1e-9)


def test_an_epsilon_without_scaled_gains_is_refused(family, tmp_path):
    model = trained(family.stock_model())
    for name in ("layer_norm_epsilon", "layer_norm_eps"):
        if hasattr(model.config, name):
            setattr(model.config, name, 1e12)
    model.save_pretrained(tmp_path / "half")
    with pytest.raises(ValueError, match="half converted"):
        convert(str(tmp_path / "half"), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_folded_half_precision_is_rounded_once(family, input_ids):
    model = trained(family.model(norm="layernorm")).bfloat16()
    exact = fold(model.double())[0]
    rounded = fold(model.bfloat16())[0]
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded.get_output_embeddings().weight, exact.get_output_embeddings().weight.bfloat16())


def test_a_published_encoding_in_float16_is_refused(family, tmp_path):
    model = disabled(trained(family.stock_model()))
    model.save_pretrained(tmp_path / "published")
    path = tmp_path / "published" / "model.safetensors"
    save_file({k: v.half() for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="65504"):
        load(Checkpoint(tmp_path / "published"))


@pytest.mark.parametrize("where", ["meta", "cpu_offload", "disk_offload"])
@pytest.mark.parametrize("verb", [fold, to_stock, ours])
def test_an_offloaded_model_is_refused_by_name(family, verb, where, tmp_path):
    model = family.stock_model() if verb is ours else family.model(norm="layernorm", final_norm="layernorm")
    if where == "meta":
        model = model.to("meta")
    else:
        offload = {"offload_dir": str(tmp_path)} if where == "disk_offload" else {}
        getattr(accelerate, where)(model, execution_device=torch.device("cpu"), **offload)
    with pytest.raises(ModelError, match="it is offloaded, or on the meta device"):
        verb(model)
