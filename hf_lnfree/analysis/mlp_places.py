"""Which token every row of an MLP belongs to, and which rows are padding, from what the model was called with.

Shapes: B sequences, T tokens of each, N = B T rows.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ModelError

OWN_INPUT = re.compile("vision|visual|image|audio|patch", re.IGNORECASE)  # towers beside a text, with rows of their own
IDS = ("input_ids", "inputs_embeds", "input_values", "input_features")


class Places(NamedTuple):
    """
    Args:
        kept: [N] bool, which rows are tokens and not padding.
        length: T; row n is token n % T of sequence n // T.
    """

    kept: Tensor
    length: int


def places_of(name: str, shape: tuple[int, ...], arguments: Mapping[str, Any], decoder: bool) -> Places:
    """
    Args:
        name: of the module.
        shape: of its rows, without their width.
        arguments: what the model was called with, by name.
        decoder: whether it belongs to a decoder beside an encoder.

    Raises:
        ModelError: rows that do not fit the batch, or the mask.
    """
    prefix = "decoder_" if decoder else ""
    ids = next((x for key in IDS if (x := arguments.get(prefix + key)) is not None), None)
    mask = arguments.get(f"{prefix}attention_mask")
    mask = mask if isinstance(mask, Tensor) else None
    if ids is None and decoder and (targets := arguments.get("labels")) is not None:
        ids = targets  # the model shifts them by itself
    batch = next((tuple(x.shape[:2]) for x in (ids, mask) if x is not None and x.dim() > 1), None)
    if len(shape) == 1:  # B T in one
        if batch is None or shape[0] != math.prod(batch):
            raise ModelError(
                f"{name} sees {shape[0]} rows, and the batch has {'no' if batch is None else math.prod(batch)} tokens: "
                "which row belongs to which token cannot be told. Record the other parts of the model alone."
            )
        shape = batch
    sequences, length = shape[0], math.prod(shape[1:])
    everything = torch.ones(sequences * length, dtype=torch.bool, device=mask.device if mask is not None else None)
    if mask is None or (mask.dim() == 2 and bool(mask.bool().all())) or OWN_INPUT.search(name):
        return Places(everything, length)
    if mask.dim() == 2 and len(mask) == sequences:
        behind_a_cache = batch is not None and batch[1] == length < mask.shape[1]
        if mask.shape[1] == length or behind_a_cache:
            return Places(mask[:, -length:].bool().flatten(), length)
    raise ModelError(
        f"Padding of {name} cannot be told: attention_mask is {tuple(mask.shape)}, its rows are {sequences} x {length}."
        " Give a mask [batch, tokens] of 0 and 1, or batches without padding."
    )
