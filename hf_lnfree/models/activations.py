"""Activations with something to learn, under names that transformers' `ACT2FN` knows.

The learnable leaky ReLU is fast on the CPU too: `torch.where` with a parameter costs 9x a ReLU there, `F.prelu` 3.8x.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

# An MLP without a nonlinearity, and with one matrix in place of the two.
FUSED = "identity_fused"


class _LeakyReLU(torch.autograd.Function):
    """Leaky ReLU with one slope, without the full-size slope gradient of `F.prelu`; saves its input once."""

    @staticmethod
    def forward(ctx, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(x, slope)
        return F.leaky_relu(x, slope.item())

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, slope = ctx.saved_tensors
        needs_x, needs_slope = ctx.needs_input_grad
        grad_x = grad_slope = None
        if needs_x and torch.is_grad_enabled():  # double backward: the derivative with respect to the slope counts too
            grad_x = torch.where(x > 0, grad, grad * slope.to(x.dtype))
        elif needs_x:
            grad_x = torch.ops.aten.leaky_relu_backward(grad, x, slope.item(), False)
        if needs_slope:
            negative = x.clamp(max=0).flatten().to(slope.dtype)
            grad_slope = torch.dot(grad.flatten().to(slope.dtype), negative).view_as(slope)
        return grad_x, grad_slope


def leaky_relu(x: Tensor, slope: Tensor) -> Tensor:
    """
    `max(x, 0) + slope * min(x, 0)`, differentiable in both arguments, any number of times.

    Args:
        x: any shape and floating dtype.
        slope: one element, shape [1].
    """
    eager_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if eager_cpu and not torch._C._are_functorch_transforms_active():
        return _LeakyReLU.apply(x, slope)
    # One kernel on an accelerator, fused by torch.compile; reads no value back to the host.
    return F.prelu(x, slope.to(x.dtype))


class LearnableLeakyReLU(nn.Module):
    r"""
    $f(x) = \max(x, 0) + a \min(x, 0)$ with one learnable slope $a$ (arXiv 2410.09637, section 3.2).

    With `slope_scope="global"` every layer holds the same `negative_slope` parameter.

    Args:
        negative_slope (`float`, defaults to 0.01): the starting value of $a$.
    """

    def __init__(self, negative_slope: float = 0.01):
        super().__init__()
        # Shape [1], not []: FSDP2 shards no zero-dimensional parameter.
        self.negative_slope = nn.Parameter(torch.full((1,), float(negative_slope)))

    def forward(self, x: Tensor) -> Tensor:
        return leaky_relu(x, self.negative_slope)

    def extra_repr(self) -> str:
        slope = self.negative_slope
        return "negative_slope=meta" if slope.is_meta else f"negative_slope={slope.item():.4g}"


class ChannelPReLU(nn.Module):
    r"""
    $f(x)_c = \max(x_c, 0) + a_c \min(x_c, 0)$ with one learnable slope a channel (arXiv 1502.01852), each from
    `negative_slope` on. torch's own has its channels in dimension 1, and "prelu" in transformers has one slope.
    """

    def __init__(self, channels: int, negative_slope: float):
        super().__init__()
        self.start = float(negative_slope)
        self.weight = nn.Parameter(torch.full((channels,), self.start))

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=0) + self.weight.to(x.dtype) * x.clamp(max=0)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, negative_slope={self.start:g}"


class GELUReLU(nn.Module):
    r"""
    $f(x) = m\,\mathrm{GELU}(x) + (1 - m)\,\mathrm{ReLU}(x)$ with the learnable mix $m = \sigma(w)$ of a layer, from 1/2
    on: which of the two arXiv 2410.09637 compares does training choose where?
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    @property
    def mix(self) -> Tensor:
        """[1], the share of GELU."""
        return self.weight.sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).lerp(F.gelu(x), self.mix.to(x.dtype))

    def extra_repr(self) -> str:
        return "mix=meta" if self.weight.is_meta else f"mix={self.mix.item():.4g}"


# Stock MLPs look the name up while they are built, before anything can be rewired. A copy of this file beside a
# checkpoint leaves what is there: a model builds its own activations from `BUILDERS`.
for _name, _class in {
    "learnable_leaky_relu": LearnableLeakyReLU,
    "gelu_relu": GELUReLU,
    "identity": nn.Identity,
    FUSED: nn.Identity,
}.items():
    if _name not in ACT2FN:
        ACT2FN[_name] = _class

# name -> (width of the MLP, slope) -> module, for those that need to know
BUILDERS: dict[str, Callable[[int, float], nn.Module]] = {
    "leaky_relu": lambda width, slope: nn.LeakyReLU(slope),
    "learnable_leaky_relu": lambda width, slope: LearnableLeakyReLU(slope),
    "prelu": ChannelPReLU,
    "gelu_relu": lambda width, slope: GELUReLU(),
}

LEARNED = (LearnableLeakyReLU, ChannelPReLU, GELUReLU)
"""The activations of this file."""


def activation_names() -> tuple[str, ...]:
    """Every activation name a configuration may use."""
    return tuple(ACT2FN)


def build_activation(name: str, width: int, negative_slope: float) -> nn.Module:
    """The module for an activation name; `built` on it are these arguments, of which a fresh one can be made."""
    module = BUILDERS[name](width, negative_slope) if name in BUILDERS else ACT2FN[name]
    module.built = (name, width, negative_slope)
    return module
