"""Attentions of transformers whose softmax runs in pieces: over chunks of queries, over streams, or in several calls.

Axes of a softmax: b batch, h heads, s streams, c chunks of consecutive queries, q queries, k keys. Shapes: B batch, H
heads, C chunks, Q queries, K keys.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.fused import RowEntropies
from ..attention.visibility import seen
from .entropy import attention_entropy
from .own_attention import HIDDEN

Arguments = dict[str, Any]
GAP = 500.0  # nats; Reformer hides the own key with -1e5, and others with -1e9: a query without others sees itself


def by_keys(visible: Tensor, arguments: Arguments) -> Tensor:
    """Queries and keys are the same tokens; padding is a key that no query sees."""
    return visible.flatten(1, 3).any(1)


def by_rows(visible: Tensor, arguments: Arguments) -> Tensor:
    """Padding is a query that sees no key."""
    return visible.any(-1).any(1).flatten(1)


def by_own_key(visible: Tensor, arguments: Arguments) -> Tensor:
    """LongT5: a chunk sees the one before, itself and the one after; padding does not see itself."""
    length = visible.shape[3]
    return visible[..., length : 2 * length].diagonal(dim1=-2, dim2=-1).any(1).flatten(1)


def by_hidden_index(visible: Tensor, arguments: Arguments) -> Tensor:
    """Longformer says which tokens are padding."""
    return ~arguments["is_index_masked"]


def by_to_mask(visible: Tensor, arguments: Arguments) -> Tensor:
    """BigBird says with 1 and 0 which keys there are."""
    return arguments["to_mask"].flatten(1).bool()


def by_mask(visible: Tensor, arguments: Arguments) -> Tensor | None:
    """A mask [B, T], 1 and 0 or additive; without one all are tokens."""
    mask = arguments.get("attention_mask")
    if mask is None or not mask.is_floating_point():
        return None if mask is None else mask.bool()
    return seen(mask)


@dataclass(frozen=True)
class Pieces:
    """
    How a class computes its softmaxes.

    Args:
        axes: of each softmax in its order; the last holds for all that follow. `c` is left out where a short input is
            not cut.
        tokens: [B, Q] which queries are tokens, from what is visible [B, H, C, Q, K] and the arguments of `forward`.
        joined: whether the softmaxes hold consecutive queries of one attention, and not attentions of their own.
        hidden: a logit at or below is that of a hidden key; None where that is told by the largest of its row.
        finish: puts the rows in the order of the queries, from all rows, arguments, module and its output.
    """

    axes: tuple[str, ...]
    tokens: tuple[Callable[[Tensor, Arguments], Tensor | None], ...]
    joined: bool = False
    hidden: float | None = HIDDEN
    finish: Callable[[list[RowEntropies], Arguments, nn.Module, Any], list[RowEntropies]] | None = None

    @torch.no_grad()
    def rows(self, number: int, logits: Tensor, map_: Tensor, heads: int, arguments: Arguments) -> list[RowEntropies]:
        """Of one softmax, one for each stream."""
        axes = self.axes[min(number, len(self.axes) - 1)]
        tokens = self.tokens[min(number, len(self.tokens) - 1)]
        if logits.dim() == 3:  # batch and heads in one
            logits, map_ = (x.unflatten(0, (-1, heads)) for x in (logits, map_))
        if logits.dim() < len(axes):
            axes = axes.replace("c", "")
        assert logits.dim() == len(axes)
        assert logits.shape[axes.index("h")] == heads
        found = []
        for stream in range(logits.shape[axes.index("s")] if "s" in axes else 1):
            scores, weights = (in_order(x, axes, stream) for x in (logits, map_))  # B H C Q K
            floor = scores.amax(-1, keepdim=True) - GAP if self.hidden is None else self.hidden
            visible = ~(scores <= floor)  # NaN is not hidden
            support = visible.sum(-1).flatten(2)
            entropy = attention_entropy(weights).clamp_min(0.0).flatten(2).where(support > 0, 0.0)
            found.append(RowEntropies(entropy, support, None, tokens(visible, arguments)))
        return found

    def together(
        self, rows: list[RowEntropies], arguments: Arguments, module: nn.Module, output: Any
    ) -> list[RowEntropies]:
        """The calls that all softmaxes of one forward pass of `module` make up."""
        if self.joined:
            entropy, support = (torch.cat(parts, 2) for parts in zip(*(r[:2] for r in rows), strict=True))
            return [RowEntropies(entropy, support, None, rows[0].keys)]
        return self.finish(rows, arguments, module, output) if self.finish else rows


def in_order(x: Tensor, axes: str, stream: int) -> Tensor:
    """[B, H, C, Q, K] of a stream."""
    if "s" in axes:
        x, axes = x.select(axes.index("s"), stream), axes.replace("s", "")
    x = x.permute([axes.index(axis) for axis in "bhcqk" if axis in axes])
    return x if "c" in axes else x.unsqueeze(2)


def global_rows(rows: list[RowEntropies], arguments: Arguments, module: nn.Module, output: Any) -> list[RowEntropies]:
    """Longformer: tokens with global attention use the row of their second softmax, and not that of the first."""
    if len(rows) == 1:
        return rows
    window, whole = rows
    chosen = arguments["is_index_global_attn"]  # B T
    place = torch.arange(whole.entropy.shape[2], device=chosen.device) < chosen.sum(1, keepdim=True)

    def replaced(first: Tensor, second: Tensor) -> Tensor:
        first = first.transpose(1, 2).clone()
        first[chosen] = second.transpose(1, 2)[place]
        return first.transpose(1, 2)

    entropy, support = (replaced(*pair) for pair in zip(window[:2], whole[:2], strict=True))
    return [RowEntropies(entropy, support, None, window.keys)]


def hash_rounds(rows: list[RowEntropies], arguments: Arguments, module: Any, output: Any) -> list[RowEntropies]:
    """Reformer: queries stand in the order of their buckets, once for each round of hashes, which is a call."""
    buckets = output.buckets
    if buckets is None:
        return rows
    batch, heads, rounds, length = buckets.shape
    flat = buckets.reshape(batch, heads, rounds * length)
    _, place = module._get_sorted_bucket_idx_and_undo_sorted_bucket_idx(length, flat, rounds)
    entropy, support = (x.gather(2, place).unflatten(2, (rounds, length)) for x in rows[0][:2])
    calls = zip(entropy.unbind(2), support.unbind(2), strict=True)
    return [RowEntropies(*call, None, rows[0].keys) for call in calls]


LONGFORMER = Pieces(("bqhk", "bhqk"), (by_hidden_index, by_rows), finish=global_rows)
LONGT5 = Pieces(("bchqk",), (by_own_key,))
BIG_BIRD = Pieces(("bhqk", "bhqk", "bhcqk", "bhqk", "bhqk"), (by_to_mask,), joined=True)
CHUNKED = {
    "LongformerSelfAttention": LONGFORMER,
    "LEDEncoderSelfAttention": LONGFORMER,
    "LongT5LocalAttention": LONGT5,
    "LongT5TransientGlobalAttention": LONGT5,
    "BigBirdBlockSparseAttention": BIG_BIRD,
    "BigBirdPegasusBlockSparseAttention": BIG_BIRD,
    "PegasusXGlobalLocalAttention": Pieces(("bhqk", "bhcqk"), (by_rows, by_mask)),
    "HieraMaskUnitAttention": Pieces(("bhcqk",), (by_rows,)),
    "LiltSelfAttention": Pieces(("bhqk",), (by_keys,)),  # layout, then text
    "ProphetNetNgramSelfAttention": Pieces(("bhqk", "bshqk"), (by_keys,)),
    "LocalSelfAttention": Pieces(("bhcqk",), (by_mask,), hidden=None),
    "LSHSelfAttention": Pieces(("bhcqk",), (by_mask,), hidden=None, finish=hash_rounds),
}


def pieces_of(module: nn.Module) -> Pieces | None:
    """How a module of transformers cuts its softmax, if it does."""
    kind = type(module)
    return CHUNKED.get(kind.__name__) if kind.__module__.startswith("transformers.") else None
