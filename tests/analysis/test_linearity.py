"""Direct logit attribution: components add up, and direct effects are what ablation by hand gives."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_lnfree.analysis.linearity import attribute

from ..conversion.conftest import logits, trained
from ..conversion.test_folding import removed

KINDS = [
    {"norm": "none", "final_norm": "none", "activation": "relu"},
    {"norm": "none", "final_norm": "none", "lm_head_bias": True},
    {"norm": "none"},
    {"norm": "layernorm"},
    {"norm": "rmspre", "final_norm": "rmspre"},
]


@pytest.mark.parametrize("fields", KINDS)
def test_components_add_up_to_the_logits(family, fields, input_ids):
    model = trained(family.model(**fields)).double()
    found = attribute(model, input_ids)
    assert found.largest_error <= 1e-9
    torch.testing.assert_close(found.direct.sum(0), found.logits, rtol=0, atol=1e-9)
    expected = logits(model, input_ids)
    assert torch.equal(found.logits, expected.amax(-1))  # the targets are what the model predicts
    heads = [name for name in found.names if "head " in name and name.startswith("layer")]
    assert len(heads) == 3 * 4
    embeddings = ["wte", "wpe"] if family.name == "gpt2" else ["embed_in"]
    assert found.names[: len(embeddings)] == embeddings
    linear = fields.get("final_norm") == "none"
    assert found.linear == linear
    assert (found.frozen_error()["relative"] < 1e-9) == linear
    if not linear:
        assert found.frozen_error()["relative"] > 0.01


@pytest.mark.parametrize("fields", KINDS)
def test_what_is_lost_without_a_component_is_what_ablation_gives(family, fields, input_ids):
    """After the last MLP, and in a parallel last block after a head, direct effects are all there are."""
    model = trained(family.model(**fields)).double()
    found = attribute(model, input_ids)
    block = family.block_list(model)[-1]
    attention, mlp = (block.get_submodule(path) for path in family.projections)

    def target_logits():
        return logits(model, input_ids).gather(-1, found.targets[..., None]).squeeze(-1)

    def lost(handle):
        without = target_logits()
        handle.remove()
        return before - without

    before = target_logits()
    removed = dict(zip(found.names, found.removed, strict=True))
    only_bias = mlp.register_forward_hook(lambda m, args, output: m.bias.expand_as(output))
    torch.testing.assert_close(lost(only_bias), removed["layer 2 mlp"], rtol=0, atol=1e-9)
    if family.name == "gpt_neox":
        without_head_1 = attention.register_forward_pre_hook(
            lambda m, args: torch.cat((args[0][..., :8], 0 * args[0][..., 8:16], args[0][..., 16:]), dim=-1)
        )
        torch.testing.assert_close(lost(without_head_1), removed["layer 2 head 1"], rtol=0, atol=1e-9)


def test_chosen_targets_and_padding(family, input_ids):
    model = trained(family.model(norm="layernorm")).double()
    targets = torch.full_like(input_ids, 7)
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0
    found = attribute(model, input_ids, targets=targets, attention_mask=mask)
    with torch.no_grad():
        expected = model(input_ids, attention_mask=mask).logits[..., 7]
    torch.testing.assert_close(found.direct.sum(0)[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-9)


def test_grid_and_ranking_hold_the_same_numbers(family, input_ids):
    found = attribute(trained(family.model(norm="none", final_norm="none")).double(), input_ids)
    grid, columns = found.grid(position=4, sequence=1)
    assert columns == ["0", "1", "2", "3", "mlp", "biases"]
    ranked = found.at(position=4, sequence=1)
    assert [abs(direct) for _, direct, _ in ranked] == sorted((abs(d) for _, d, _ in ranked), reverse=True)
    values = {name: direct for name, direct, _ in ranked}
    assert grid[2, 1].item() == pytest.approx(values["layer 2 head 1"])
    assert grid[1, 4].item() == pytest.approx(values["layer 1 mlp"])


def test_variants_add_up_or_are_told_to_be_folded(family, input_ids):
    fused = {"layer_activations": "identity_fused:0,relu:1-2", "ffn_scale": True}
    spectral = {"weight_norm": "spectral", "weight_norm_scope": "block"}
    for fields in (spectral, {"attention_softcap": 2.0, **fused}, {"embedding_scale": True}):
        assert attribute(trained(family.model(norm="scale", **fields)).double(), input_ids).largest_error <= 1e-9
    for fields in ({"residual_gain": "fixed"}, {"final_norm": "dyt"}):
        with pytest.raises(ValueError, match="no sum of what these components write"):
            attribute(family.model(**fields), input_ids)


def test_a_finished_removal_is_linear(family, input_ids):
    model = removed(trained(family.model(norm="removal", final_norm="removal"))).double()
    found = attribute(model, input_ids)
    assert found.linear
    assert found.largest_error <= 1e-9
    assert found.frozen_error()["relative"] < 1e-9


def test_stock_models_are_told_what_to_do(input_ids):
    stock = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=99, bos_token_id=0, eos_token_id=1))
    with pytest.raises(ValueError, match=r"hf_lnfree\.conversion\.load"):
        attribute(stock, input_ids)


@pytest.mark.parametrize("fields", KINDS)
def test_of_one_position_alone(family, fields, input_ids):
    model = trained(family.model(**fields)).double()
    everything, found = attribute(model, input_ids), attribute(model, input_ids, position=-1)
    assert found.names == everything.names
    for name in ("direct", "removed"):
        torch.testing.assert_close(
            getattr(found, name), getattr(everything, name)[..., -1:], rtol=0, atol=1e-12, equal_nan=True
        )
    assert torch.equal(found.targets, everything.targets[:, -1:])
    assert found.largest_error <= 1e-9
