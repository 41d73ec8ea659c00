"""The idea of the package: where a family keeps its norms and activations, and how the stock graph is rewired.

A family is data (`DecoderSites`). The classes of transformers build their own graph; before they initialise it,
`LNFreeMixin` swaps what the configuration asks for, so attention, caches and generation stay theirs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.pytorch_utils import Conv1D

from .activations import LearnableLeakyReLU, build_activation
from .normalizations import NORMALIZATIONS


@dataclass(frozen=True)
class DecoderSites:
    """Where a decoder family keeps what the study changes. Paths are relative to a block unless said otherwise."""

    blocks: str
    """The ModuleList of blocks, in the base model."""
    block_norms: tuple[str, ...]
    final_norm: str
    """In the base model."""
    activation: str
    query_key_value: str
    """The fused projection."""
    query_key_value_per_head: bool
    """Whether its rows are ordered [head, (q, k, v)] and not [(q, k, v), head]."""
    unbiased: tuple[str, ...]
    """The projections without a trained bias under `linear_bias="query_key"`."""
    residual_projections: Mapping[type[nn.Module], str] = field(default_factory=dict)
    """Module type -> its child that writes into the residual stream."""


class FrozenBias:
    """A projection whose bias is never trained, also after loading, which assigns fresh parameters."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "bias" and param is not None:
            param.requires_grad_(False)
        super().register_parameter(name, param)


class QueryKeyBias:
    """A fused projection that trains the bias of query and key; that of value is held constant."""

    value_size: int

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.T if isinstance(self, Conv1D) else self.weight
        query_key, value = self.bias.unflatten(0, (-1, 3, self.value_size)).split((2, 1), dim=1)
        return F.linear(x, weight, torch.cat((query_key, value.detach()), dim=1).flatten())

    @property
    def num_frozen(self) -> int:
        return self.bias.numel() // 3


class FrozenBiasLinear(FrozenBias, nn.Linear): ...


class FrozenBiasConv1D(FrozenBias, Conv1D): ...


class QueryKeyBiasLinear(QueryKeyBias, nn.Linear): ...


class QueryKeyBiasConv1D(QueryKeyBias, Conv1D): ...


FROZEN_BIAS = {nn.Linear: FrozenBiasLinear, Conv1D: FrozenBiasConv1D}
QUERY_KEY_BIAS = {nn.Linear: QueryKeyBiasLinear, Conv1D: QueryKeyBiasConv1D}


def rewire(model: PreTrainedModel, sites: DecoderSites) -> None:
    """Give a stock decoder the norms, activations and biases of `model.config`, in place."""
    config = model.config
    blocks = model.get_submodule(sites.blocks)
    for block, norm, activation in zip(blocks, config.block_norms, config.block_activations, strict=True):
        for name in sites.block_norms:
            if hasattr(block, name):  # GPT-2 has ln_cross_attn only with cross-attention
                setattr(block, name, NORMALIZATIONS[norm](getattr(block, name)))
        module = build_activation(activation, config.negative_slope)
        module.activation_name = activation
        block.set_submodule(sites.activation, module)
        if config.linear_bias == "query_key":
            freeze_biases(block, sites, config)
    setattr(model, sites.final_norm, NORMALIZATIONS[config.final_norm](getattr(model, sites.final_norm)))


def freeze_biases(block: nn.Module, sites: DecoderSites, config) -> None:
    # The class is exchanged and not the module: weights, hooks and PEFT's isinstance checks stay as they are.
    for path in sites.unbiased:
        projection = block.get_submodule(path)
        projection.__class__ = FROZEN_BIAS[type(projection)]
        projection.bias.requires_grad_(False)
    fused = block.get_submodule(sites.query_key_value)
    fused.__class__ = QUERY_KEY_BIAS[type(fused)]
    heads = config.num_attention_heads if sites.query_key_value_per_head else 1
    fused.value_size = config.hidden_size // heads


def named_slopes(model: nn.Module) -> dict[str, nn.Parameter]:
    """The learnable slopes of a model by module name; a global slope appears under each of its names."""
    return {
        name: module.negative_slope for name, module in model.named_modules() if isinstance(module, LearnableLeakyReLU)
    }


def shared_slope_keys(model: PreTrainedModel) -> dict[str, str]:
    """{tied parameter: its source} for the layers that share one global slope, as `_tied_weights_keys` has it."""
    if model.config.slope_scope != "global":
        return {}
    names = [f"{name}.negative_slope" for name in named_slopes(model)]
    return dict.fromkeys(names[1:], names[0])


class LNFreeMixin:
    """Put before a stock class: rewires the graph, initialises what the study adds, ties the global slope."""

    sites: DecoderSites

    def post_init(self) -> None:
        if self.base_model is self:  # a head receives a backbone that is rewired already
            rewire(self, self.sites)
            # What save_pretrained reads to write a shared parameter once.
            self._tied_weights_keys = (self._tied_weights_keys or {}) | shared_slope_keys(self)
        super().post_init()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        # Stock ties nothing when tie_word_embeddings is off; a global slope is tied regardless.
        tied = super().get_expanded_tied_weights_keys(all_submodels)
        return tied if all_submodels or self.base_model is not self else tied | shared_slope_keys(self)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # Custom code skips modules without parameters of their own, among them those that scale residual projections.
        super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        projection = self.sites.residual_projections.get(type(module))
        if projection is not None:
            if self.config.residual_init == "scaled":
                std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
                init.normal_(getattr(module, projection).weight, mean=0.0, std=std)
        elif hasattr(module, "activation_name"):
            fresh = build_activation(str(module.activation_name), self.config.negative_slope)
            for name, value in fresh.state_dict(keep_vars=True).items():
                init.copy_(getattr(module, name), value)
        else:
            super()._init_weights(module)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As in transformers; `only_trainable` leaves out the frozen part of a query/key-only bias as well."""
        total = super().num_parameters(only_trainable, exclude_embeddings)
        if not only_trainable:
            return total
        fused = (m for m in self.modules() if isinstance(m, QueryKeyBias) and m.bias.requires_grad)
        return total - sum(m.num_frozen for m in fused)
