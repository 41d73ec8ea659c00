r"""What the rows of an attention are like besides their entropy, from the same blocks of logits.

Shapes: B batch, H heads, Q queries, K keys, Dv head dimension of the values.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import HIDDEN, Problem

TOP_KEYS = 8  # of largest weight, whose mass is taken
MOST_SEARCHED = 256  # queries of a sequence
GROUPS = 128  # of keys, at most, among which the largest are searched at a time: more, and sorting takes much longer


class RowStatistics(NamedTuple):
    """
    Of every attention row, [B, H, Q] each; NaN where a query may attend to nothing. The mass of the largest keys, which
    must be looked for, is of every n-th query alone, [B, H, Q / n]: see `top_stride`.
    """

    largest_logit: Tensor
    """The largest logit, after scale, cap and bias."""
    logit_variance: Tensor
    """Variance of the logits of the keys that the query may attend to."""
    sink_mass: Tensor
    """Attention to the first key that any query of the sequence may attend to (arXiv 2410.10781, section 3)."""
    top_mass: Tensor
    """Attention to the 8 keys that get most of it, of queries 0, n, 2 n ..."""
    output_norm: Tensor
    """Euclidean norm of the output of the head [Dv], before the output projection."""


class RowWatch:
    """
    Fills in everything but the norm of the output, block by block.

    Args:
        p: what is solved.
        support: [B or 1, H or 1, Q] number of keys each query may attend to.
        keys: [B or 1, K] bool, the keys that some query may attend to.
    """

    def __init__(self, p: Problem, support: Tensor, keys: Tensor):
        shape = p.query.shape[:3]
        self.support = support.expand(shape)
        self.first = keys.int().argmax(-1).expand(shape[0])
        self.values = p.query.new_empty(3, *shape)
        self.stride = top_stride(shape[2])
        self.top = p.query.new_empty(*shape[:2], -(-shape[2] // self.stride))

    def before(self, items: slice, rows: slice, logits: Tensor) -> None:
        count = self.support[items, :, rows]
        mean = visible(logits).sum(-1) / count
        deviation = torch.linalg.vector_norm(visible(logits - mean[..., None], inplace=True), dim=-1)
        self.values[1, items, :, rows] = deviation.square() / count

    def after(self, items: slice, rows: slice, weights: Tensor, top: Tensor, total: Tensor) -> None:
        first = self.first[items].clamp_max(weights.shape[-1] - 1)
        index = first[:, None, None, None].expand(*weights.shape[:3], 1)
        self.values[0, items, :, rows] = top
        self.values[2, items, :, rows] = weights.gather(-1, index)[..., 0] / total
        skipped = -rows.start % self.stride
        chosen = slice(-(-rows.start // self.stride), -(-rows.stop // self.stride))
        if chosen.start < chosen.stop:
            sampled = (x[:, :, skipped :: self.stride] for x in (weights, total))
            self.top[items, :, chosen] = top_sum(next(sampled), TOP_KEYS) / next(sampled)

    def statistics(self, shift: Tensor, kept: Tensor | None, output: Tensor | None) -> RowStatistics:
        """
        Args:
            shift: [B, H, Q] what the logits lack.
            kept: [B, H, Q] share of the attention that learned sinks leave to keys; None where there are none.
            output: [B, H, Q, Dv] of the attention, if it is known.
        """
        largest, variance, sink = self.values.masked_fill_(self.support == 0, math.nan)
        top = self.top.masked_fill_(self.support[..., :: self.stride] == 0, math.nan)
        if kept is not None:
            sink, top = sink * kept, top * kept[..., :: self.stride]
        norm = torch.full_like(sink, math.nan) if output is None else output_norm(output, self.support)
        return RowStatistics(largest + shift, variance, sink, top, norm)


def top_stride(queries: int) -> int:
    """n: of so many queries every n-th is searched for its largest keys, at most 256 of them."""
    return max(1, -(-queries // MOST_SEARCHED))


def visible(logits: Tensor, inplace: bool = False) -> Tensor:
    """Logits with 0 where they are hidden; NaN stays. Much faster than a mask."""
    return F.threshold(logits, HIDDEN / 2, 0.0, inplace)


def output_norm(output: Tensor, support: Tensor) -> Tensor:
    """[B, H, Q] norm of outputs [B, H, Q, Dv]; NaN where the query may attend to nothing."""
    dtype = torch.float64 if output.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(output, dim=-1, dtype=dtype).masked_fill_(support == 0, math.nan)


def top_sum(values: Tensor, count: int) -> Tensor:
    """
    [...] sum of the `count` largest of values [..., K], exactly.

    They stand in the `count` groups with the largest maxima, so that only these must be searched, group by group again
    where they are long. Keys i, i + G, i + 2G ... are one of G groups.
    """
    while (size := values.shape[-1]) > GROUPS:
        length = -(-size // GROUPS)
        groups = size // length
        rest = values[..., groups * length :]
        grouped = values[..., : groups * length].unflatten(-1, (length, groups))
        best = grouped.amax(-2).topk(count, sorted=False).indices
        best = best[..., None, :].expand(*best.shape[:-1], length, count)
        values = torch.cat((grouped.gather(-1, best).flatten(-2), rest), -1)
    return values.topk(min(count, size), sorted=False).values.sum(-1)
