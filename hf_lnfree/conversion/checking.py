"""Whether a conversion kept what the model computes: logits before and after, on random tokens, images or sound."""

import copy
import os
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

CHECKED_TOKENS = (2, 16)
OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")
# Largest difference of a logit that counts as rounding, as a share of the largest logit (of 1 at least), by the coarser
# of the two dtypes. Rotary embeddings are computed in float32 at the most.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


def random_tokens(config: Any) -> torch.Tensor:
    """A small batch of random tokens [B, T], the same at every call."""
    generator = torch.Generator().manual_seed(0)
    most = [getattr(config, name, None) for name in ("max_position_embeddings", "max_target_positions")]
    length = min(CHECKED_TOKENS[1], *filter(None, most), CHECKED_TOKENS[1])
    return torch.randint(config.vocab_size, (CHECKED_TOKENS[0], length), generator=generator)


def random_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """
    The same as arguments of a model: random tokens, images [B, C, H, W] or sound [B, mel bands, frames]; where there is
    a decoder, also what that reads.
    """
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        side = config.image_size
        height, width = (side, side) if isinstance(side, int) else side
        images = torch.randn(CHECKED_TOKENS[0], config.num_channels, height, width, generator=generator)
        return {"pixel_values": images.to(model.dtype)}
    ids = random_tokens(config)
    decoded = {"decoder_input_ids": ids} if "decoder_input_ids" in signature(model.forward).parameters else {}
    if model.main_input_name == "input_features":
        sound = torch.randn(len(ids), config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
        return {"input_features": sound.to(model.dtype)} | decoded
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return {"input_ids": ids.flip(1)} | decoded
    if decoded:  # of T5, which reads a sequence where it ends: once
        end = config.eos_token_id
        ids = ids.where(ids != end, (end + 1) % config.vocab_size)
        ids[:, -1] = end
    # Without a token for padding such a head takes one sequence at a time.
    return {"input_ids": ids if config.pad_token_id is not None else ids[:1]}


def outputs(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a model of any head answers, as one list of numbers."""
    found = model(**inputs)
    return torch.cat([found[name].flatten() for name in OUTPUTS if found.get(name) is not None])


@torch.no_grad()
def difference(before: PreTrainedModel, after: PreTrainedModel, device: torch.device) -> dict[str, float]:
    """
    The largest difference of logits on random inputs, the size of the logits, and what is taken for rounding; of a
    model without a head its last hidden states are the logits.
    """
    wanted, found = (
        outputs(model.eval().to(device), {name: value.to(device) for name, value in random_inputs(model).items()})
        for model in (before, after)
    )
    return compared(wanted, found)


def compared(wanted: torch.Tensor, found: torch.Tensor) -> dict[str, float]:
    """The figures of `difference`; NaN in either makes the difference NaN."""
    largest = wanted.abs().max().item()
    share = max(TOLERANCE[logits.dtype] for logits in (wanted, found))
    return {
        "largest_difference": (wanted.double() - found.double()).abs().max().item(),
        "largest_logit": largest,
        "tolerance": share * max(1.0, largest),
    }


def failure(figures: dict[str, Any]) -> str | None:
    """Why a conversion may not be used, by the figures of `difference`; None if it may, or was not checked."""
    if "largest_difference" not in figures or figures["largest_difference"] <= figures["tolerance"]:
        return None
    if figures["largest_difference"] != figures["largest_difference"]:
        return "logits before or after are not finite"
    return (
        f"logits differ by up to {figures['largest_difference']:.2g} from those before, at logits up to "
        f"{figures['largest_logit']:.3g} (rounding: up to {figures['tolerance']:.1g})"
    )


@torch.no_grad()
def onnx_difference(model: PreTrainedModel, path: Path, with_cache: bool) -> dict[str, float]:
    """As `difference`, run by onnxruntime where that is there; in the dtype of the graph."""
    try:
        from onnxruntime import InferenceSession
    except ImportError:
        return {}
    half = model.dtype in (torch.float16, torch.bfloat16)  # exported as float32
    model, ids = copy.deepcopy(model).eval(), random_tokens(model.config)
    model = model.float() if half else model
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    feed = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
    session = InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    if with_cache:
        heads = model.config.num_attention_heads
        empty = torch.zeros(len(ids), heads, 0, model.config.hidden_size // heads, dtype=model.dtype)
        feed |= {given.name: empty for given in session.get_inputs() if given.name.startswith("past")}
    (logits,) = session.run(["logits"], {name: value.numpy() for name, value in feed.items()})
    return compared(model(ids).logits, torch.from_numpy(logits))
