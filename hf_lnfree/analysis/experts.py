"""Mixtures of experts whose weights are 3-D, whichever implementation runs them: rows by expert, computed again.

Shapes: N tokens, K experts chosen for each, E experts, D width, F hidden units.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ModelError

ROUNDINGS = 64
"""By how many of its roundings the output of a mixture may differ between implementations."""


class ExpertRows(NamedTuple):
    """Of one expert: the tokens [n] that it was given, its input, pre- and post-activation, [n, ...]."""

    expert: int
    token: Tensor
    inputs: Tensor
    pre: Tensor
    post: Tensor


def has_experts(module: nn.Module) -> bool:
    """Whether it holds fused weights in the layout that transformers' `use_experts_implementation` describes."""
    up = getattr(module, "gate_up_proj" if getattr(module, "has_gate", False) else "up_proj", None)
    weights = (up, getattr(module, "down_proj", None))
    return hasattr(module, "has_gate") and all(isinstance(w, Tensor) and w.dim() == 3 for w in weights)


@torch.no_grad()
def expert_rows(name: str, module: Any, arguments: Sequence[Any], output: Any) -> Iterator[ExpertRows]:
    """
    Args:
        arguments: what the module was called with: hidden states [N, D], experts [N, K], their weights [N, K].
        output: what it returned [N, D], against which its rows are checked.

    Raises:
        ModelError: the rows do not give that output.
    """
    if len(arguments) != 3 or not all(isinstance(x, Tensor) and x.dim() == 2 for x in (*arguments, output)):
        raise ModelError(f"The experts of {name} ({type(module).__name__}) are called in a way that is not known.")
    x, chosen, weights = arguments
    total = torch.zeros_like(output, dtype=torch.promote_types(output.dtype, torch.float32))
    for expert in chosen.unique().tolist():
        if expert >= module.num_experts:  # of another process
            continue
        token, place = (chosen == expert).nonzero(as_tuple=True)
        inputs = x[token]
        hidden = _linear(module, "gate_up_proj" if module.has_gate else "up_proj", expert, inputs)
        gate = hidden.chunk(2, -1)[0] if getattr(module, "is_concatenated", True) else hidden[..., ::2]
        pre = gate if module.has_gate else hidden
        post = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
        result = _linear(module, "down_proj", expert, post)
        if getattr(module, "has_post_expert_norm", False):
            result = module.post_expert_norm(result)
        total.index_add_(0, token, (result * weights[token, place, None]).to(total))
        yield ExpertRows(expert, token, inputs, pre, post)
    if not close(output, total, ROUNDINGS):
        raise ModelError(f"The experts of {name} ({type(module).__name__}) do more than their weights say.")


def _linear(module: Any, name: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if getattr(module, "has_bias", False) else None
    weight = weight.mT if getattr(module, "is_transposed", False) else weight
    return nn.functional.linear(x.to(weight.dtype), weight, bias)


def close(one: Tensor, other: Tensor, roundings: int = 4) -> bool:
    """Whether two tensors are equal but for some roundings of the first one's precision, NaN being equal to NaN."""
    if one.isnan().any() or other.isnan().any():
        return bool((one.isnan() == other.isnan()).all())
    error = (one.to(other.dtype) - other).abs().max() if one.numel() else torch.zeros(())
    return bool(error <= roundings * torch.finfo(one.dtype).eps * other.abs().max().clamp_min(1e-30))
