"""What may stand where a stock model has a LayerNorm."""

from collections.abc import Callable

from torch import nn

from .removal import RemovalNorm

# name -> (the stock LayerNorm -> the module that takes its place)
NORMALIZATIONS: dict[str, Callable[[nn.LayerNorm], nn.Module]] = {
    "none": lambda stock: nn.Identity(),
    "layernorm": lambda stock: stock,
    # x / sqrt(mean(x^2) + eps), "RMSPre" in TransformerLens: what cannot be folded of a LayerNorm on a centred stream
    "rmspre": lambda stock: nn.RMSNorm(stock.normalized_shape, eps=stock.eps, elementwise_affine=False),
    "removal": lambda stock: RemovalNorm(stock.normalized_shape, eps=stock.eps),
}
