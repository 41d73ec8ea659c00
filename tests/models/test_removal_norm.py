"""A norm on its way to a fixed scale: LayerNorm at one end, linear at the other, and right about first positions."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

from hf_lnfree.models.removal import MAIN, VALUE, RemovalLayerNorm, RemovalNorm, RemovalRMSNorm

from ..conftest import EVERY, cache_field
from ..conversion.conftest import logits, trained


@pytest.fixture(params=EVERY, ids=lambda f: f.name)
def family(request):
    return request.param


def removal(family, **fields):
    model = trained(family.model(norm="removal", final_norm="removal", **fields))
    generator = torch.Generator().manual_seed(2)
    for norm in norms(model):
        norm.sigma.copy_(torch.rand(2, generator=generator) + 0.5)
    return model


def norms(model):
    return [module for module in model.modules() if isinstance(module, RemovalNorm)]


def test_begins_as_layernorm_and_loads_its_weights(family, input_ids, tmp_path):
    stock = trained(family.model(norm=family.norm))
    stock.save_pretrained(tmp_path)
    fields = {"norm": "removal", "final_norm": "removal"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **fields).eval()
    torch.testing.assert_close(logits(model, input_ids), logits(stock, input_ids), rtol=1e-5, atol=1e-5)
    assert all((norm.gate == 0).all() and (norm.sigma == 1).all() for norm in norms(model))


@pytest.mark.parametrize("kind", [RemovalLayerNorm, RemovalRMSNorm])
def test_in_between_is_the_formula(kind):
    norm = kind(16, eps=1e-3).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    norm.sigma.copy_(torch.tensor([9.0, 2.0]))
    norm.gate.fill_(0.25)
    norm.first_gate.fill_(0.5)
    x = torch.randn(3, 5, 16, dtype=torch.float64) + 2.0
    centred, bias = (x - x.mean(-1, keepdim=True), norm.bias) if kind is RemovalLayerNorm else (x, 0.0)
    sigma = (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    fixed = torch.tensor([5.5, 2, 2, 2, 2], dtype=torch.float64)[:, None]
    torch.testing.assert_close(norm(x), norm.weight * centred / (0.75 * sigma + 0.25 * fixed) + bias)


@pytest.mark.parametrize("kind", [RemovalLayerNorm, RemovalRMSNorm])
def test_the_end_is_linear(kind):
    norm = kind(16, eps=1e-5).double()
    norm.gate.fill_(1.0)
    norm.first_gate.fill_(1.0)
    assert norm.finished
    x, y = torch.randn(2, 1, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(norm(x + 3 * y) - norm(3 * y), norm(x) - norm(0 * x))


def test_averages_are_those_of_the_data_the_first_position_apart(family, input_ids):
    model = removal(family)
    for norm in norms(model):
        norm.observing = True
    seen = {}
    for name, norm in model.named_modules():
        if isinstance(norm, RemovalNorm):
            norm.register_forward_pre_hook(lambda m, args, name=name: seen.setdefault(name, []).append(args[0]))
    for batch in (input_ids, input_ids.flip(0, 1), input_ids + 1 - 1):
        logits(model, batch)
    for name, norm in model.named_modules():
        if isinstance(norm, RemovalNorm):
            tokens = torch.stack(seen[name]).view(3, 2, 12, -1)  # OPT's MLPs read one list of them
            square = tokens.var(-1, correction=0) if family.norm == "layernorm" else tokens.square().mean(-1)
            sigma = (square + norm.eps).sqrt()
            expected = torch.stack([sigma[..., 0].mean(), sigma[..., 1:].mean()])
            torch.testing.assert_close(norm.sigma, expected, rtol=1e-5, atol=1e-6)
            assert norm.batches == 3
    norms(model)[0].gate[VALUE] = 0.1
    before = norms(model)[0].sigma.clone()
    logits(model, input_ids)
    assert torch.equal(norms(model)[0].sigma, before), "the average of a norm that is being removed moved"


@pytest.mark.parametrize("gate", [0.5, 1.0])
def test_first_positions_are_found_with_padding_and_caches(family, gate, input_ids):
    model = removal(family)
    for norm in norms(model):
        norm.gate.fill_(gate)
    expected = logits(model, input_ids)
    padded = torch.cat((torch.full((2, 3), 2), input_ids), dim=1)
    mask = (torch.arange(15) >= 3).long().expand(2, -1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        left = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
        name = cache_field(model)
        cache, parts = DynamicCache(config=model.config), []
        for part in input_ids.split((5, 1, 6), dim=1):
            parts.append(model(part, **{name: cache}, use_cache=True).logits)
    near = 1e-5 * expected.abs().max().item() + 1e-5  # OPT's stream grows
    torch.testing.assert_close(left, expected, rtol=1e-4, atol=near)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=near)
    generated = model.generate(padded, attention_mask=mask, max_new_tokens=3, do_sample=False)[:, 3:]
    step = input_ids
    for _ in range(3):
        step = torch.cat((step, logits(model, step)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(generated, step)


@pytest.mark.parametrize("padded", [None, 0, 2], ids=["no mask", "ones", "padding"])
def test_every_sequence_of_a_packed_row_has_a_first_position(family, padded, input_ids):
    """Two sequences in a row, as a collator that flattens gives them, with a mask of ones or without."""
    model = removal(family)
    for norm in norms(model):
        norm.gate.fill_(1.0)
        norm.sigma.copy_(torch.tensor([4.0, 0.5]))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    expected = {0, 5}
    mask = None if padded is None else torch.ones(1, 12 + padded, dtype=torch.long)
    ids = input_ids[:1]
    if padded:
        ids = nn.functional.pad(ids, (padded, 0))
        positions = nn.functional.pad(positions, (padded, 0))  # zeros, where nothing begins
        mask[:, :padded] = 0
        expected = {first + padded for first in expected}
    found = {}
    norms(model)[0].register_forward_hook(lambda norm, inputs, output: found.update(x=inputs[0], y=output))
    with torch.no_grad():
        model(ids, position_ids=positions, attention_mask=mask)
    norm = norms(model)[0]
    centred = found["x"] - found["x"].mean(-1, keepdim=True) if family.norm == "layernorm" else found["x"]
    for place in range(padded or 0, 12 + (padded or 0)):
        sigma = 4.0 if place in expected else 0.5
        wanted = norm.weight * centred[0, place] / sigma + getattr(norm, "bias", 0.0)
        torch.testing.assert_close(found["y"][0, place], wanted)


def split(model):
    """Query and key on a fixed scale, values still on sigma."""
    for norm in norms(model):
        if norm.path is not None:
            norm.gate[MAIN] = 1.0
    return model


def test_values_have_an_input_of_their_own(family, input_ids):
    """Against torch's layer_norm, and the formula."""
    model = split(removal(family))
    block = family.block_list(model)[0]
    norm = next(m for m in block.modules() if isinstance(m, RemovalNorm) and m.path is not None)
    makes_values = {"gpt2": "attn.c_attn", "gpt_neox": "attention.query_key_value"}
    assert norm.path == makes_values.get(family.name, "self_attn.v_proj")
    fused = block.get_submodule(norm.path)
    caught = {}
    logits(model, input_ids)  # the norm finds its projection when it is first used
    fused.register_forward_hook(lambda m, args, output: caught.update(x=args[0], out=output))
    logits(model, input_ids)
    stream = model.base_model.get_input_embeddings()(input_ids)
    if family.name == "gpt2":
        stream = stream + model.base_model.wpe.weight[:12]
    if family.name == "opt":
        stream = stream + model.base_model.decoder.embed_positions.weight[2:14]
    with torch.no_grad():
        sizes = (-1, (norm.groups, 3, 32 // norm.groups) if norm.groups else (1, 1, caught["out"].shape[-1]))
        if family.norm == "layernorm":
            normed = nn.functional.layer_norm(stream, (32,), norm.weight, norm.bias, norm.eps)
        else:
            normed = nn.functional.rms_norm(stream, (32,), norm.weight, norm.eps)
        values = fused.forward(normed).unflatten(*sizes)[..., -1, :]
        torch.testing.assert_close(caught["out"].unflatten(*sizes)[..., -1, :], values, rtol=1e-4, atol=1e-5)
        centred = stream - stream.mean(-1, keepdim=True) if family.norm == "layernorm" else stream
        others = (norm.weight * centred / norm.sigma[1] + getattr(norm, "bias", 0.0))[:, 1:]
        torch.testing.assert_close(caught["x"][:, 1:], others, rtol=1e-4, atol=1e-5)


def test_copies_and_adapters_keep_values_apart(family, input_ids):
    model = split(removal(family))
    expected = logits(model, input_ids)
    copied = copy.deepcopy(model)
    for norm in norms(model):
        norm.gate.fill_(0.0)
    assert torch.equal(logits(copied, input_ids), expected)
    adapted = get_peft_model(
        copied, LoraConfig(target_modules="all-linear", init_lora_weights=False, fan_in_fan_out=family.name == "gpt2")
    ).eval()
    found = logits(adapted, input_ids)
    assert (found - expected).abs().max() > 1e-2
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged, input_ids), found, rtol=1e-4, atol=1e-4)


def test_saved_in_the_middle(family, input_ids, tmp_path):
    model = split(removal(family))
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(reloaded, input_ids), logits(model, input_ids))
    assert "sigma=" in repr(norms(reloaded)[0])
