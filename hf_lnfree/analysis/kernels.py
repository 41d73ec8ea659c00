"""The kernels that solve one attention for its row entropies: flash on the CPU, efficient on CUDA, flex, plain blocks.

Each takes a `Problem` and returns entropy [B, H, Q], log-sum-exp of the logits [B, H, Q] and the output [B, H, Q, Dv].
Shapes are those of fused.py.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

BACKENDS = ("auto", "cpu_flash", "cuda_efficient", "flex", "chunked")
BLOCK_BYTES = 2**25  # of one block of logits


class Problem(NamedTuple):
    """The inputs of a back end: heads expanded, dtype and scale settled, keys centred."""

    query: Tensor  # B H Q D
    key: Tensor  # B H K D
    value: Tensor | None  # B H K Dv
    visible: Tensor | None  # bool, broadcasts to B H Q K
    bias: Tensor | None  # broadcasts to B H Q K, finite
    is_causal: bool
    scale: float
    softcap: float | None


Solved = tuple[Tensor, Tensor, Tensor | None]


def _entropy(p: Problem, lse: Tensor, mean_key: Tensor) -> Tensor:
    return lse - p.scale * (p.query * mean_key).sum(-1)


def _hidden(p: Problem) -> Tensor | None:
    """The mask as the kernels take it: 0 and -inf in the dtype of the query."""
    if p.visible is None:
        return None
    return torch.zeros_like(p.visible, dtype=p.query.dtype).masked_fill_(~p.visible, -math.inf)


def _cpu_flash(p: Problem) -> Solved:
    """Two calls of the CPU's flash kernel: its values must be as wide as its keys."""
    mask = _hidden(p)

    def attend(values: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            p.query, p.key, values, 0.0, p.is_causal, attn_mask=mask, scale=p.scale
        )

    mean_key, lse = attend(p.key)
    if p.value is None:
        return _entropy(p, lse, mean_key), lse, None
    width, value = p.key.shape[-1], p.value
    pieces = [F.pad(v, (0, width - v.shape[-1])) for v in value.split(width, dim=-1)]
    output = torch.cat([attend(piece)[0] for piece in pieces], dim=-1)[..., : value.shape[-1]]
    return _entropy(p, lse, mean_key), lse, output


def _cuda_efficient(p: Problem) -> Solved:
    """One call of the memory-efficient kernel with values [V | K]."""
    values = p.key if p.value is None else torch.cat((p.value, p.key), dim=-1)
    mask = _hidden(p)
    if mask is not None:
        mask = mask.expand(*p.query.shape[:3], p.key.shape[2])
    mixed, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        p.query, p.key, values, mask, True, 0.0, p.is_causal, scale=p.scale
    )
    return _split(p, mixed, lse[..., : p.query.shape[2]])  # the kernel pads lse


def _split(p: Problem, mixed: Tensor, lse: Tensor) -> Solved:
    """Of the means of [V | K]."""
    return (
        _entropy(p, lse, mixed[..., -p.key.shape[-1] :]),
        lse,
        None if p.value is None else mixed[..., : p.value.shape[-1]],
    )


def _flex(p: Problem) -> Solved:
    """One call of flex attention with values [V | K], compiled on a GPU; on the CPU the uncompiled reference."""
    values = p.key if p.value is None else torch.cat((p.value, p.key), dim=-1)
    visible = None if p.visible is None else p.visible.expand(*p.query.shape[:3], p.key.shape[2])

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        if visible is not None:
            return torch.where(visible[batch, head, row, column], score, -math.inf)
        return torch.where(row >= column, score, -math.inf) if p.is_causal else score

    attend: Any = compiled_flex_attention() if p.query.is_cuda else flex_attention
    mixed, aux = attend(p.query, p.key, values, score_mod=score_mod, scale=p.scale, return_aux=AuxRequest(lse=True))
    return _split(p, mixed, aux.lse)


@functools.cache
def compiled_flex_attention() -> Callable:
    return torch.compile(flex_attention)


def _chunked(p: Problem) -> Solved:
    """Blocks of queries with plain tensor operations: every option, every device."""
    parts: list[tuple[Tensor, Tensor, Tensor | None]] = []
    for _, logits in blocks(p):
        top = logits.amax(-1, keepdim=True)
        logits = logits - top  # H = lse - E is the same for shifted logits, and small numbers cancel less
        lse = logits.logsumexp(-1)
        probability = logits.softmax(-1)
        entropy = lse - (probability * logits.where(logits != -math.inf, 0.0)).sum(-1)
        parts.append((entropy, lse + top[..., 0], None if p.value is None else probability @ p.value))
    entropy, lse = (torch.cat([part[i] for part in parts], dim=2) for i in (0, 1))  # type: ignore[misc]
    output = None if p.value is None else torch.cat([part[2] for part in parts], dim=2)  # type: ignore[misc]
    return entropy, lse, output


def blocks(p: Problem) -> Iterator[tuple[slice, Tensor]]:
    """Logits [B, H, block, K] of consecutive blocks of queries, hidden keys at -inf."""
    queries, keys = p.query.shape[2], p.key.shape[2]
    row_bytes = p.query.shape[0] * p.query.shape[1] * keys * p.query.element_size()
    size = max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, queries, size):
        rows = slice(start, min(start + size, queries))
        logits = p.scale * (p.query[:, :, rows] @ p.key.mT)
        if p.softcap is not None:
            logits = p.softcap * torch.tanh(logits / p.softcap)
        if p.bias is not None:
            logits = logits + _rows(p.bias, rows)
        if p.visible is not None:
            logits = logits.masked_fill(~_rows(p.visible, rows), -math.inf)
        elif p.is_causal:
            position = torch.arange(rows.start, rows.stop, device=logits.device)
            logits = logits.masked_fill(torch.arange(keys, device=logits.device) > position[:, None], -math.inf)
        yield rows, logits


def _rows(x: Tensor, rows: slice) -> Tensor:
    return x if x.dim() < 2 or x.shape[-2] == 1 else x[..., rows, :]


def choose(backend: str, p: Problem) -> Callable[[Problem], Solved]:
    plain = p.bias is None and p.softcap is None
    able = {
        "cpu_flash": plain and p.query.device.type == "cpu",
        "cuda_efficient": plain and p.query.device.type == "cuda" and p.query.dtype == torch.float32,
        "chunked": True,
        "flex": plain,  # after "chunked": "auto" never compiles, which takes longer than most analyses
    }
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not known. Allowed: {', '.join(map(repr, BACKENDS))}.")
    if backend == "auto":
        backend = next(name for name, can in able.items() if can)
    if not able[backend]:
        raise ValueError(
            f"backend={backend!r} cannot do this: it needs its own device, and neither a bias nor softcap. "
            "Use 'chunked' or 'auto'."
        )
    return {"cpu_flash": _cpu_flash, "cuda_efficient": _cuda_efficient, "flex": _flex, "chunked": _chunked}[backend]
