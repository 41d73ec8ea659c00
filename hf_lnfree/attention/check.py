"""Whether an attention function of somebody else computes the softmax that its arguments describe.

Shapes: B batch, H heads, R checked queries, K keys, Dv value dimension.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import AttentionError
from .calls import AttentionCall
from .visibility import EVERYTHING, Mask

ROWS = 8  # queries that are compared, first to last
TRUSTED = ("transformers", "torch", __name__.partition(".")[0])


def is_known(function: Callable) -> bool:
    """Whether transformers, torch or this package wrote it, which `read_mask` and the tests know."""
    while isinstance(function, functools.partial):
        function = function.func
    # Not __module__, which `functools.wraps` copies.
    module = getattr(function, "__globals__", {}).get("__name__") or getattr(function, "__module__", None) or ""
    return module.partition(".")[0] in TRUSTED


@torch.no_grad()
def check_output(call: AttentionCall, mask: Tensor | Mask | None, is_causal: bool) -> None:
    """
    Compares some rows of what the function returned with the softmax attention of queries, keys, values and mask.

    Args:
        mask, is_causal: as `read_mask` returns them.

    Raises:
        AttentionError: they differ by more than rounding, so that the entropies of that softmax are not the model's.
    """
    name = f"{type(call.module).__name__} runs {getattr(call.function, '__name__', call.function)!r}, which"
    if call.options.get("dropout"):
        raise AttentionError(f"{name} cannot be checked under dropout. Call model.eval(), or set its dropout to 0.")
    (batch, heads, queries, _), width = call.query.shape, call.value.shape[3]
    output = call.result[0] if isinstance(call.result, tuple) else call.result
    if not (isinstance(output, Tensor) and tuple(output.shape) == (batch, queries, heads, width)):
        raise AttentionError(
            f"{name} returned {list(getattr(output, 'shape', [])) or type(output).__name__} where transformers expects "
            f"the output [batch, queries, heads, width], {[batch, queries, heads, width]}."
        )
    rows = torch.linspace(0, queries - 1, min(ROWS, queries), device=call.query.device).long()
    logits, alive = visible_logits(call, rows, mask, is_causal)
    weights = logits.softmax(-1)[..., : call.key.shape[2]]
    values = grouped(call.value, heads).to(logits.dtype)
    found, expected = output[:, rows].transpose(1, 2).to(logits.dtype), weights @ values
    # Rounding of logits, relative in the weights, and of weights and values.
    eps = max(torch.finfo(call.query.dtype).eps, 1e-5)
    largest = logits.where(logits > -1e30, 0.0).abs().amax(-1, keepdim=True)
    tolerance = eps * (8 + 4 * largest) * values.abs().amax((-2, -1), keepdim=True)
    wrong = ((found - expected).abs() > tolerance) & alive[..., None]
    if wrong.any():
        raise AttentionError(
            f"{name} returned something else than the softmax attention of its queries, keys, values and mask: "
            f"up to {float((found - expected).abs()[wrong].max()):.2g} from it. Its entropies are not known here. "
            "Record with model.set_attn_implementation('sdpa') or 'eager'."
        )


def visible_logits(
    call: AttentionCall, rows: Tensor, mask: Tensor | Mask | None, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """[B, H, R, K or K + 1] logits, those of the sinks last, and [B, H, R] which rows may attend to anything."""
    dtype = torch.float64 if call.query.dtype == torch.float64 else torch.float32
    heads, keys = call.query.shape[1], call.key.shape[2]
    scale = call.query.shape[3] ** -0.5 if call.scaling is None else call.scaling
    logits = scale * call.query[:, :, rows].to(dtype) @ grouped(call.key, heads).to(dtype).mT
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    if is_causal:
        logits = logits.masked_fill(rows[:, None] < torch.arange(keys, device=rows.device), -torch.inf)
    elif mask is not None:
        mask = Mask.of(mask, call.query.shape[2], keys)
        for place, row in enumerate(rows.tolist()):
            shown, added = mask.block(EVERYTHING, slice(row, row + 1), EVERYTHING)
            line = logits[:, :, place : place + 1]
            line += 0.0 if added is None else added.to(dtype)
            line.masked_fill_(~shown, -torch.inf)
    alive = (logits > -torch.inf).any(-1) | logits.isnan().any(-1)
    if call.sinks is not None:
        sinks = call.sinks.view(-1, 1, 1) if call.sinks.dim() == 1 else call.sinks[:, :, rows]
        logits = torch.cat((logits, sinks.to(dtype).expand(*logits.shape[:-1], 1)), -1)
    return logits, alive


def grouped(x: Tensor, heads: int) -> Tensor:
    """[B, H, K, D] from [B, G, K, D]: every key/value head once for each of its query heads."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)
