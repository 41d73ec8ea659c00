"""`hf-lnfree explore`: load models and their tokenizers, and serve the page that shows what they do with a text."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ..errors import SettingsError
from ..loading import find_device, load_config, load_model, load_tokenizer
from ..pages.explorer import Explorer
from .entropy import display_names, headless_model

CAUSAL = ("ForCausalLM", "LMHeadModel")  # how classes of causal language models end


def explore_command(
    models: Sequence[str],
    host: str,
    port: int | None,
    browser: bool,
    device: str | None,
    access: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    """Serves the page until it is interrupted."""
    try:
        from ..pages.explorer_app import build_app, launch, wait
    except ImportError as error:
        raise SettingsError(f"This needs gradio: pip install 'hf_lnfree[app]' ({error}).") from error
    place = find_device(device)
    shown = zip(models, display_names(models), strict=True)
    app = build_app([load_explorer(name, display, place, access) for name, display in shown])
    say(f"{launch(app, host, port, browser)} (Ctrl-C ends it)")
    wait(app)


def load_explorer(name: str, shown: str, device: torch.device, access: dict[str, Any]) -> Explorer:
    """A causal language model with its head, any other model without one."""
    causal = is_causal(load_config(name, **access))
    options = {"device": device, **access}
    model = load_model(name, AutoModelForCausalLM, **options) if causal else headless_model(name, **options)
    return Explorer(shown, model, load_tokenizer(name, **access))


def is_causal(config: PreTrainedConfig) -> bool:
    """Whether a checkpoint says that it was saved from a causal language model."""
    return any(name.endswith(CAUSAL) for name in config.architectures or ())
