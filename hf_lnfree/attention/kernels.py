"""The kernels that solve one attention for its row entropies: flash on the CPU, efficient on CUDA, flex, plain blocks.

Each takes a `Problem` and returns entropy [B, H, Q], log-sum-exp of the logits [B, H, Q] and the output [B, H, Q, Dv].
Shapes are those of fused.py.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from ..errors import AttentionError
from .visibility import EVERYTHING, Mask

BACKENDS = ("auto", "cpu_flash", "cuda_efficient", "flex", "chunked")
BLOCK_BYTES = 2**20  # of one block of logits, on a CPU
WATCHED_BYTES = 2**22  # of one that more is done with than an attention needs: calls of many rows pay
MASK_BYTES = 2**22  # of a block of a mask
FEWEST_ROWS = 16  # of one block
LONG = 1024  # keys, above which the flash kernel of the CPU is faster than blocks, which are more exact
HIDDEN = -1e30  # a logit whose weight is 0, and 0 times it as well


class Problem(NamedTuple):
    """The inputs of a back end: heads expanded, dtype and scale settled, keys centred."""

    query: Tensor  # B H Q D
    key: Tensor  # B H K D
    value: Tensor | None  # B H K Dv
    mask: Mask | None
    is_causal: bool
    scale: float
    softcap: float | None
    mean_key: Tensor | None = None  # B H 1 D, what centring took off the keys

    @property
    def shift(self) -> Tensor:
        """[B, H, Q] what centring took off the logits of each row."""
        if self.mean_key is None:
            return self.query.new_zeros(self.query.shape[:3])
        return self.scale * (self.query * self.mean_key).sum(-1)


Solved = tuple[Tensor, Tensor, Tensor | None]


def _entropy(p: Problem, lse: Tensor, mean_key: Tensor) -> Tensor:
    return lse - p.scale * (p.query * mean_key).sum(-1)


def in_rows(solve: Callable[[Problem, Tensor | None], Solved], p: Problem, budget: int) -> Solved:
    """`solve` with the mask as kernels take it, 0 and -inf: for as many queries at a time as `budget` bytes hold."""
    if p.mask is None:
        return solve(p, None)
    batch, heads, queries, keys = p.mask.shape
    size = max(FEWEST_ROWS, budget // (batch * heads * keys * p.query.element_size()))
    parts = []
    for start in range(0, queries, size):
        rows = slice(start, start + size)
        visible, _ = p.mask.block(EVERYTHING, rows, EVERYTHING)
        query = p.query[:, :, rows]
        hidden = torch.zeros(batch, heads, query.shape[2], keys, dtype=query.dtype, device=query.device)
        parts.append(solve(p._replace(query=query), hidden.masked_fill_(~visible, -math.inf)))
    entropy, lse, output = zip(*parts, strict=True)
    return torch.cat(entropy, 2), torch.cat(lse, 2), None if output[0] is None else torch.cat(output, 2)


def _cpu_flash(p: Problem) -> Solved:
    return in_rows(_cpu_flash_rows, p, MASK_BYTES)


def _cpu_flash_rows(p: Problem, mask: Tensor | None) -> Solved:
    """Two calls of the CPU's flash kernel: its values must be as wide as its keys."""

    def attend(values: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            p.query, p.key, values, 0.0, p.is_causal, attn_mask=mask, scale=p.scale
        )

    mean_key, lse = attend(p.key)
    if p.value is None:
        return _entropy(p, lse, mean_key), lse, None
    width, value = p.key.shape[-1], p.value
    if value.shape[-1] == width:
        return _entropy(p, lse, mean_key), lse, attend(value)[0]
    pieces = [F.pad(v, (0, width - v.shape[-1])) for v in value.split(width, dim=-1)]
    output = torch.cat([attend(piece)[0] for piece in pieces], dim=-1)[..., : value.shape[-1]]
    return _entropy(p, lse, mean_key), lse, output


def _cuda_efficient(p: Problem) -> Solved:
    return in_rows(_cuda_efficient_rows, p, 64 * MASK_BYTES)


def _cuda_efficient_rows(p: Problem, mask: Tensor | None) -> Solved:
    """One call of the memory-efficient kernel with values [V | K]."""
    values = p.key if p.value is None else torch.cat((p.value, p.key), dim=-1)
    if mask is not None:
        mask = mask.expand(*p.query.shape[:3], p.key.shape[2])
    mixed, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        p.query, p.key, values, mask, True, 0.0, p.is_causal, scale=p.scale
    )
    return _split(p, mixed, lse[..., : p.query.shape[2]])  # the kernel pads lse


def _split(p: Problem, mixed: Tensor, lse: Tensor) -> Solved:
    """Entropy, lse and output out of a fused attention whose values were [V | K]."""
    return (
        _entropy(p, lse, mixed[..., -p.key.shape[-1] :]),
        lse,
        None if p.value is None else mixed[..., : p.value.shape[-1]],
    )


