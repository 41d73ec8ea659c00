"""What each layer does, against the same figures computed by hand from hidden states and eager maps."""

import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lnfree.analysis.layers import decoder_blocks, record_layers
from hf_lnfree.attention.fused import largest_logit
from tests.attention import models
from tests.attention.softmaxes import Softmaxes
from tests.conftest import SIZES


def test_statistics_equal_those_by_hand(family, input_ids):
    model = family.model(activation="relu", norm="none")
    batches = [input_ids, input_ids[:, :7]]
    with record_layers(model) as layers, torch.no_grad():
        for batch in batches:
            model(batch)
    outputs = {i: [] for i in range(3)}
    activations = {i: [] for i in range(3)}
    for i, block in enumerate(family.block_list(model)):
        block.register_forward_hook(lambda m, x, y, i=i: outputs[i].append(y[0] if isinstance(y, tuple) else y))
        block.mlp.act.register_forward_hook(lambda m, x, y, i=i: activations[i].append(y.flatten(0, 1)))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for i in range(3):
        x = torch.cat([y.flatten() for y in outputs[i]]).double()
        a = torch.cat(activations[i])
        assert layers.residual_rms[i] == pytest.approx(x.square().mean().sqrt().item(), rel=1e-6)
        assert layers.sparsity[i] == pytest.approx((a == 0).double().mean().item(), rel=1e-12)
        assert layers.dead_units[i] == pytest.approx((a == 0).all(0).double().mean().item(), rel=1e-6)
        assert layers.nonfinite[i] == 0
        assert 0 < layers.sparsity[i] < 1


def test_the_largest_logit_is_that_of_all_batches(family, input_ids):
    model = family.model(norm="none")
    batches = [input_ids, input_ids[:1, :3], input_ids.flip(1)]

    def recorded(*batches):
        with record_layers(model) as layers, torch.no_grad():
            for batch in batches:
                model(batch)
        return layers.largest_logit

    alone = list(map(recorded, batches))
    assert len({tuple(found) for found in alone}) == 3
    assert recorded(*batches) == recorded(*batches[::-1]) == [max(found) for found in zip(*alone, strict=True)]


def test_largest_logit_leaves_out_hidden_keys_and_keeps_nan():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 9, 8, generator=g), torch.randn(2, 2, 9, 8, generator=g)
    logits = 0.5 * q @ k.repeat_interleave(2, 1).mT
    visible = torch.ones(9, 9, dtype=torch.bool).tril()
    expected = logits.masked_fill(~visible, -math.inf).amax((-2, -1))
    torch.testing.assert_close(largest_logit(q, k, is_causal=True, scale=0.5), expected)
    torch.testing.assert_close(largest_logit(q, k, attention_mask=visible, scale=0.5), expected)
    q[0, 1, 3, 0] = math.nan
    found = largest_logit(q, k, is_causal=True)
    assert found.isnan().nonzero().tolist() == [[0, 1]]


def test_gelu_is_never_exactly_zero_and_dead_units_are_seen(family, input_ids):
    gelu = family.model(activation="gelu")
    with record_layers(gelu) as layers:
        gelu(input_ids)
    assert layers.sparsity == layers.dead_units == [0.0, 0.0, 0.0]
    relu = family.model(activation="relu")
    up = "mlp.c_fc" if family.name == "gpt2" else "mlp.dense_h_to_4h"
    with torch.no_grad():
        family.block_list(relu)[1].get_submodule(up).bias[:32] = -1e9
    with record_layers(relu) as layers:
        relu(input_ids)
    assert layers.dead_units[1] >= 0.25
    assert layers.dead_units[0] < 0.25


def test_other_families_and_what_has_no_blocks(input_ids):
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=64, num_key_value_heads=2)).eval()
    with record_layers(llama) as layers:
        llama(input_ids)
    assert len(layers.residual_rms) == 3
    assert all(map(math.isfinite, layers.residual_rms + layers.largest_logit))
    assert list(decoder_blocks(llama)) == ["model.layers.0", "model.layers.1", "model.layers.2"]
    with pytest.raises(ValueError, match="Linear has no ModuleList of None blocks"):
        decoder_blocks(nn.Linear(1, 1))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("build", [models.afmoe, models.doge, models.blip_2_vision])
def test_largest_logits_of_masks_handed_over_by_name(build, implementation):
    model, inputs = models.build(build, implementation)
    with torch.no_grad(), record_layers(model) as layers:
        model(**inputs)
    model, inputs = models.doubled(*models.build(build, "eager"))
    with torch.no_grad(), Softmaxes() as eager:
        model(**inputs)
    assert layers.largest_logit == pytest.approx([logits.max().item() for logits in eager.logits], rel=1e-5)
