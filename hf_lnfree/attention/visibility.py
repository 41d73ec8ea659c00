"""Which keys each query may attend to, and what is added to its logits, read in blocks much smaller than T x T.

Shapes: B batch, H heads, Q queries, K keys.
"""

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

GAP = 50.0  # nats between what a mask adds to keys that are seen and to hidden ones
BLOCK = 2**20  # entries of a block
EVERYTHING = slice(None)


@dataclass(eq=False)
class Mask:
    """
    What hides keys, each of which may be missing; a key is seen where all of them show it.

    Args:
        shape: B, H, Q and K; B and H are 1 where all items or heads have one mask.
        tensors: bool ones say what is seen; additive ones hide with entries near their dtype's minimum, see `seen`, and
            all others are added to the logits. Each broadcasts to [B, H, Q, K].
        padding: [B, K], 0 where a key is padding.
        is_causal: query i sees no key after i + K - Q: the last query stands at the last key.
        window: the number of keys that a query sees to either side, its own one included.
        rule: (batch, head, query, key) -> bool, as flex attention calls it.
    """

    shape: tuple[int, int, int, int]
    tensors: tuple[Tensor, ...] = ()
    padding: Tensor | None = None
    is_causal: bool = False
    window: int | None = None
    rule: Callable | None = None
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        self.tensors = tuple(tensor[(None,) * (4 - tensor.dim())] for tensor in self.tensors)
        self.floors = [None if tensor.dtype == torch.bool else floor(tensor) for tensor in self.tensors]
        self.adds = any(
            bool(torch.stack([(part.where(part > low, 0.0) != 0).any() for part in row_blocks(tensor)]).any())
            for tensor, low in zip(self.tensors, self.floors, strict=True)
            if low is not None
        )

    @classmethod
    def of(cls, mask: "Tensor | Mask", queries: int, keys: int) -> "Mask":
        """Of a tensor that broadcasts to [B, H, Q, K]."""
        if isinstance(mask, Mask):
            return mask
        batch, heads = (1, 1, *mask.shape[:-2])[-2:]
        return cls((batch, heads, queries, keys), (mask,), device=mask.device)

    def block(self, items: slice, rows: slice, keys: slice) -> tuple[Tensor, Tensor | None]:
        """Of some items, queries and keys: what is seen, and what is added; both broadcast to [B, H, Q, K]."""
        _, _, queries, total = self.shape
        first, last, _ = rows.indices(queries)
        start, stop, _ = keys.indices(total)
        visible = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        added = None
        for tensor, low in zip(self.tensors, self.floors, strict=True):
            part = part_of(tensor, items, slice(first, last), slice(start, stop))
            shown = part if low is None else part > low
            visible = visible & shown
            if low is not None and self.adds:
                part = part.where(shown, 0.0)
                added = part if added is None else added + part
        if self.padding is not None:
            visible = (
                visible & self.padding[items if len(self.padding) > 1 else EVERYTHING, None, None, start:stop] != 0
            )
        if self.is_causal or self.window is not None:
            ends = torch.arange(first, last, dtype=torch.int32, device=self.device) + total - queries
            distance = ends[:, None] - torch.arange(start, stop, dtype=torch.int32, device=self.device)
            visible = visible & (distance >= 0) if self.is_causal else visible
            visible = visible & (distance.abs() < self.window) if self.window is not None else visible
        if self.rule is not None:
            visible = visible & self._ruled(first, last)[items if self.shape[0] > 1 else EVERYTHING, ..., start:stop]
        return visible, added

    def _ruled(self, first: int, last: int) -> Tensor:
        batch, heads, _, keys = self.shape
        rule = self.rule
        assert rule is not None
        return create_mask(
            lambda b, h, query, key: rule(b, h, query + first, key), batch, heads, last - first, keys, str(self.device)
        )

    def of_head(self, head: int) -> "Mask":
        """What one head sees, as the mask of an attention of one head."""
        batch, heads, queries, keys = self.shape
        one = copy(self)
        one.shape = (batch, 1, queries, keys)
        one.tensors = tuple(t[:, head : head + 1] if t.shape[1] > 1 else t for t in self.tensors)
        rule = self.rule
        if rule is not None and heads > 1:
            one.rule = lambda b, h, query, key: rule(b, h + head, query, key)
        return one

    def whole(self) -> tuple[Tensor, Tensor | None]:
        """All of it, [B, H, Q, K]: for those who hold a map anyway."""
        visible, added = self.block(EVERYTHING, EVERYTHING, EVERYTHING)
        return visible.expand(self.shape), added

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Consecutive queries, and what they see, [B, H, rows, K]."""
        batch, heads, queries, keys = self.shape
        size = max(1, entries(self.device) // (batch * heads * keys))
        for start in range(0, queries, size):
            rows = slice(start, min(start + size, queries))
            yield rows, self.block(EVERYTHING, rows, EVERYTHING)[0].expand(batch, heads, rows.stop - start, keys)

    def counts(self) -> tuple[Tensor, Tensor]:
        """[B, H, Q] how many keys each query sees, and [B, K] which keys some query sees."""
        batch, heads, queries, keys = self.shape
        support = torch.empty(batch, heads, queries, dtype=torch.long, device=self.device)
        known = torch.zeros(batch, keys, dtype=torch.bool, device=self.device)
        for rows, visible in self.blocks():
            support[..., rows] = visible.sum(-1)
            known |= visible.flatten(1, 2).any(1)
        return support, known


def part_of(x: Tensor, items: slice, rows: slice, keys: slice) -> Tensor:
    """The block of a tensor that broadcasts to [B, H, Q, K]."""
    batch, _, queries, width = x.shape
    return x[
        items if batch > 1 else EVERYTHING,
        :,
        rows if queries > 1 else EVERYTHING,
        keys if width > 1 else EVERYTHING,
    ]


def entries(device: torch.device | str) -> int:
    """Of a block: on a GPU more, to keep it busy."""
    return BLOCK if torch.device(device).type == "cpu" else 64 * BLOCK


def row_blocks(x: Tensor) -> tuple[Tensor, ...]:
    """A tensor [.., Q, K] some queries at a time."""
    x = x.detach() if x.dim() > 1 else x.detach()[None]
    return x.split(max(1, entries(x.device) * x.shape[-2] // max(1, x.numel())), dim=-2)


def floor(mask: Tensor) -> float:
    """
    The entry of an additive mask at or below which a key is hidden: half the dtype's minimum.

    Swin hides with -100 on top of a bias: entries that far below all others hide too. ALiBi has no such gap.
    """
    lowest, tops, bottoms = torch.finfo(mask.dtype).min / 2, [], []
    for part in row_blocks(mask):
        visible = part > lowest
        low = visible & (part <= -GAP)
        tops.append(part.where(low, -torch.inf).amax())
        bottoms.append(part.where(visible & ~low, torch.inf).amin())
    top, bottom = torch.stack((torch.stack(tops).amax(), torch.stack(bottoms).amin())).tolist()
    return -GAP if top > lowest and bottom - top >= GAP else lowest


def seen(mask: Tensor) -> Tensor:
    """What a mask lets be seen: a bool one says it, an additive one hides with entries at or below its `floor`."""
    return mask if mask.dtype == torch.bool else mask > floor(mask)


def keys_seen(visible: Tensor, keys: int) -> Tensor:
    """[B or 1, K] which keys some query may attend to, from `visible`, which broadcasts to [B, H, Q, K]."""
    visible = visible[(None,) * (4 - visible.dim())]
    return visible.expand(*visible.shape[:3], keys).any(1).any(1)
