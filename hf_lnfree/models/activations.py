"""Leaky ReLU with a fixed or a learnable slope, under names that transformers' `ACT2FN` knows.

The learnable one is fast on the CPU too: `torch.where` with a parameter costs 9x a ReLU there and `F.prelu` 3.8x.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN


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


# GPT2MLP and GPTNeoXMLP look the name up while they are built, before anything can be rewired.
ACT2FN["learnable_leaky_relu"] = LearnableLeakyReLU

WITH_SLOPE = {"leaky_relu": nn.LeakyReLU, "learnable_leaky_relu": LearnableLeakyReLU}


def activation_names() -> tuple[str, ...]:
    """Every activation name a configuration may use."""
    return tuple(ACT2FN)


def build_activation(name: str, negative_slope: float) -> nn.Module:
    """The module for an activation name; `negative_slope` matters to the leaky ones only."""
    return WITH_SLOPE[name](negative_slope) if name in WITH_SLOPE else ACT2FN[name]
