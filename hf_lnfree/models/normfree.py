"""The idea of the package: where a family keeps its norms and activations, and how the stock graph is rewired.

A family is data (`DecoderSites`). The classes of transformers build their own graph; before they initialise it,
`LNFreeMixin` swaps what the configuration asks for, so attention, caches and generation stay theirs.
"""

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.pytorch_utils import Conv1D

from .activations import FUSED, LearnableLeakyReLU, build_activation
from .biases import QueryKeyBias, train_query_key_bias_only
from .errors import ConfigurationError
from .normalizations import build_norm
from .removal import FirstPosition, RemovalNorm
from .softcap import cap_logits
from .stabilizers import QueryKeyControl, ResidualGain, ScaledMLP
from .weight_norms import NormedWeight, norm_weight


@dataclass(frozen=True)
class DecoderSites:
    """Where a decoder family keeps what the study changes. Paths are relative to a block unless said otherwise."""

    embeddings: tuple[str, ...]
    """What the residual stream begins with, in the base model."""
    blocks: str
    """The ModuleList of blocks, in the base model."""
    block_norms: Mapping[str, tuple[str, ...]]
    """Norm -> the projections that read it."""
    residual_writers: tuple[str, ...]
    """The projections that write into the residual stream: of the attention, of the MLP, and any other."""
    final_norm: str
    """In the base model."""
    activation: str
    query_key_value: str | None = None
    """The fused projection, where there is one."""
    query_key_value_per_head: bool = False
    """Whether its rows are ordered [head, (q, k, v)] and not [(q, k, v), head]."""
    unbiased: tuple[str, ...] = ()
    """The projections without a trained bias under `linear_bias="query_key"`."""
    branch_ends: tuple[str, ...] = ()
    """The dropouts between a residual branch and the stream: of the attention, of the MLP, and any other."""
    residual_projections: Mapping[type[nn.Module], str] = field(default_factory=dict)
    """Module type -> its child that writes into the residual stream, for the initialisation."""

    def fused_groups(self, config: PreTrainedConfig) -> int:
        """How many times (q, k, v) stands in the rows of the fused projection: once, or once a head."""
        return config.num_attention_heads if self.query_key_value_per_head else 1

    @property
    def attention_norms(self) -> set[str]:
        """The norms that feed the module of the first residual writer."""
        return {norm for norm, readers in self.block_norms.items() if readers[0].split(".")[0] == self.attention}

    @property
    def attention(self) -> str:
        """The module of the first residual writer."""
        return self.residual_writers[0].split(".")[0]

    def present(self, block: nn.Module, paths: Iterable[str]) -> list[str]:
        """Those of the paths that a block has; what is left of the first matrix of a fused MLP does not count."""
        modules = dict(block.named_modules())
        return [path for path in paths if path in modules and not isinstance(modules[path], nn.Identity)]

    def readers(self, block: nn.Module, norm: str) -> list[nn.Module]:
        """The projections that read a norm."""
        paths = self.present(block, self.block_norms[norm]) or [self.residual_writers[1]]
        return [block.get_submodule(path) for path in paths]

    def mlp_width(self, block: nn.Module) -> int:
        """How many activations the MLP has a token."""
        writer = block.get_submodule(self.residual_writers[1])
        return writer.weight.shape[0 if isinstance(writer, Conv1D) else 1]

    def mlp_readers(self, block: nn.Module) -> list[str]:
        """The first projections of the MLP."""
        return [path for path in self.matrices(block, mlp_only=True) if path != self.residual_writers[1]]

    def matrices(self, block: nn.Module, mlp_only: bool) -> list[str]:
        """The projections of the MLP, or all of a block."""
        others = {self.attention, *(path.split(".")[0] for path in self.residual_writers[2:])}
        every = [path for paths in self.block_norms.values() for path in paths] + list(self.residual_writers)
        return [path for path in self.present(block, every) if not mlp_only or path.split(".")[0] not in others]

    def fuse_mlp(self, block: nn.Module) -> nn.Module:
        """Leave an MLP one projection, from the residual stream into it, in place; returns it, not yet filled."""
        writer = block.get_submodule(self.residual_writers[1])
        width = writer.weight.shape[1 if isinstance(writer, Conv1D) else 0]
        for path in self.mlp_readers(block):
            block.set_submodule(path, nn.Identity())
        one = type(writer)(width, width)
        if writer.bias is None:
            one.bias = None
        block.set_submodule(self.residual_writers[1], one)
        return one

    def writers(self, block: nn.Module) -> dict[str, nn.Module]:
        """Those of the residual writers that a block has, by path."""
        return {path: block.get_submodule(path) for path in self.present(block, self.residual_writers)}


