"""What may stand where a stock model has a LayerNorm."""

from collections.abc import Callable

from torch import nn

# name -> (the stock LayerNorm -> the module that takes its place)
NORMALIZATIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "none": lambda stock: nn.Identity(),
    "layernorm": lambda stock: stock,
}
