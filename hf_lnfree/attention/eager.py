"""Eager attention, the only one that makes maps: and models that can be switched to it."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from ..errors import AttentionError


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Eager attention inside, what was there before outside, also after an exception."""
    if not isinstance(model, PreTrainedModel):
        raise AttentionError(f"method='attentions' needs a model of transformers, got {type(model).__name__}.")
    before = model.config._attn_implementation
    if before == "eager":
        yield
        return
    if not switchable(model):
        raise AttentionError(
            f"{type(model).__name__} cannot be switched to eager attention after it was loaded. Load it with "
            "from_pretrained(..., attn_implementation='eager'), or use method='auto'."
        )
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        model.set_attn_implementation(before)


def switchable(model: nn.Module) -> bool:
    """Whether the class looks its attention up, so that another one can be set."""
    return isinstance(model, PreTrainedModel) and model._can_set_attn_implementation()
