"""Models of ours as stock ones, for people without the package; and what stock cannot hold, reason by reason."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_lnfree.conversion import convert, fold, to_stock

from .conftest import logits, trained
from .test_folding import removed

WITHOUT_US = """
import sys
sys.modules["hf_lnfree"] = None
import torch
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder).eval()
assert type(model).__module__.startswith("transformers.models."), type(model)
ids = torch.load(folder + "/ids.pt")
torch.save(model(ids).logits.detach(), folder + "/logits.pt")
"""


def layernorm(family, dtype=torch.float32, **form):
    return trained(family.model(norm="layernorm", **form)).to(dtype)


def folded(family, dtype=torch.float32, **form):
    return fold(layernorm(family, dtype, **form))[0]


def removal(family, dtype=torch.float32, **form):
    return removed(trained(family.model(norm="removal", final_norm="removal", **form))).to(dtype)


def norm_free(family, dtype=torch.float32, **form):
    return fold(removal(family, dtype, **form))[0]


def from_scratch(family, dtype=torch.float32, **form):
    return trained(family.model(norm="none", final_norm="none", lm_head_bias=True, **form)).to(dtype)


@pytest.mark.parametrize("make", [layernorm, folded, removal, norm_free, from_scratch])
def test_stock_models_have_the_logits_of_ours(family, form, make, input_ids):
    model = make(family, torch.float64, **form)
    stock = to_stock(model)
    assert type(stock) is family.stock_head("CausalLM")
    truth = logits(model, input_ids)
    torch.testing.assert_close(logits(stock, input_ids), truth, rtol=1e-9, atol=1e-9)  # var / 2 eps
    single = make(family, **form)
    found, own = logits(to_stock(single), input_ids), logits(single, input_ids)
    assert (found - truth).abs().max() <= 4 * (own - truth).abs().max()  # no worse than ours in float32
    if make is layernorm:
        assert torch.equal(found, own)


def test_disabled_norms_are_exact_in_bfloat16(family, input_ids):
    """Gains are powers of two, so bfloat16 weights make the same linear maps as without norms."""
    model = norm_free(family).bfloat16()
    stock = to_stock(model)
    for name, parameter in stock.named_parameters():
        if name.endswith("weight") and ("ln_" in name or "norm" in name):
            assert (parameter.double() == 2.0**30).all()
        elif name in dict(model.named_parameters()) and name != "lm_head.weight":
            assert torch.equal(parameter, dict(model.named_parameters())[name])
    truth, found = logits(model.double(), input_ids), logits(stock.double(), input_ids)
    assert (found - truth).norm() < 0.02 * truth.norm()  # the centring and bias of rounded weights


def test_round_trip_from_stock_to_folded_to_stock(family, form, input_ids, tmp_path):
    original = trained(family.stock_model(**form))
    original.save_pretrained(tmp_path / "stock")
    convert(str(tmp_path / "stock"), tmp_path / "ours")
    convert(str(tmp_path / "ours"), tmp_path / "folded", to="folded")
    report = convert(str(tmp_path / "folded"), tmp_path / "again", to="stock")
    assert report["largest_difference"] < 1e-5
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    torch.testing.assert_close(logits(again, input_ids), logits(original, input_ids), rtol=0, atol=1e-5)
    # and back: what was written by the epsilon trick or folding is read as what it is
    convert(str(tmp_path / "again"), tmp_path / "third")
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "third").eval()
    assert torch.equal(logits(third, input_ids), logits(again, input_ids))


def test_a_norm_free_model_loads_where_the_package_is_not(family, input_ids, tmp_path):
    model = norm_free(family)
    model.save_pretrained(tmp_path / "ours")
    convert(str(tmp_path / "ours"), tmp_path / "stock", to="stock")
    torch.save(input_ids, tmp_path / "stock" / "ids.pt")
    command = [sys.executable, "-c", WITHOUT_US, str(tmp_path / "stock")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    torch.testing.assert_close(
        torch.load(tmp_path / "stock" / "logits.pt"), logits(model, input_ids), rtol=1e-5, atol=1e-4
    )
    convert(str(tmp_path / "stock"), tmp_path / "back")  # the encoding is recognised
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert (back.config.norm, back.config.final_norm) == ("none", "none")
    torch.testing.assert_close(logits(back, input_ids), logits(model, input_ids), rtol=1e-5, atol=1e-4)


def test_a_model_trained_without_norms_becomes_wider(family, input_ids):
    """Its stream has a mean that is read, and stock always centres."""
    model = from_scratch(family, linear_bias="query_key")
    stock = to_stock(model)
    assert stock.config.hidden_size == model.config.hidden_size + model.config.num_attention_heads
    generated = [
        m.generate(input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=6, do_sample=False)
        for m in (model, stock)
    ]
    assert torch.equal(*generated)


@pytest.mark.parametrize(
    ("fields", "dtype", "reasons"),
    [
        ({"norm": "none"}, None, ["norms differ (layernorm, none)"]),
        (
            {"norm": "layernorm", "layer_activations": ["relu", "gelu", "relu"]},
            None,
            ["different activations (gelu, relu)"],
        ),
        ({"norm": "layernorm", "activation": "learnable_leaky_relu"}, None, ["learnable_leaky_relu is no activation"]),
        ({"norm": "layernorm", "activation": "leaky_relu", "negative_slope": 0.1}, None, ["slope 0.1 here and 0.01"]),
        ({"norm": "rmspre", "final_norm": "rmspre"}, None, ["'rmspre' divides by the root mean square"]),
        ({"norm": "removal", "final_norm": "removal"}, None, ["has begun and is not finished"]),
        (
            {"norm": "none", "final_norm": "none", "layer_activations": ["relu", "learnable_leaky_relu", "relu"]},
            torch.float16,
            ["different activations", "learnable_leaky_relu", "float16 ends at 65504"],
        ),
    ],
)
def test_what_stock_cannot_hold_is_refused_with_every_reason(family, fields, dtype, reasons):
    with pytest.raises(ValueError, match="cannot hold this model") as error:
        to_stock(trained(family.model(**fields)), dtype)
    assert [reason for reason in reasons if reason not in str(error.value)] == []
    assert str(error.value).count("\n- ") == len(reasons)


def test_leaky_relu_with_the_slope_of_transformers_is_stock(family, input_ids):
    model = trained(family.model(norm="layernorm", activation="leaky_relu"))
    assert torch.equal(logits(to_stock(model), input_ids), logits(model, input_ids))
