r"""What may stand where a stock model has a norm.

- "none": nothing, $y = x$.
- "layernorm": $y = g \odot (x - \bar x) / \sqrt{\overline{(x - \bar x)^2} + \epsilon} + b$ (arXiv
  1607.06450); the stock module where it is one.
- "rmsnorm": $y = g \odot x / \sqrt{\overline{x^2} + \epsilon}$ (arXiv 1910.07467); the stock module where it is one.
- "rmspre": the same without $g$, TransformerLens' name for what is left of a LayerNorm on a centred stream once gain
  and bias are folded into the weights around it.
- "dyt", "derf": [`DynamicTanh`], [`DynamicErf`], functions of single numbers.
- "scale", "affine", "fixed_scale": [`Scale`], [`Affine`], [`FixedScale`], which are linear.
- "removal": [`RemovalNorm`], the stock norm on its way to a fixed scale.

Shapes: x [..., D]; gains and biases [D], learned numbers [1]; overlines are means over D.
"""

from collections.abc import Callable
from typing import Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .removal import RemovalLayerNorm, RemovalNorm, RemovalRMSNorm

Feeds = Literal["attention", "mlp", "final"]
"""What reads a norm: the projections of the attention, those of the MLP, or the head."""


class _Squashed(nn.Module):
    def __init__(self, size: int, alpha: float):
        super().__init__()
        self.start = float(alpha)
        self.alpha = nn.Parameter(torch.full((1,), self.start))
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.alpha, self.start)
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, alpha={'meta' if self.alpha.is_meta else format(self.alpha.item(), '.4g')}"


class DynamicTanh(_Squashed):
    r"""
    $y = g \odot \tanh(\alpha x) + b$ with one learned $\alpha$ (DyT, arXiv 2503.10622).

    Args:
        alpha: where $\alpha$ starts; the paper takes 0.5, and for large language models more before attention than
            elsewhere.
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.alpha * x) * self.weight + self.bias


class DynamicErf(_Squashed):
    r"""
    $y = g \odot \mathrm{erf}(\alpha x + s) + b$ with learned $\alpha$ and shift $s$ (Derf, arXiv 2512.10938).

    Args:
        alpha: where $\alpha$ starts; $s$ starts at 0.
    """

    def __init__(self, size: int, alpha: float):
        super().__init__(size, alpha)
        self.shift = nn.Parameter(torch.zeros(1))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.shift)

    def forward(self, x: Tensor) -> Tensor:
        return torch.erf(self.alpha * x + self.shift) * self.weight + self.bias


class Scale(nn.Module):
    r"""$y = a x$ with one learned scalar, from 1 on: what is left of a norm that may only choose a size."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))  # not "weight": a stock checkpoint has another under that name

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


class Affine(nn.Module):
    r"""$y = g \odot x + b$ (Aff of ResMLP, arXiv 2105.03404): gain and bias of a LayerNorm without its statistics."""

    def __init__(self, size: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x + self.bias


class FixedScale(nn.LayerNorm):
    r"""
    $y = g \odot (x - \bar x) / \sigma_0 + b$: a LayerNorm whose deviation is a constant, so linear; what the removal of
    a norm ends in (arXiv 2409.13710).

    Buffers:
        sigma: [], $\sigma_0$; 1 in a new model. Not trained.
    """

    sigma: Tensor

    def __init__(self, size: int):
        super().__init__(size)
        self.register_buffer("sigma", torch.ones(()))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "sigma" in self._buffers:
            nn.init.ones_(self.sigma)

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) * (self.weight / self.sigma.to(self.weight.dtype)) + self.bias

    def extra_repr(self) -> str:
        return f"{self.normalized_shape[0]}, sigma={'meta' if self.sigma.is_meta else format(self.sigma.item(), '.4g')}"


def alpha_of(config: PreTrainedConfig, feeds: Feeds) -> float:
    """Where the alpha of a norm starts, by what reads the norm."""
    own = getattr(config, f"norm_alpha_{feeds}")
    return config.norm_alpha if own is None else own


def width(stock: nn.Module) -> int:
    """D of a stock LayerNorm or RMSNorm."""
    return cast(nn.Parameter, stock.weight).numel()


def epsilon(stock: nn.Module) -> float:
    """What a stock LayerNorm or RMSNorm adds to the mean square; those of transformers call it variance_epsilon."""
    return cast(float, getattr(stock, "eps", None) or getattr(stock, "variance_epsilon", None))


def layer_norm(stock: nn.Module) -> nn.LayerNorm:
    """The stock module, if it is one."""
    return stock if isinstance(stock, nn.LayerNorm) else nn.LayerNorm(width(stock), eps=epsilon(stock))


def rms_norm(stock: nn.Module) -> nn.Module:
    """The stock module, if it is no LayerNorm: every family of transformers has an RMSNorm of its own."""
    return nn.RMSNorm(width(stock), eps=epsilon(stock)) if isinstance(stock, nn.LayerNorm) else stock


def removal_norm(stock: nn.Module) -> RemovalNorm:
    """The stock norm, LayerNorm or RMSNorm, as it begins to be removed."""
    kind = RemovalLayerNorm if isinstance(stock, nn.LayerNorm) else RemovalRMSNorm
    return kind(width(stock), eps=epsilon(stock))


# name -> (the stock norm, the configuration, what reads it -> the module that takes its place)
NORMALIZATIONS: dict[str, Callable[[nn.Module, PreTrainedConfig, Feeds], nn.Module]] = {
    "none": lambda stock, config, feeds: nn.Identity(),
    "layernorm": lambda stock, config, feeds: layer_norm(stock),
    "rmsnorm": lambda stock, config, feeds: rms_norm(stock),
    "rmspre": lambda stock, config, feeds: nn.RMSNorm(width(stock), eps=epsilon(stock), elementwise_affine=False),
    "dyt": lambda stock, config, feeds: DynamicTanh(width(stock), alpha_of(config, feeds)),
    "derf": lambda stock, config, feeds: DynamicErf(width(stock), alpha_of(config, feeds)),
    "scale": lambda stock, config, feeds: Scale(),
    "affine": lambda stock, config, feeds: Affine(width(stock)),
    "fixed_scale": lambda stock, config, feeds: FixedScale(width(stock)),
    "removal": lambda stock, config, feeds: removal_norm(stock),
}


LINEAR = (nn.Identity, Scale, Affine, FixedScale)
"""What is one linear map of its input, or none."""


def normalization_names() -> tuple[str, ...]:
    """Every norm a configuration may name."""
    return tuple(NORMALIZATIONS)


def build_norm(name: str, stock: nn.Module, config: PreTrainedConfig, feeds: Feeds) -> nn.Module:
    """The module for a norm's name; `norm_name` on it says that its `reset_parameters` is how it begins."""
    module = NORMALIZATIONS[name](stock, config, feeds)
    if module is not stock:
        module.norm_name = name  # type: ignore[assignment]  # a mark, no child
    return module
