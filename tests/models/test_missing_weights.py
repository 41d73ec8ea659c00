"""A checkpoint that lacks tensors: transformers names them, and what stands in their place is a fresh model's."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_lnfree
from hf_lnfree.models import FAMILIES

from ..conftest import BERT, EVERY, GATED_T5, GPT2, T5, VIT, WHISPER

MATRIX = "transformer.h.1.mlp.c_fc.weight"


@pytest.mark.parametrize("also", [False, True], ids=["matrix alone", "matrix and norm"])
@pytest.mark.parametrize(("kind", "beside"), [("weight", "_scale"), ("spectral", "_u")])
def test_matrix_with_a_normed_weight_may_be_missing(kind, beside, also, tmp_path):
    GPT2.model(seed=1, weight_norm=kind).save_pretrained(tmp_path)
    stored, missing = load_file(tmp_path / "model.safetensors"), {MATRIX} | ({MATRIX + beside} if also else set())
    save_file(
        {name: x for name, x in stored.items() if name not in missing}, tmp_path / "model.safetensors", {"format": "pt"}
    )

    torch.manual_seed(0)
    model, report = GPT2.head("CausalLM").from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == missing
    weight = model.get_parameter(MATRIX)
    assert weight is dict(model.named_parameters())[MATRIX]
    assert 0.15 < weight.std() < 0.25  # initializer_range is 0.2
    if also and kind == "weight":
        torch.testing.assert_close(model.transformer.h[1].mlp.c_fc.weight, weight.data)


NORMED = {"weight_norm": "spectral", "weight_norm_scope": "block"}
FUSED = {"activation": "identity_fused"}


@pytest.mark.parametrize("fields", [{}, NORMED, FUSED], ids=["plain", "normed weights", "fused"])
@pytest.mark.parametrize("family", [*EVERY, BERT, VIT, T5, GATED_T5, WHISPER], ids=lambda family: family.name)
def test_model_of_which_nothing_is_there_is_drawn_as_a_fresh_one(family, fields):
    if fields is FUSED and family.gated:
        pytest.skip("a gated MLP is never one matrix")
    backbone = getattr(hf_lnfree, f"{family.prefix}Model")
    for model_class in (backbone, *FAMILIES[backbone]):
        torch.manual_seed(0)
        fresh = model_class(family.config(initializer_range=0.3, **fields)).state_dict()
        loaded = model_class.from_pretrained(None, config=family.config(initializer_range=0.3, **fields), state_dict={})
        for name, tensor in loaded.state_dict().items():
            if tensor.numel() >= 200:
                torch.testing.assert_close(tensor.std(), fresh[name].std(), rtol=0.3, atol=0.0, msg=name)


@pytest.mark.parametrize("family", [GPT2, T5, WHISPER], ids=lambda family: family.name)
def test_trained_model_is_not_initialised_again(family):
    fields = {"norm": "dyt", "activation": "learnable_leaky_relu", "weight_norm": "weight", "residual_gain": "skipinit"}
    model = getattr(hf_lnfree, f"{family.prefix}Model")(family.config(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.post_init()
    torch.testing.assert_close(dict(model.state_dict()), trained, rtol=0.0, atol=0.0)