def _flex(p: Problem) -> Solved:
    """One call of flex attention with values [V | K], compiled on a GPU; on the CPU the uncompiled reference."""
    values = p.key if p.value is None else torch.cat((p.value, p.key), dim=-1)
    visible = None if p.mask is None else p.mask.whole()[0].expand(*p.query.shape[:3], p.key.shape[2])

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        if visible is not None:
            return torch.where(visible[batch, head, row, column], score, -math.inf)
        return torch.where(row >= column, score, -math.inf) if p.is_causal else score

    attend: Any = compiled_flex_attention() if p.query.is_cuda else flex_attention
    mixed, aux = attend(p.query, p.key, values, score_mod=score_mod, scale=p.scale, return_aux=AuxRequest(lse=True))
    return _split(p, mixed, aux.lse)


@functools.cache
def compiled_flex_attention() -> Callable:
    """Compiled at its first call, once a process."""
    return torch.compile(flex_attention)


class Watch(Protocol):
    """Sees every block that `chunked` makes, and leaves it as it is."""

    def before(self, items: slice, rows: slice, logits: Tensor) -> None:
        """The logits [B, H, Q, K], hidden ones at `HIDDEN`."""

    def after(self, items: slice, rows: slice, weights: Tensor, top: Tensor, total: Tensor) -> None:
        """exp(logit - top) [B, H, Q, K], and of each row the largest logit and the sum of these [B, H, Q]."""


def chunked(p: Problem, watch: Watch | None = None) -> Solved:
    """Blocks of queries with plain tensor operations: every option, every device, one pass over the keys."""
    entropy, lse = p.query.new_empty(2, *p.query.shape[:3])
    output = None if p.value is None else p.value.new_empty(*p.query.shape[:3], p.value.shape[-1])
    for items, rows, keys, logits in blocks(p, BLOCK_BYTES if watch is None else WATCHED_BYTES):
        if watch is not None:
            watch.before(items, rows, logits)
        top = logits.amax(-1, keepdim=True)
        logits -= top  # H = lse - E is the same for shifted logits, and small numbers cancel less
        weights = logits.exp()
        total = weights.sum(-1)
        if watch is not None:
            watch.after(items, rows, weights, top[..., 0], total)
        if output is not None and p.value is not None:
            output[items, :, rows] = (weights @ p.value[items, :, keys]) / total[..., None]
        log_total = total.log()
        entropy[items, :, rows] = log_total - weights.mul_(logits).sum(-1) / total
        lse[items, :, rows] = log_total + top[..., 0]
    return entropy, lse, output


def blocks(p: Problem, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """
    Logits of some batch items, consecutive queries and the keys they may reach; hidden keys at `HIDDEN`.

    A block is small enough to stay in the cache of a CPU, and on a GPU large enough to keep it busy.
    """
    (batch, heads, queries, _), keys = p.query.shape, p.key.shape[2]
    row = heads * keys * p.query.element_size()
    budget = block_bytes if p.query.device.type == "cpu" else 64 * BLOCK_BYTES
    count = min(batch, max(1, budget // (row * min(queries, FEWEST_ROWS))))
    size = max(min(queries, FEWEST_ROWS), budget // (row * count))
    for first in range(0, batch, count):
        items = slice(first, first + count)
        for start in range(0, queries, size):
            rows = slice(start, min(start + size, queries))
            seen = slice(0, min(rows.stop, keys) if p.is_causal else keys)
            logits = (p.scale * p.query[items, :, rows]) @ p.key[items, :, seen].mT
            if p.softcap is not None:
                logits = p.softcap * torch.tanh(logits / p.softcap)
            if p.mask is not None:
                visible, added = p.mask.block(items, rows, seen)
                logits += 0.0 if added is None else added
                logits.masked_fill_(~visible, HIDDEN)
            elif p.is_causal:
                diagonal = logits[..., rows.start :]
                later = torch.ones(diagonal.shape[-2:], dtype=torch.bool, device=logits.device).triu_(1)
                diagonal.masked_fill_(later, HIDDEN)
            yield items, rows, seen, logits


def choose(backend: str, p: Problem) -> Callable[[Problem], Solved]:
    """The back end of that name, or the best one that can solve the problem."""
    plain = (p.mask is None or not p.mask.adds) and p.softcap is None
    able = {
        "cpu_flash": plain and p.query.device.type == "cpu",
        "cuda_efficient": plain and p.query.device.type == "cuda" and p.query.dtype == torch.float32,
        "chunked": True,
        "flex": plain,  # after "chunked": "auto" never compiles, which takes longer than most analyses
    }
    if backend not in BACKENDS:
        raise AttentionError(f"backend={backend!r} is not known. Allowed: {', '.join(map(repr, BACKENDS))}.")
    if backend == "auto":
        short = p.query.device.type == "cpu" and p.key.shape[2] <= LONG
        backend = "chunked" if short else next(name for name, can in able.items() if can)
    if not able[backend]:
        raise AttentionError(
            f"backend={backend!r} cannot do this: it needs its own device, and neither a bias nor softcap. "
            "Use 'chunked' or 'auto'."
        )
    return {"cpu_flash": _cpu_flash, "cuda_efficient": _cuda_efficient, "flex": _flex, "chunked": chunked}[backend]
