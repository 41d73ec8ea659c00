"""The norms of a model, each with the branch that it stands in and the projections that read it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

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
HEAD_NAMES = ("lm_head", "proj_out", "score", "classifier", "qa_outputs")


@dataclass
class NormSite:
    """A norm and the projections that read it."""

    name: str
    norm: nn.Module
    kind: str
    readers: list[Projection]
    branch: str
    """"attention", "cross_attention" or "mlp"; "final" after the last block."""
    takes_bias: bool = True
    """Whether the readers have a bias or may be given one."""

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
        known = isinstance(self.norm, nn.LayerNorm) or self.kind in LEFT
        return known and bool(self.readers) and (self.takes_bias or bias is None or not bias.any())


def norm_sites(model: PreTrainedModel) -> list[NormSite]:
    """The norms of a model in the order in which it computes them, the final one of each stack behind its blocks'."""
    stacks, kinds = stacks_of(model), iter(model.config.block_norms)
    return [site for stack in stacks for site in sites_of(stack, model, kinds)]


def sites_of(stack: StackSites, model: PreTrainedModel, kinds: Iterator[str]) -> list[NormSite]:
    """Those of one stack; the norms of its blocks are the next of `kinds`."""
    config, base = model.config, model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    found = []
    # The blocks come first: zip takes no kind for a block that is not there.
    for index, (block, kind) in enumerate(zip(stack.block_list(base), kinds, strict=False)):
        branches = stack.branches(block)
        # All or none: a configuration has one kind of norm a layer.
        takes_bias = all(may_have_bias(branch, block, config) for branch in branches.values())
        for name, branch in branches.items():
            full = f"{prefix}{stack.blocks}.{index}.{branch.norm}"
            readers = branch.reader_modules(block)
            found.append(NormSite(full, branch.norm_module(block), kind, readers, name, takes_bias))
    if stack.final_norm is None:
        return found
    heads = head_readers(model)
    if heads and stack is not stacks_of(model)[-1]:  # all or none: a configuration has one kind of final norm
        heads = encoder_readers(model)
    takes_bias = hasattr(model, "lm_head") or any(head.bias is not None for head in heads)
    final = base.get_submodule(stack.final_norm)
    return [*found, NormSite(f"{prefix}{stack.final_norm}", final, config.final_norm, heads, "final", takes_bias)]


def head_readers(model: PreTrainedModel) -> list[Projection]:
    """What reads the last final norm: nothing, where it is not one projection that reads it right away."""
    heads = [getattr(model, name) for name in HEAD_NAMES if hasattr(model, name)]
    return [] if hasattr(model, "projector") else heads  # Whisper's classifier reads what that makes of it


def encoder_readers(model: PreTrainedModel) -> list[Projection]:
    """What reads the final norm of an encoder: keys and values of every cross-attention."""
    decoder = stacks_of(model)[-1]
    branches = [(block, decoder.branches(block)["cross_attention"]) for block in decoder.block_list(model.base_model)]
    return [branch.projections(block)[path] for block, branch in branches for path in branch.sources]


def may_have_bias(branch: Branch, block: nn.Module, config: PreTrainedConfig) -> bool:
    """Whether the readers of a branch have biases, or a field of the configuration gives them some."""
    field = "mlp_bias" if isinstance(branch, MLPBranch) else "attention_bias"
    return hasattr(config, field) or all(reader.bias is not None for reader in branch.reader_modules(block))


def as_linear(projection: Projection) -> Tensor:
    """The weight as [out, in], a view."""
    return projection.weight.T if isinstance(projection, Conv1D) else projection.weight
