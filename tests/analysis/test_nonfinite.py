"""Finding the tensor that went first, and telling what led there."""

import math

import pytest
import torch

from hf_lnfree.analysis.nonfinite import first_nonfinite, judge


def loss_of(model, input_ids):
    return lambda: model(input_ids, labels=input_ids).loss


def test_nothing_is_found_in_a_healthy_model(family, input_ids):
    model = family.model().train()
    grads = [torch.ones_like(p) for p in model.parameters()]
    for p, g in zip(model.parameters(), grads, strict=True):
        p.grad = g
    assert first_nonfinite(model, loss_of(model, input_ids)) is None
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_parameter_is_named_with_its_layer(family, input_ids, layer, value):
    model = family.model()
    name = "mlp.c_proj" if family.name == "gpt2" else "mlp.dense_4h_to_h"
    with torch.no_grad():
        family.block_list(model)[layer].get_submodule(name).weight[0, :3] = value
    found = first_nonfinite(model, loss_of(model, input_ids))
    assert (found.kind, found.layer, found.tensor, found.count) == ("parameter", layer, "weight", 3)
    assert found.module.endswith(f"{layer}.{name}")
    assert str(found).startswith(f"layer {layer}, weight of ")


@pytest.mark.parametrize("layer", [0, 1])
def test_an_output_is_named_before_everything_that_follows(family, input_ids, layer):
    model = family.model()

    def inject(module, inputs, output):
        return output.index_fill(-1, torch.tensor([0]), math.inf)

    family.block_list(model)[layer].mlp.act.register_forward_hook(inject)
    found = first_nonfinite(model, loss_of(model, input_ids))
    assert (found.kind, found.layer) == ("output", layer)
    assert found.module.endswith(f"{layer}.mlp.act")


def test_what_no_module_made_is_named_as_the_input_of_the_next(family, input_ids):
    """An attention function is no module: its output is the input of the projection that follows."""
    model = family.model()
    with torch.no_grad():
        attention = family.block_list(model)[1].get_submodule(family.projections[0].split(".")[0])
        (attention.c_attn if family.name == "gpt2" else attention.query_key_value).weight.mul_(1e20)
    found = first_nonfinite(model, loss_of(model, input_ids))
    assert (found.kind, found.layer) == ("input", 1)
    assert found.module.endswith(f"1.{family.projections[0]}")


def test_a_gradient_is_found_in_the_order_of_the_backward_pass(family, input_ids):
    model = family.model()

    def spoil(module, inputs, output):
        output.register_hook(lambda grad: grad * math.inf)

    family.block_list(model)[1].mlp.act.register_forward_hook(spoil)
    found = first_nonfinite(model, loss_of(model, input_ids))
    assert (found.kind, found.layer) == ("gradient", 1)
    assert "mlp" in found.module


FIRST = {
    "entropy/collapsed": 0.0,
    "entropy/overloaded": 0.5,
    "residual_rms/layer_00": 1.0,
    "attention_logit/layer_00": 1.0,
}


@pytest.mark.parametrize(
    ("last", "verdict"),
    [
        ({"entropy/collapsed": 0.6, "entropy/overloaded": 0.1, "attention_logit/layer_00": 900.0}, "entropy collapse"),
        ({"entropy/collapsed": 0.6, "residual_rms/layer_00": 1e5}, "entropy collapse"),
        ({"entropy/overloaded": 0.9, "residual_rms/layer_00": 1e5}, "overflow"),
        ({"entropy/overloaded": 0.9, "residual_rms/layer_00": 2.0}, "entropic overload"),
        ({"entropy/overloaded": 0.2, "residual_rms/layer_00": 2.0}, "sudden"),
        ({"entropy/overloaded": 0.2, "residual_rms/layer_00": 2.0, "residual_rms/layer_01": math.nan}, "sudden"),
    ],
)
def test_verdicts(last, verdict):
    found, figures = judge(FIRST, {**FIRST, **last})
    assert found == verdict
    assert f"overloaded {last.get('entropy/overloaded', 0.5):.0%}" in figures


def test_heads_that_were_near_the_maximum_from_the_start_are_no_cause():
    untrained = {**FIRST, "entropy/overloaded": 1.0}
    assert judge(untrained, untrained)[0] == "sudden"


@pytest.mark.parametrize(("last", "verdict"), [(0.0, "sudden"), (1e-3, "overflow"), (math.nan, "sudden")])
def test_a_residual_stream_that_began_at_zero(last, verdict):
    assert judge({**FIRST, "residual_rms/layer_00": 0.0}, {**FIRST, "residual_rms/layer_00": last})[0] == verdict
