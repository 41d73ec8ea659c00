"""`hf-lnfree attribute`: a model and a prompt into a direct logit attribution."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..analysis.linearity import Attribution, attribute
from ..conversion import Checkpoint, load
from ..errors import SettingsError
from ..pages.attribution import write_attribution

DTYPES = {"float64": torch.float64, "float32": torch.float32}


def attribute_command(
    model: str, prompt: str, target: str | None, top: int, out: Path | None, dtype: str
) -> tuple[Attribution, str]:
    """The attribution of the token after the prompt, and that token as text."""
    if dtype not in DTYPES:
        raise SettingsError(f"--dtype {dtype!r} is not known. Allowed: {', '.join(DTYPES)}.")
    loaded, _ = load(Checkpoint(model))
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if not ids.numel():
        raise SettingsError("The prompt holds no token.")
    if ids.shape[1] > loaded.config.max_position_embeddings:
        raise SettingsError(
            f"The prompt has {ids.shape[1]} tokens; {model} takes {loaded.config.max_position_embeddings}."
        )
    wanted = None if target is None else torch.full_like(ids, one_token(tokenizer, target))
    loaded.to(DTYPES[dtype])  # type: ignore[arg-type, call-arg]
    found = attribute(loaded, ids, wanted)
    text = str(tokenizer.decode(found.targets[0, -1:]))
    if out is not None:
        write_attribution(out, found, model, prompt, text, top)
    return found, text


def one_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        parts = ", ".join(repr(tokenizer.decode([token])) for token in ids)
        raise SettingsError(f"--target must be one token of the model; {text!r} is {len(ids)}: {parts}.")
    return ids[0]
