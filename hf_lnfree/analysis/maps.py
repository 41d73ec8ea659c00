"""Row entropies of attention maps [B, H, Q, K], where a module offers nothing else."""

from typing import Any

import torch
from torch import Tensor

from ..attention.fused import RowEntropies
from ..attention.visibility import keys_seen, seen
from .entropy import attention_entropy


def map_in(output: Any, heads: int | None) -> Tensor | None:
    """The [B, H, Q, K] map in what a module returned, known by its `heads` and by rows that add up to 1."""
    if type(output) not in (tuple, list):
        return None
    for item in output[1:]:
        is_map = isinstance(item, Tensor) and item.dim() == 4 and item.is_floating_point()
        if is_map and heads in (None, item.shape[1]) and adds_up_to_one(item):
            return item
    return None


def visible_keys(mask: Any, map_: Tensor) -> Tensor | None:
    """The mask of a module that uses its own attention. A bool one may say what is seen or (MPT) what is hidden."""
    if not (isinstance(mask, Tensor) and mask.dim() == 4):
        return None
    if mask.dtype == torch.bool and map_.detach().masked_fill(~mask, 0.0).sum() < map_.detach().sum() / 2:
        return ~mask
    return mask


@torch.no_grad()
def entropies_of_map(map_: Tensor, mask: Tensor | None) -> RowEntropies:
    """Of a map [B, H, Q, K]: a key counts as visible where the mask shows it and some head gives it any weight."""
    visible = (map_ != 0).any(1, keepdim=True)  # NaN is not 0
    if mask is not None:
        visible = visible & seen(mask)
    support = visible.sum(-1)
    entropy = attention_entropy(map_).clamp_min(0.0).where(support > 0, 0.0)
    return RowEntropies(entropy, support, None, keys_seen(visible, map_.shape[-1]))


def adds_up_to_one(map_: Tensor) -> bool:
    """Whether every finite row of a map does; a row of a diverged head is NaN, and a hidden one may be."""
    sums = map_.sum(-1, dtype=torch.float32)
    return bool(((sums - 1).abs() < 0.02).logical_or(sums.isnan()).all())
