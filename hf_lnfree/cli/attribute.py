"""`hf-lnfree attribute`: a model and a prompt into a direct logit attribution."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..analysis.linearity import Attribution, attribute
from ..choices import Precision
from ..conversion import Checkpoint, load
from ..errors import SettingsError
from ..files import require_own
from ..loading import find_device, load_tokenizer
from ..pages.attribution import write_attribution


def attribute_command(
    model: str,
    prompt: str,
    target: str | None,
    top: int,
    out: Path | None,
    dtype: Precision,
    device: str | None,
    access: dict[str, Any],
) -> tuple[Attribution, str]:
    """The attribution of the token after the prompt, and that token as text."""
    if out is not None:
        require_own(out, "attribution", ["attribution.json"])
    place = find_device(device)
    loaded, _ = load(Checkpoint(model, access["revision"]))
    tokenizer = load_tokenizer(model, **access)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(place)
    if not ids.numel():
        raise SettingsError("The prompt holds no token.")
    if ids.shape[1] > loaded.config.max_position_embeddings:
        raise SettingsError(
            f"The prompt has {ids.shape[1]} tokens; {model} takes {loaded.config.max_position_embeddings}."
        )
    wanted = None if target is None else torch.full_like(ids, one_token(tokenizer, target))
    loaded.to(device=place, dtype=getattr(torch, dtype))  # type: ignore[call-arg]
    found = attribute(loaded, ids, wanted)
    text = str(tokenizer.decode(found.targets[0, -1:]))
    if out is not None:
        write_attribution(out, found, model, prompt, text, top)
    return found, text


def one_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """The id of a text that is one token; SettingsError for any other."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        parts = ", ".join(repr(tokenizer.decode([token])) for token in ids)
        raise SettingsError(f"--target must be one token of the model; {text!r} is {len(ids)}: {parts}.")
    return ids[0]
