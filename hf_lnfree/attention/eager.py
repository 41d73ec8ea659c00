"""Eager attention, the only one that makes maps: and models that can be switched to it."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import AttentionError


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Eager attention inside, what was there before outside, also after an exception."""
    if not isinstance(model, PreTrainedModel):
        raise AttentionError(f"method='attentions' needs a model of transformers, got {type(model).__name__}.")
    before = implementations(model)
    if all(implementation == "eager" for _, implementation in before):
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
        for config, implementation in before:  # setting one sets what is nested in it, which comes later
            config._attn_implementation = implementation


def implementations(model: PreTrainedModel) -> list[tuple[PreTrainedConfig, str | None]]:
    """The configurations of a model and of the models in it, outermost first, and the attention that each names."""
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    for config in configs:
        nested = [getattr(config, name, None) for name in config.sub_configs]
        configs += [sub for sub in nested if sub is not None and not any(sub is known for known in configs)]
    return [(config, config._attn_implementation) for config in configs]


def switchable(model: nn.Module) -> bool:
    """Whether the class looks its attention up, so that another one can be set."""
    return isinstance(model, PreTrainedModel) and model._can_set_attn_implementation()
