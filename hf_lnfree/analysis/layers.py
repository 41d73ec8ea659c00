r"""What each layer does while a model runs: size of the residual stream, attention logits, sparsity of the activations.

Works on any decoder of transformers whose blocks stand in one ModuleList. Shapes: B batch, T tokens, D width, F hidden
units of the MLP.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..attention.calls import AttentionCall, attention_calls
from ..attention.fused import largest_logit
from ..attention.masks import logit_arguments
from ..errors import ModelError
from ..models.activations import LEARNED
from .parts import places


@dataclass
class LayerStatistics:
    r"""
    Over all batches that ran inside `record_layers`; one entry a layer, NaN for what a layer does not have.

    Args:
        places: what logs call the layers, see `parts.places`.
        residual_rms: $\sqrt{\mathrm{mean}(x^2)}$ of the residual stream after the block.
        largest_logit: of the attention, after scaling, over all heads, queries and visible keys.
        sparsity: share of the MLP's activations that are exactly 0.
        dead_units: share of the MLP's hidden units that are 0 at every token.
        nonfinite: how many entries of the residual stream after the block are NaN or infinite.
    """

    places: list[str] = field(default_factory=list)
    residual_rms: list[float] = field(default_factory=list)
    largest_logit: list[float] = field(default_factory=list)
    sparsity: list[float] = field(default_factory=list)
    dead_units: list[float] = field(default_factory=list)
    nonfinite: list[float] = field(default_factory=list)


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """
    The blocks of a model by name, first to last; those of an encoder before those of its decoder.

    Raises:
        ModelError: no ModuleList has as many entries as the configuration has layers.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        counts = [getattr(config, name, None) for name in ("encoder_layers", "num_layers", "num_hidden_layers")]
        deeper = [getattr(config, name, None) for name in ("decoder_layers", "num_decoder_layers", "num_hidden_layers")]
        return blocks_under(model, "encoder", counts) | blocks_under(model, "decoder", deeper)
    return blocks_under(model, "", [getattr(config, "num_hidden_layers", None)])


def blocks_under(model: nn.Module, side: str, counts: Sequence[int | None]) -> dict[str, nn.Module]:
    """The first list of as many blocks as one of the counts says, in the part of the model that is called `side`."""
    count = next((found for found in counts if found is not None), None)
    for name, module in model.named_modules():
        inside = not side or side in name.split(".")
        if inside and isinstance(module, nn.ModuleList) and len(module) == count:
            return {f"{name}.{index}": block for index, block in enumerate(module)}
    raise ModelError(f"{type(model).__name__} has no ModuleList of {count} blocks{f' in its {side}' if side else ''}.")


@functools.cache
def activation_classes() -> tuple[type[nn.Module], ...]:
    """The classes behind transformers' activation names, and ours; identities are no activation."""
    # What the mapping holds, a class or (class, arguments), and not what it makes of that when a name is looked up.
    entries = dict.values(ACT2FN)
    known = {entry[0] if isinstance(entry, tuple) else entry for entry in entries}
    return tuple({*known, *LEARNED} - {nn.Identity})


class _Layer:
    """The sums of one layer; nothing is read back from a GPU before `values`."""

    def __init__(self) -> None:
        self.squares: Tensor | float = math.nan
        self.zeros: Tensor | float = math.nan
        self.logit: Tensor | float = math.nan
        self.nonfinite: Tensor | float = math.nan
        self.never_active: Tensor | None = None  # F
        self.entries = self.activations = 0

    @torch.no_grad()
    def after_block(self, module: nn.Module, inputs: Any, output: Any) -> None:
        x = (output[0] if isinstance(output, tuple) else output).detach().float()  # B T D
        new = self.entries == 0
        squares, nonfinite = x.square().sum(), x.numel() - x.isfinite().sum()
        self.squares = squares if new else self.squares + squares
        self.nonfinite = nonfinite if new else self.nonfinite + nonfinite
        self.entries += x.numel()

    @torch.no_grad()
    def after_activation(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        zero = output.detach() == 0  # B T F
        silent = zero.flatten(0, -2).all(0)
        self.zeros = zero.sum() if self.never_active is None else self.zeros + zero.sum()
        self.never_active = silent if self.never_active is None else self.never_active & silent
        self.activations += zero.numel()

    def attention(self, logit: Tensor) -> None:
        self.logit = logit if isinstance(self.logit, float) else torch.maximum(self.logit, logit)

    def values(self) -> tuple[float, ...]:
        """In the order of the fields of `LayerStatistics`, after the places."""
        return (
            math.sqrt(float(self.squares) / max(1, self.entries)),
            float(self.logit),
            float(self.zeros) / max(1, self.activations),
            math.nan if self.never_active is None else float(self.never_active.float().mean()),
            float(self.nonfinite),
        )


@contextmanager
def record_layers(model: nn.Module) -> Iterator[LayerStatistics]:
    """
    The statistics of everything that `model` runs inside; they are filled in when the context ends.

    Raises:
        ModelError: the blocks of the model are not found.
    """
    names, blocks = zip(*decoder_blocks(model).items(), strict=True)
    layers = [_Layer() for _ in blocks]
    owner = {module: layer for layer, block in zip(layers, blocks, strict=True) for module in block.modules()}

    def after(call: AttentionCall) -> None:
        if call.module in owner:
            owner[call.module].attention(largest_logit(**logit_arguments(call)).amax())

    handles = []
    for layer, block in zip(layers, blocks, strict=True):
        handles.append(block.register_forward_hook(layer.after_block))
        activations = [m for m in block.modules() if isinstance(m, activation_classes())]
        handles += [module.register_forward_hook(layer.after_activation) for module in activations]
    statistics = LayerStatistics()
    try:
        with attention_calls(after):
            yield statistics
    finally:
        for handle in handles:
            handle.remove()
    statistics.places = places(names)
    columns = zip(*(layer.values() for layer in layers), strict=True)
    for name, column in zip(list(vars(statistics))[1:], columns, strict=True):
        setattr(statistics, name, list(column))
