"""Which fields of the study the blocks of a family can honour; any other is refused by name before a model is built."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .activations import FUSED
from .errors import ConfigurationError
from .sites import AttentionBranch, Branch, MLPBranch, StackSites
from .weight_norms import can_be_normed


def cross(branch: Branch, block: nn.Module) -> str | None:
    """Keys of GPT-2's cross-attention come with its values out of one projection, which is not that of its queries."""
    fused = isinstance(branch, AttentionBranch) and len(branch.encoder_readers) == 1
    return "reads its keys from the encoder, in one projection with its values" if fused else None


def gated(branch: Branch, block: nn.Module) -> str | None:
    """A gated MLP is not one matrix, even with the identity as its activation."""
    return "is gated" if isinstance(branch, MLPBranch) and branch.gated else None


def without_seam(branch: Branch, block: nn.Module) -> str | None:
    """A cap is handed to the attention function that an attention looks up."""
    alone = isinstance(branch, AttentionBranch) and not hasattr(block.get_submodule(branch.module), "config")
    return "does not look its attention function up" if alone else None


def unknown_projections(branch: Branch, block: nn.Module) -> str | None:
    """There are normed weights for Linear and Conv1D."""
    kinds = {type(module).__name__ for module in branch.projections(block).values() if not can_be_normed(module)}
    return f"has projections of an unknown kind, {', '.join(sorted(kinds))}" if kinds else None


@dataclass(frozen=True)
class Requirement:
    """When a field asks something of a branch, and why a branch cannot give it."""

    asked: Callable[[Any], bool]
    obstacle: Callable[[Branch, nn.Module], str | None]


REQUIREMENTS = {
    "query_key_norm": Requirement(lambda config: config.query_key_norm, cross),
    "attention_temperature": Requirement(lambda config: config.attention_temperature, cross),
    "attention_softcap": Requirement(lambda config: config.attention_softcap is not None, without_seam),
    "linear_bias": Requirement(lambda config: config.linear_bias == "query_key", cross),
    "weight_norm": Requirement(lambda config: config.weight_norm != "none", unknown_projections),
    "layer_activations": Requirement(lambda config: FUSED in config.block_activations, gated),
}


def obstacles(model: PreTrainedModel, stack: StackSites) -> Iterator[tuple[str, str]]:
    """(field, why it cannot be honoured) for every field that the configuration asks for in vain."""
    asked = {name: needs for name, needs in REQUIREMENTS.items() if needs.asked(model.config)}
    for index, block in enumerate(stack.block_list(model) if asked else ()):
        for kind, branch in stack.branches(block).items():
            for name, needs in asked.items():
                if (why := needs.obstacle(branch, block)) is not None:
                    yield name, f"the {kind.replace('_', '-')} of {stack.blocks}.{index} {why}"
    if "removal" in {*model.config.block_norms, model.config.final_norm}:
        if model.main_input_name not in ("input_ids", "pixel_values"):  # of an image the class token is the first
            yield "norm", f"it has no first token whose norm could be told apart, as it reads {model.main_input_name}"
        if stack.attention.post_norm:
            yield "norm", f"the norms of {stack.blocks} stand behind the branches, where they cannot be folded"
    if stack.final_norm is None and model.config.final_norm != "none":
        yield "final_norm", f"nothing stands after {stack.blocks}"
    if stack.embedding_dropout is None and model.config.embedding_scale:
        yield "embedding_scale", f"it has no module between the embeddings and {stack.blocks}"


def refuse_unhonoured(model: PreTrainedModel, stacks: Sequence[StackSites]) -> None:
    """
    Raises:
        ConfigurationError: the configuration asks for something that the model's blocks cannot do.
    """
    config: PreTrainedConfig = model.config
    for stack in stacks:
        for name, why in obstacles(model, stack):
            if name == "layer_activations" and config.layer_activations is None:
                name = config.activation_field
            default = getattr(type(config)(), name)
            raise ConfigurationError(
                f"{name}={getattr(config, name)!r} cannot be honoured by {type(model).__name__}: {why}. Leave it at "
                f"{default!r}."
            )