def rewire(model: PreTrainedModel, sites: DecoderSites) -> None:
    """Give a stock decoder the norms, activations, biases and stabilisers of `model.config`, in place."""
    config = model.config
    blocks = model.get_submodule(sites.blocks)
    for block, norm, activation in zip(blocks, config.block_norms, config.block_activations, strict=True):
        for name in sites.block_norms:
            if hasattr(block, name):  # GPT-2 has ln_cross_attn only with cross-attention
                feeds = "attention" if name in sites.attention_norms else "mlp"
                setattr(block, name, build_norm(norm, getattr(block, name), config, feeds))
        if activation == FUSED:
            sites.fuse_mlp(block)
        module = build_activation(activation, sites.mlp_width(block), config.negative_slope)
        block.set_submodule(sites.activation, ScaledMLP(module) if config.ffn_scale else module)
        if config.linear_bias == "query_key":
            train_query_key_bias_only(
                fused=block.get_submodule(sites.query_key_value),
                value_size=config.hidden_size // sites.fused_groups(config),
                others=[block.get_submodule(path) for path in sites.present(block, sites.unbiased)],
            )
        stabilize(block, sites, config)
    final = model.get_submodule(sites.final_norm)
    model.set_submodule(sites.final_norm, build_norm(config.final_norm, final, config, "final"))
    connect_removal(model, sites)


def stabilize(block: nn.Module, sites: DecoderSites, config: PreTrainedConfig) -> None:
    """Residual gains, control of queries, keys and logits, and normed weights of one block, in place."""
    if config.residual_gain != "none":
        shared = None
        for path in sites.present(block, sites.branch_ends):
            dropout = block.get_submodule(path)
            gain = ResidualGain(dropout.p, config.residual_gain, config.num_hidden_layers, shared)
            block.set_submodule(path, gain)
            shared = shared or (gain if config.residual_gain == "rezero" else None)
    if config.query_key_norm or config.attention_temperature:
        heads, groups = config.num_attention_heads, sites.fused_groups(config)
        control = QueryKeyControl(heads, groups, config.query_key_norm, config.attention_temperature)
        block.get_submodule(sites.attention).query_key = control
        control.attach(block, sites.query_key_value)
    if config.attention_softcap is not None:
        cap_logits(block.get_submodule(sites.attention), config.attention_softcap)
    if config.weight_norm != "none":
        for path in sites.matrices(block, mlp_only=config.weight_norm_scope == "mlp"):
            norm_weight(block.get_submodule(path), config.weight_norm)


def connect_removal(model: PreTrainedModel, sites: DecoderSites) -> None:
    """Tell the norms that are being removed where sequences begin, and which fused projection reads them."""
    norms = [module for module in model.modules() if isinstance(module, RemovalNorm)]
    if not norms:
        return
    first = FirstPosition()
    model.register_forward_pre_hook(first.locate, with_kwargs=True)
    for norm in norms:
        norm.first = first
    for block in model.get_submodule(sites.blocks):
        for name, readers in sites.block_norms.items():
            norm = getattr(block, name, None)
            if isinstance(norm, RemovalNorm) and sites.query_key_value in readers:
                norm.read_by(block, sites.query_key_value, sites.fused_groups(model.config))


