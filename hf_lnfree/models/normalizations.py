"""What may stand where a stock model has a LayerNorm."""

from collections.abc import Callable
from typing import Literal

from torch import nn
from transformers import PreTrainedConfig

from .removal import RemovalNorm

Feeds = Literal["attention", "mlp", "final"]
"""What reads a norm: the projections of the attention, those of the MLP, or the head."""

# name -> (the stock LayerNorm, the configuration, what reads it -> the module that takes its place)
NORMALIZATIONS: dict[str, Callable[[nn.LayerNorm, PreTrainedConfig, Feeds], nn.Module]] = {
    "none": lambda stock, config, feeds: nn.Identity(),
    "layernorm": lambda stock, config, feeds: stock,
    # x / sqrt(mean(x^2) + eps), "RMSPre" in TransformerLens: what cannot be folded of a LayerNorm on a centred stream
    "rmspre": lambda stock, config, feeds: nn.RMSNorm(stock.normalized_shape, eps=stock.eps, elementwise_affine=False),
    "removal": lambda stock, config, feeds: RemovalNorm(stock.normalized_shape, eps=stock.eps),
}


def normalization_names() -> tuple[str, ...]:
    """Every norm a configuration may name."""
    return tuple(NORMALIZATIONS)


def build_norm(name: str, stock: nn.LayerNorm, config: PreTrainedConfig, feeds: Feeds) -> nn.Module:
    """The module for a norm's name; `norm_name` on it says that its `reset_parameters` is how it begins."""
    module = NORMALIZATIONS[name](stock, config, feeds)
    if module is not stock:
        module.norm_name = name
    return module
