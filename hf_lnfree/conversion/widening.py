r"""A norm-free model whose residual stream has no mean, at the price of one dimension a head.

A stock LayerNorm always centres. A model that was trained without norms reads the mean of its stream, so the stream
gets a coordinate that holds $-\sum_i x_i$: its mean is zero then, centring does nothing, and no projection reads the
new coordinate. Width is a multiple of the number of heads, hence one dimension more for each of them; those stay zero.
"""

import copy
import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import ModelError
from ..models.sites import AttentionBranch, Projection
from .families import blank, placed, stack_of
from .norm_sites import as_linear, norm_sites


@torch.no_grad()
def without_mean(model: PreTrainedModel) -> PreTrainedModel:
    """
    A model with equal logits, `num_attention_heads` wider, whose residual stream has mean zero.

    Args:
        model: of this package, without norms.

    Raises:
        ModelError: it has cross-attention, whose keys are read from another stream; or it is none that reads tokens
            with one projection for queries, keys and values.
    """
    if not stack_of(model).attention.fused:
        raise ModelError(
            f"A {type(model).__name__} that was trained without norms cannot be made one with a centred stream."
        )
    if getattr(model.config, "add_cross_attention", False):
        raise ModelError(
            "A model with cross-attention that was trained without norms cannot be made one with a centred stream."
        )
    new = blank(type(model), wider_config(model.config), model.dtype)
    Widening(model, new).run()
    slopes = {name: value for name, value in model.state_dict().items() if name.endswith("negative_slope")}
    new.load_state_dict(slopes, strict=False)
    if model.can_generate():
        new.generation_config = copy.deepcopy(model.generation_config)
    return placed(new, model.device).train(model.training)


def wider_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration with one dimension more for each head; rotary embeddings keep their size."""
    width, heads = config.hidden_size, config.num_attention_heads
    size = width // heads
    config = copy.deepcopy(config)
    config.hidden_size = width + heads
    config.tie_word_embeddings = False  # the embedding has sums, the head zeros
    config.linear_bias = "all"  # the others hold sums now
    if hasattr(config, "n_inner"):
        # Many readers take an inner width of four times the width for granted: new units are zero and read by nothing.
        config.n_inner = None if config.n_inner in (None, 4 * width) else config.n_inner
    if getattr(config, "rope_parameters", None):
        rotated = int(size * config.rope_parameters.get("partial_rotary_factor", 1.0))
        config.rope_parameters["partial_rotary_factor"] = (rotated + 0.5) / (size + 1)  # rounded down
    return config


@dataclass
class Widening:
    """Fills a wider model with the weights of another."""

    model: PreTrainedModel
    new: PreTrainedModel

    def run(self) -> None:
        """Fill every embedding, reader and writer of the new model."""
        stack, base = stack_of(self.model), self.model.base_model
        attention = stack.attention
        for name in stack.embeddings:
            embedding = cast(nn.Embedding, base.get_submodule(name))
            self.put(embedding, self.closed(embedding.weight.double()), None)
        fused = {block.get_submodule(attention.readers[0]) for block in stack.block_list(base)}
        for site in norm_sites(self.model):
            for reader in site.readers:
                weight, bias = in_float64(reader)
                if reader in fused:
                    weight = self.with_room(weight, attention)
                    bias = None if bias is None else self.with_room(bias, attention)
                self.put(reader, pad(weight, (0, self.heads)), bias)
        for block in stack.block_list(base):
            for branch in stack.branches(block).values():
                writer = branch.writer_module(block)
                weight, bias = in_float64(writer)
                if branch is attention:
                    weight = pad(weight.unflatten(1, (self.heads, self.size)), (0, 1)).flatten(1)
                self.put(writer, self.closed(weight.T).T, None if bias is None else self.closed(bias))

    @property
    def heads(self) -> int:
        """How many heads each layer has."""
        return self.model.config.num_attention_heads

    @property
    def size(self) -> int:
        """Dimensions of a head of the old model."""
        return self.model.config.hidden_size // self.heads

    def closed(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D + heads], minus the sum behind what was there."""
        return pad(torch.cat((x, -x.sum(-1, keepdim=True)), dim=-1), (0, self.heads - 1))

    def with_room(self, rows: Tensor, attention: AttentionBranch) -> Tensor:
        """Rows of the fused projection: a dimension more for each of query, key and value of each head."""
        groups = attention.groups(self.heads)
        parts = pad(rows.unflatten(0, (groups, 3, self.heads // groups, self.size)).movedim(3, -1), (0, 1))
        if getattr(self.model.config, "scale_attn_weights", True):  # queries are divided by the root of a larger size
            parts[:, 0] *= math.sqrt((self.size + 1) / self.size)
        return parts.movedim(-1, 3).flatten(0, 3)

    def put(self, module: Projection | nn.Embedding, weight: Tensor, bias: Tensor | None) -> None:
        """Fill the module of the new model that has the name of this one of the old; what it has more is zero."""
        target = cast(Projection | nn.Embedding, self.new.get_submodule(self.names[module]))
        matrix = target.weight if isinstance(target, nn.Embedding) else as_linear(target)
        matrix.zero_()[: weight.shape[0], : weight.shape[1]].copy_(weight)
        if bias is not None and not isinstance(target, nn.Embedding):
            target.bias.zero_()[: len(bias)].copy_(bias)

    def __post_init__(self) -> None:
        self.names = {module: name for name, module in self.model.named_modules()}


def in_float64(projection: Projection) -> tuple[Tensor, Tensor | None]:
    """The weight as [out, in], and the bias."""
    return as_linear(projection).double(), None if projection.bias is None else projection.bias.double()