def named_slopes(model: nn.Module) -> dict[str, nn.Parameter]:
    """The learnable slopes of a model by module name; a global slope appears under each of its names."""
    return {
        name: module.negative_slope for name, module in model.named_modules() if isinstance(module, LearnableLeakyReLU)
    }


def shared_slope_keys(model: PreTrainedModel) -> dict[str, str]:
    """{tied parameter: its source} for the layers that share one global slope, as `_tied_weights_keys` has it."""
    if model.config.slope_scope != "global":
        return {}
    source, *tied = [f"{name}.negative_slope" for name in named_slopes(model)] or [""]
    return dict.fromkeys(tied, source)


class LNFreeMixin:
    """Put before a stock class: rewires the graph, initialises what the study adds, ties the global slope."""

    sites: DecoderSites

    def post_init(self) -> None:
        if self.base_model is self:  # a head receives a backbone that is rewired already
            rewire(self, self.sites)
            # What save_pretrained reads to write a shared parameter once.
            self._tied_weights_keys = (self._tied_weights_keys or {}) | shared_slope_keys(self)
        super().post_init()

    def _sdpa_can_dispatch(self, is_init_check: bool = False) -> bool:
        if self.config.attention_softcap is not None:
            raise ConfigurationError(
                "scaled_dot_product_attention cannot cap logits (attention_softcap). Load the model with "
                'attn_implementation="eager", or with one that can: flash attention, "flex_attention" for GPT-NeoX.'
            )
        return super()._sdpa_can_dispatch(is_init_check)

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        # Stock ties nothing when tie_word_embeddings is off; a global slope is tied regardless.
        tied = super().get_expanded_tied_weights_keys(all_submodels)
        return tied if all_submodels or self.base_model is not self else tied | shared_slope_keys(self)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # Custom code skips modules without parameters of their own, among them those that scale residual projections.
        super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, NormedWeight):  # as the class that it had, then what the norm adds
            normed, module.__class__ = type(module), module.plain
            self._init_weights(module)
            module.__class__ = normed
            module.reset_norm()
            return
        projection = self.sites.residual_projections.get(type(module))
        if projection is not None:
            if self.config.residual_init == "scaled":
                std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
                writer = getattr(module, projection)
                init.normal_(writer.trained if isinstance(writer, NormedWeight) else writer.weight, mean=0.0, std=std)
                if isinstance(writer, NormedWeight):
                    writer.reset_norm()
        elif hasattr(module, "built"):
            fresh = build_activation(*module.built)
            for name, value in fresh.state_dict(keep_vars=True).items():
                init.copy_(getattr(module, name), value)
        elif hasattr(module, "norm_name") or isinstance(module, (ScaledMLP, ResidualGain, QueryKeyControl)):
            if (reset := getattr(module, "reset_parameters", None)) is not None:
                reset()
        else:
            super()._init_weights(module)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "peft_config":  # adapters were put in; PEFT itself compares shapes only
            trained_on = {config.base_model_name_or_path for config in value.values()} - {None, "", self.name_or_path}
            if trained_on and self.name_or_path:
                warnings.warn(
                    f"An adapter trained on {', '.join(sorted(trained_on))} is put on {self.name_or_path}. Weights of "
                    "the same shape fit, whatever they mean: if LayerNorms were removed or folded in between, merge "
                    "the adapter into the model it was trained on, or train it anew.",
                    stacklevel=2,
                )
        super().__setattr__(name, value)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As in transformers; `only_trainable` leaves out the frozen part of a query/key-only bias as well."""
        total = super().num_parameters(only_trainable, exclude_embeddings)
        if not only_trainable:
            return total
        fused = (m for m in self.modules() if isinstance(m, QueryKeyBias) and m.bias.requires_grad)
        return total - sum(m.num_frozen for m in fused)
