"""What an attention call of transformers hides: every form of mask it hands to an attention function, as one tensor.

Shapes: B batch, H heads, Q queries, K keys.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask

from ..errors import AttentionError


def read_mask(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Any,
    *,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
    **other: Any,
) -> tuple[Tensor | None, bool]:
    """
    Args:
        module: the attention module of the call.
        query, key: [B, H, Q, D], [B, G, K, D].
        mask: what the host's mask function made: [B, 1, Q, K] bool or additive (eager, sdpa), [B, K] or None (flash),
            a `BlockMask` (flex).
        is_causal, sliding_window, position_bias: as the attention function takes them.

    Returns:
        A mask for `fused_attention_entropy`, bool or additive, and whether the call is causal without one.

    Raises:
        AttentionError: packed sequences, or a mask of a form not listed here.
    """
    queries, keys = query.shape[2], key.shape[2]
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if other.get("cu_seq_lens_q") is not None or other.get("cache") is not None:
        raise AttentionError(
            f"{type(module).__name__} was called with packed sequences, whose borders only a flash kernel reads. "
            "Record with one sequence a row and an attention_mask."
        )
    if isinstance(mask, BlockMask):
        batch, heads = mask.shape[:2]
        mask = create_mask(mask.mask_mod, batch, heads, queries, keys, device=query.device)
    if isinstance(mask, Tensor) and mask.dim() == 4:
        mask, causal = mask[..., :keys], False
    elif mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise AttentionError(
            f"{type(module).__name__} was given a mask that is not known here, {type(mask).__name__}"
            f"{list(getattr(mask, 'shape', []))}. Record with model.set_attn_implementation('sdpa') or 'eager'."
        )
    elif is_flash(module):
        mask, causal = flash_mask(mask, queries, keys, causal, sliding_window, query.device)
    else:
        if mask is not None:
            raise AttentionError(f"{type(module).__name__} was given a mask [batch, keys] outside flash attention.")
        causal = causal and queries > 1  # as sdpa decides it: without a mask a decoder's prefill is causal
    if position_bias is not None:
        mask, causal = with_bias(position_bias, mask, causal, queries, keys), False
    return mask, causal


def seen(mask: Tensor) -> Tensor:
    """What a mask lets be seen: a bool one says it, an additive one hides with entries near its dtype's minimum."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def is_flash(module: nn.Module) -> bool:
    return "flash" in str(getattr(getattr(module, "config", None), "_attn_implementation", ""))


def flash_mask(
    padding: Tensor | None, queries: int, keys: int, causal: bool, window: int | None, device: torch.device
) -> tuple[Tensor | None, bool]:
    """Flash attention lines queries up with the last keys; its window w shows the keys i-w+1..i (and i+w-1)."""
    if padding is None and (window is None or window >= keys) and (not causal or queries in (1, keys)):
        return None, causal and queries > 1
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    visible = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if causal:
        visible &= distance >= 0
    if window is not None:
        visible &= distance.abs() < window
    if padding is not None:
        visible = visible & padding[:, None, None, -keys:].bool()
    return visible.expand(1, 1, -1, -1) if visible.dim() == 2 else visible, False


def with_bias(bias: Tensor, mask: Tensor | None, causal: bool, queries: int, keys: int) -> Tensor:
    """An additive mask out of a position bias (T5) and what hides keys."""
    bias = bias[..., :keys]
    if causal:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=bias.device).tril()
    if mask is None:
        return bias
    if mask.dtype != torch.bool:
        return bias + mask
    return torch.where(mask, bias, torch.finfo(bias.dtype).min)
