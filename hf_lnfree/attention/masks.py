"""What an attention call hides: every form of mask that transformers hands to an attention function, as one `Mask`.

Shapes: B batch, H heads, Q queries, K keys.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from ..errors import AttentionError
from .calls import AttentionCall, parameters
from .check import check_output, is_known
from .visibility import Mask

READ = {"sliding_window", "position_bias", "position_ids"}
HARMLESS = {"dropout", "training", "deterministic", "output_attentions", "max_length_q", "max_length_k"}
PACKED = {"cu_seq_lens_q", "cu_seq_lens_k", "cache"}
SPARSE = {"indices"}  # which keys a sparse kernel reads; given only where the mask does not say so too


def logit_arguments(call: AttentionCall) -> dict[str, Any]:
    """
    What makes the logits of a call, as the functions of `fused` take it: query, key, attention_mask, is_causal, scale
    and softcap. Sinks are not among them.

    Raises:
        AttentionError: as `read_mask`, or a function that is not transformers' own returned something else than the
            softmax attention of these arguments.
    """
    mask, causal = read_mask(call)
    if not is_known(call.function):
        check_output(call, mask, causal)
    return {
        "query": call.query,
        "key": call.key,
        "attention_mask": mask,
        "is_causal": causal,
        "scale": call.scaling,
        "softcap": call.softcap,
    }


def read_mask(call: AttentionCall) -> tuple[Tensor | Mask | None, bool]:
    """
    The mask is what the host's mask function made: [B, 1, Q, K] bool or additive (eager, sdpa), [B, K] or None (flash),
    a `BlockMask` (flex).

    Returns:
        A mask for `fused_attention_entropy`, and whether the call is causal without one.

    Raises:
        AttentionError: packed sequences, a mask of a form not listed here, or an argument that is not known here and
            that may change what the attention function computes.
    """
    if call.module is None:
        return call.mask, bool(call.is_causal)
    refuse_unread(call)
    name = type(call.module).__name__
    mask: Tensor | Mask | None = call.mask
    queries, keys = call.query.shape[2], call.key.shape[2]
    flash = "flash" in (call.implementation or "")
    causal = bool(getattr(call.module, "is_causal", True) if call.is_causal is None else call.is_causal)
    if isinstance(mask, BlockMask):
        batch, heads = mask.shape[:2]
        mask = Mask((batch, heads, queries, keys), rule=mask.mask_mod, device=call.query.device)
        causal = False
    elif isinstance(mask, Tensor) and mask.dim() == 4:
        mask, causal = mask[..., :keys], False
    elif mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise AttentionError(
            f"{name} was given a mask that is not known here, {type(mask).__name__}"
            f"{list(getattr(mask, 'shape', []))}. Record with model.set_attn_implementation('sdpa') or 'eager'."
        )
    elif flash:
        assert mask is None or isinstance(mask, Tensor)
        mask, causal = flash_mask(mask, queries, keys, causal, call.options.get("sliding_window"), call.query.device)
    elif mask is not None:
        raise AttentionError(f"{name} was given a mask [batch, keys] outside flash attention.")
    else:
        # sdpa without a mask is causal in a decoder's prefill; eager and flex attention hide only what a mask hides.
        causal = causal and queries > 1 and call.implementation not in (None, "eager", "flex_attention")
    bias = call.options.get("position_bias")
    if bias is not None:
        mask, causal = with_bias(bias, mask, causal, queries, keys), False
    return mask, causal


def refuse_unread(call: AttentionCall) -> None:
    """Raises an AttentionError for an argument that may change probabilities and that nothing here reads."""
    given = {name for name, value in call.options.items() if value is not None and value is not False}
    name, position_ids = type(call.module).__name__, call.options.get("position_ids")
    if given & PACKED or ("flash" in (call.implementation or "") and call.mask is None and restarts(position_ids)):
        raise AttentionError(
            f"{name} was called with packed sequences, whose borders only a flash kernel reads. "
            "Record with one sequence a row and an attention_mask."
        )
    unknown = given - READ - HARMLESS
    # What a function does not name in its signature it only passes over.
    if unknown and (unread := unknown & (SPARSE | set(parameters(call.function)))):
        raise AttentionError(
            f"{name} hands {', '.join(sorted(unread))} to its attention function, which may change its probabilities "
            "and is not known here. Record with model.set_attn_implementation('sdpa') or 'eager'."
        )


def restarts(position_ids: Tensor | None) -> bool:
    """Whether the positions of a single row begin anew: flash attention takes it for several sequences."""
    if position_ids is None or position_ids.shape[0] != 1 or position_ids.dim() != 2:
        return False
    return bool((position_ids.diff() != 1).any())


def flash_mask(
    padding: Tensor | None, queries: int, keys: int, causal: bool, window: int | None, device: torch.device
) -> tuple[Mask | None, bool]:
    """Flash attention lines queries up with the last keys; its window w shows the keys i-w+1..i (and i+w-1)."""
    if padding is None and (window is None or window >= keys) and (not causal or queries in (1, keys)):
        return None, causal and queries > 1
    padding = None if padding is None else padding[:, -keys:]
    shape = (1 if padding is None else len(padding), 1, queries, keys)
    return Mask(shape, padding=padding, is_causal=causal, window=window, device=device), False


def with_bias(bias: Tensor, mask: Tensor | Mask | None, causal: bool, queries: int, keys: int) -> Mask:
    """A position bias (T5) together with what hides keys; a causal call of sdpa shows query i the keys 0..i."""
    tensors = (bias[..., :keys], mask) if isinstance(mask, Tensor) else (bias[..., :keys],)
    batch, heads = (max(tensor.shape[axis] for tensor in tensors) for axis in (0, 1))
    if isinstance(mask, Mask):
        return replace(mask, shape=(max(batch, mask.shape[0]), heads, queries, keys), tensors=tensors)
    rule = not_later if causal else None
    return Mask((batch, heads, queries, keys), tensors, rule=rule, device=bias.device)


def not_later(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The rule of causal attention, as flex attention writes it."""
    return query >= key
