"""Sites that are inferred are those that are declared, and those that one reads in modeling files."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, ResNetConfig, ResNetModel, ViTForImageClassification

from hf_lnfree import LNFreeViTModel
from hf_lnfree.conversion.declared_sites import declared_sites
from hf_lnfree.conversion.inferred_sites import BLOCK_ROLES, infer_sites
from hf_lnfree.errors import ModelError

from ..models.test_sites import FIELDS, LNFREE, STOCK
from .architectures import ARCHITECTURES, PICTURE, SIZES


def stock(name):
    """A model of a declared family, its sites, and what it must be called with beyond tokens."""
    if name == "ViT":
        return ViTForImageClassification(ViTForImageClassification.config_class(**PICTURE)), LNFreeViTModel.stacks, None
    model_class, config_class, stacks = STOCK[name]
    inputs = None
    if name == "GPT-2":  # with cross-attention
        inputs = {"input_ids": torch.ones(1, 4, dtype=torch.long), "encoder_hidden_states": torch.ones(1, 3, 32)}
    return model_class(config_class(**FIELDS[name])), stacks, inputs


@pytest.mark.parametrize("name", [*STOCK, "ViT"])
def test_inferred_sites_are_the_declared_ones(name):
    """Norms, what they compute, what reads them, activations, writers: of every family."""
    model, stacks, inputs = stock(name)
    declared, inferred = declared_sites(model, stacks), infer_sites(model, inputs)

    def comparable(sites):
        known = [site for site in sites.norms if site.role in (*BLOCK_ROLES, "query-key", "final")]
        return {
            replace(site, readers=site.readers if site.role == "before a branch" else frozenset()) for site in known
        }

    assert inferred.stacks == declared.stacks
    assert comparable(inferred) == comparable(declared)
    assert set(inferred.activations) == set(declared.activations)
    assert inferred.writers == declared.writers
    assert inferred.unwatched == {}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.head)
def test_sites_of_a_family_that_nobody_declared(architecture):
    sites = infer_sites(architecture.model())
    roles = {site.path: site.role for site in sites.norms}
    blocks = {site.path for site in sites.norms if site.role in BLOCK_ROLES}
    assert blocks == architecture.norms
    assert {path for path, role in roles.items() if role == "final"} == architecture.finals
    assert set(roles) | set(sites.unwatched) == architecture.norms | architecture.finals | architecture.others
    assert {site.path for site in sites.activations} == architecture.activations
    assert {site.kind for site in sites.norms if site.path in blocks | architecture.finals} == {architecture.kind}
    assert any(roles[path] == "behind the sum" for path in blocks) == architecture.behind
    assert sites.stacks == tuple(stack.blocks for stack in architecture.stacks)


def test_the_meta_device_is_enough():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    real = LlamaForCausalLM(LlamaConfig(**SIZES))
    assert infer_sites(model) == infer_sites(real)


def test_the_trial_leaves_a_model_as_it_was():
    model = ARCHITECTURES[-1].model().train()
    model.wav2vec2.encoder.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    infer_sites(model)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(
        m._forward_hooks or m._forward_pre_hooks for m in model.modules() if not hasattr(m, "parametrizations")
    )


def test_a_norm_that_the_trial_does_not_call_is_named():
    model, _, _ = stock("GPT-2")
    with pytest.raises(ModelError, match=r"does not call: h\.0\.ln_cross_attn, h\.1\.ln_cross_attn.*inputs=.*sites="):
        infer_sites(model)


class TwoFaced(nn.Module):
    """Normalises the stream on its way in, and what the block adds on its way out, with one norm."""

    def __init__(self, block):
        super().__init__()
        self.norm, self.linear = block.input_layernorm, nn.Linear(32, 32)

    def forward(self, hidden_states, **kwargs):
        return hidden_states + self.norm(self.linear(self.norm(hidden_states)))


def test_a_norm_with_two_parts_is_named():
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.model.layers = nn.ModuleList([TwoFaced(block) for block in model.model.layers])
    with pytest.raises(ModelError, match=r"different things from call to call: model\.layers\.0\.norm, .*sites="):
        infer_sites(model)


def test_blocks_that_cannot_be_found_are_said():
    with pytest.raises(ModelError, match=r"ResNetModel has no list of repeated blocks.*sites="):
        infer_sites(ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])))


def test_a_trial_that_fails_says_what_to_give():
    with pytest.raises(ModelError, match=r"LlamaForCausalLM cannot be watched.*the inputs=.*IndexError"):
        infer_sites(LlamaForCausalLM(LlamaConfig(**SIZES)), {"input_ids": torch.full((1, 3), 1000)})


def test_sites_that_are_not_there_are_named():
    model, _, _ = stock("Qwen3")
    with pytest.raises(ModelError, match=r"Qwen3Model does not have.*encoder"):
        declared_sites(model, LNFREE["BERT"].stacks)
