r"""Attention logits kept within $\pm c$: $c \tanh(s / c)$ before mask and softmax (Gemma 2, arXiv 2408.00118).

Flash and flex attention of transformers take `softcap` as an argument, sdpa cannot, and the eager functions of GPT-2
and GPT-NeoX pass over it. So an attention here hands `softcap` on, and has an eager function that knows it.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig


def eager_softcap_attention(
    module: nn.Module,
    query: Tensor,  # B H Q d
    key: Tensor,  # B H/shared K d
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,  # 1 H Q K
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """
    What the eager functions of the stock families do, with a cap; returns B Q H d, and the map B H Q K.

    The position bias of T5 is added to what is capped, as flex attention does it.
    """
    shared = query.shape[1] // key.shape[1]  # queries of so many heads share a key
    key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    logits = softcap * torch.tanh(query @ key.transpose(-1, -2) * (scaling / softcap))
    if position_bias is not None:
        logits = logits + position_bias
    if attention_mask is not None:
        logits = logits + attention_mask
    weights = nn.functional.softmax(logits, dim=-1).to(value.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


EAGER = "eager_softcap"
AttentionInterface.register(EAGER, eager_softcap_attention)


class SoftcapConfig:
    """The configuration of a model as its attentions see it: "eager" is the function above."""

    def __init__(self, config: PreTrainedConfig):
        self.seen = config

    @property
    def _attn_implementation(self) -> str:
        implementation = self.seen._attn_implementation
        return EAGER if implementation == "eager" else implementation

    def __getattr__(self, name: str) -> Any:
        if name == "seen":  # while being copied or unpickled
            raise AttributeError(name)
        return getattr(self.seen, name)


def cap_logits(attention: nn.Module, softcap: float) -> None:
    """Make an attention of a stock family one with a cap, in place."""
    capped = SoftcapConfig(cast(PreTrainedConfig, attention.config))
    attention.config, attention.softcap = capped, softcap  # type: ignore[assignment]  # settings, no children
    attention.register_forward_pre_hook(hand_on, with_kwargs=True)


def hand_on(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A forward pre-hook: the cap becomes an argument of the attention."""
    return args, kwargs | {"softcap": attention.softcap}
