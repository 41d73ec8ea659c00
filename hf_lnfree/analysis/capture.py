"""Record the attention entropies of a Transformers model while it runs, whatever attention it runs with.

Inside the context every attention function that the model looks up is wrapped: it does its work unchanged, so logits
are those of the implementation that was asked for, and the entropies come from its queries, keys and mask.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from .fused import RowEntropies, fused_attention_entropy


@dataclass
class AttentionRecord:
    """What was recorded, by the name of the attention module, in the order of the model's first call."""

    calls: dict[str, list[RowEntropies]] = field(default_factory=dict)
    """Every call of every module; `generate` calls each once a token."""

    @property
    def entropies(self) -> dict[str, Tensor]:
        """[B, H, Q] nats, the last call of each module."""
        return {name: calls[-1].entropy for name, calls in self.calls.items()}

    @property
    def support(self) -> dict[str, Tensor]:
        """[B or 1, H or 1, Q] number of keys each query may attend to, the last call of each module."""
        return {name: calls[-1].support for name, calls in self.calls.items()}


@contextmanager
def record_attention_entropy(model: nn.Module) -> Iterator[AttentionRecord]:
    """
    Record exact row entropies of every self- and cross-attention of `model`, under eager or sdpa attention.

    Works for the classes of transformers that look their attention up in `ALL_ATTENTION_FUNCTIONS`; not thread-safe.

    Example:
        >>> with record_attention_entropy(model) as record:
        ...     model(**batch)
        >>> record.entropies["transformer.h.0.attn"].mean((0, 2))

    Raises:
        ValueError: no attention of the model was recorded, or a mask that cannot be read (flash and flex attention).
    """
    names = weakref.WeakKeyDictionary({module: name for name, module in model.named_modules()})
    record = AttentionRecord()
    look_up = AttentionInterface.get_interface

    def get_interface(self: AttentionInterface, implementation: str, default: Callable) -> Callable:
        attend = look_up(self, implementation, default)

        def recording(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any
        ):
            result = attend(module, query, key, value, mask, *args, **kwargs)
            # Gradient checkpointing runs a layer again during the backward pass.
            if module in names and torch._C._current_graph_task_id() == -1:
                rows = row_entropies(module, query, key, mask, **kwargs)
                record.calls.setdefault(names[module], []).append(rows)
            return result

        return recording

    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign, assignment]
    try:
        yield record
    finally:
        AttentionInterface.get_interface = look_up  # type: ignore[method-assign]
    if not record.calls:
        raise ValueError(
            f"No attention of {type(model).__name__} was recorded: it was not called, it was compiled before, it has "
            "no attention, or its class does not use transformers' ALL_ATTENTION_FUNCTIONS."
        )


@torch.no_grad()
def row_entropies(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Any,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> RowEntropies:
    """The entropies of one attention call, from the arguments that transformers hands to an attention function."""
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 4):
        raise ValueError(
            f"{type(module).__name__} was given a mask of {type(mask).__name__} that only its kernel can read. "
            "Record with model.set_attn_implementation('sdpa') or 'eager'."
        )
    # As sdpa decides it: without a mask a decoder's prefill is causal.
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and mask is None and query.shape[2] > 1
    if mask is not None:
        mask = mask[..., : key.shape[2]]
    if position_bias is not None:
        mask, causal = with_bias(position_bias, mask, causal, query.shape[2], key.shape[2]), False
    return fused_attention_entropy(
        query, key, attention_mask=mask, is_causal=causal, scale=scaling, softcap=softcap, sinks=s_aux
    )


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
