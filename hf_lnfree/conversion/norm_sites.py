"""The norms of a model, each with the branch that it stands in and the projections that read it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..models.normalizations import FixedScale, epsilon
from ..models.removal import OTHERS, RemovalNorm
from ..models.sites import Branch, MLPBranch, Projection, StackSites
from .families import stacks_of

# From here on epsilon is no guard against zero: the norm was disabled by it, and x / sqrt(var + eps) is x / sqrt(eps).
DISABLING_EPS = 1e6
LEFT = {"scale": "none", "affine": "none", "rmsnorm": "rmspre"}  # of norms that centre nothing
HEAD_NAMES = ("lm_head", "score", "classifier", "qa_outputs")


@dataclass
class NormSite:
    """A norm and the projections that read it."""

    name: str
    norm: nn.Module
    kind: str
    readers: list[Projection]
    branch: str
    """"attention", "cross_attention" or "mlp"; "final" after the last block of a stack."""
    layer: int | None = None
    """Its place in `config.block_norms`; None after the last block."""
    takes_bias: bool = True
    """Whether the readers have a bias or may be given one."""
    behind: bool = False
    """Whether it stands behind the sum of stream and branch, so that the stream itself is what it gives."""

    @property
    def fixed_scale(self) -> float | None:
        """What it divides by, if that is the same for every token."""
        if isinstance(self.norm, FixedScale):
            return self.norm.sigma.item()
        if isinstance(self.norm, RemovalNorm):
            return self.norm.sigma[OTHERS].item() if self.norm.finished else None
        if (isinstance(self.norm, nn.LayerNorm) or self.kind == "rmsnorm") and epsilon(self.norm) >= DISABLING_EPS:
            return math.sqrt(epsilon(self.norm))
        return None

    @property
    def foldable(self) -> bool:
        """Whether the readers can take over its gain and bias."""
        bias = getattr(self.norm, "bias", None)
        known = isinstance(self.norm, (nn.LayerNorm, RemovalNorm)) or self.kind in LEFT
        return known and not self.behind and bool(self.readers) and (self.takes_bias or bias is None or not bias.any())


def norm_sites(model: PreTrainedModel) -> list[NormSite]:
    """The norms of a model in the order in which it computes them: of each stack its blocks', then the final one."""
    stacks, config, base = stacks_of(model), model.config, model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    found: list[NormSite] = []
    layer = 0
    for number, stack in enumerate(stacks):
        for index, block in enumerate(stack.block_list(base)):
            branches = stack.branches(block)
            # All or none: a configuration has one kind of norm a layer.
            takes_bias = all(may_have_bias(branch, block, config) for branch in branches.values())
            for name, branch in branches.items():
                full = f"{prefix}{stack.blocks}.{index}.{branch.norm}"
                norm, readers = branch.norm_module(block), branch.reader_modules(block)
                kind, behind = config.block_norms[layer], branch.post_norm
                found.append(NormSite(full, norm, kind, readers, name, layer, takes_bias, behind))
            layer += 1
        if stack.final_norm is not None:
            final = base.get_submodule(stack.final_norm)
            readers, takes_bias = final_readers(model, stacks[number + 1 :])
            name = f"{prefix}{stack.final_norm}"
            found.append(NormSite(name, final, config.final_norm, readers, "final", None, takes_bias))
    return found


def final_readers(model: PreTrainedModel, later: Sequence[StackSites]) -> tuple[list[Projection], bool]:
    """
    What reads the norm after the last block of a stack, and whether all of it has a bias or may be given one: the head,
    or what a decoder makes keys and values of.
    """
    if later:
        blocks = [(stack, block) for stack in later for block in stack.block_list(model.base_model)]
        places = [(b, path) for stack, b in blocks for a in stack.attentions(b) for path in a.encoder_readers]
        readers = [cast(Projection, block.get_submodule(path)) for block, path in places]
        return readers, all(reader.bias is not None for reader in readers)
    heads = [head for name in HEAD_NAMES if isinstance(head := getattr(model, name, None), nn.Linear)]
    return list(heads), hasattr(model, "lm_head") or any(head.bias is not None for head in heads)


def bias_fields(config: PreTrainedConfig) -> tuple[str, ...]:
    """What of a configuration gives the readers of attention biases."""
    return tuple(name for name in ("attention_bias", "qkv_bias") if hasattr(config, name))


def may_have_bias(branch: Branch, block: nn.Module, config: PreTrainedConfig) -> bool:
    """Whether the readers of a branch have biases, or a field of the configuration gives them some."""
    given = hasattr(config, "mlp_bias") if isinstance(branch, MLPBranch) else bool(bias_fields(config))
    return given or all(reader.bias is not None for reader in branch.reader_modules(block))


def beginnings(model: PreTrainedModel, stack: StackSites) -> Iterator[Tensor]:
    """What the residual stream of a stack begins with, as views [..., D]: weights, and biases where there are some."""
    for path in stack.embeddings:
        parent, _, name = path.rpartition(".")
        found = getattr(model.base_model.get_submodule(parent), name)
        if isinstance(found, nn.Embedding):
            yield found.weight
        elif isinstance(found, Tensor):
            yield found
        else:  # a projection of patches [D, ...]
            yield found.weight.movedim(0, -1)
            if found.bias is not None:
                yield found.bias


def as_linear(projection: Projection) -> Tensor:
    """The weight as [out, in], a view."""
    return projection.weight.T if isinstance(projection, Conv1D) else projection.weight
