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
    config, base = model.config, model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    found: list[NormSite] = []
    layer = 0
    last = {stack.final_norm: final_readers(model, stack) for stack in stacks_of(model)}
    # All or none: a configuration has one kind of norm a layer, and one of final norm.
    head = getattr(model, "lm_head", None)  # whose bias a field of the configuration gives
    may_end = all(r is head or r.bias is not None for readers in last.values() for r in readers)
    for stack in stacks_of(model):
        for index, block in enumerate(stack.block_list(base)):
            branches = stack.branches(block)
            takes_bias = all(may_have_bias(branch, block, config) for branch in branches.values())
            for name, branch in branches.items():
                full = f"{prefix}{stack.blocks}.{index}.{branch.norm}"
                norm, readers = branch.norm_module(block), branch.reader_modules(block)
                kind, behind = config.block_norms[layer], branch.post_norm
                found.append(NormSite(full, norm, kind, readers, name, layer, takes_bias, behind))
            layer += 1
        if stack.final_norm is not None:
            name, norm = f"{prefix}{stack.final_norm}", base.get_submodule(stack.final_norm)
            readers = last[stack.final_norm]
            found.append(NormSite(name, norm, config.final_norm, readers, "final", None, may_end))
    return found


def final_readers(model: PreTrainedModel, stack: StackSites) -> list[Projection]:
    """
    What reads the norm after the last block of a stack: the head, or for an encoder the keys and values of every
    cross-attention. Nothing of both where the head is not one projection that reads its norm right away: a
    configuration has one kind of final norm.
    """
    heads = [head for name in HEAD_NAMES if isinstance(head := getattr(model, name, None), nn.Linear)]
    if not heads or hasattr(model, "projector"):  # Whisper's classifier reads what that makes of the norm
        return []
    decoder = stacks_of(model)[-1]
    if stack is decoder:
        return list(heads)
    branches = [(block, b) for block in decoder.block_list(model.base_model) for b in decoder.branches(block).values()]
    return [branch.projections(block)[path] for block, branch in branches for path in branch.sources]


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
