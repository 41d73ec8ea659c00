"""Norms and activations of a model whose sites somebody declared, as those of other models are inferred."""

from torch import nn
from transformers import PreTrainedModel

from ..errors import ModelError
from ..models.normalizations import epsilon, width
from ..models.normfree import feeds
from ..models.sites import AttentionBranch, StackSites
from .inferred_sites import ActivationSite, ModelSites, NormSite, Role


def declared_sites(model: PreTrainedModel, stacks: tuple[StackSites, ...]) -> ModelSites:
    """
    Raises:
        ModelError: a module that is declared is not there.
    """
    base = model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    norms: list[NormSite] = []
    activations: list[ActivationSite] = []
    writers: dict[int, frozenset[str]] = {}

    def norm(path: str, layer: int | None, role: Role, **more: object) -> None:
        module = base.get_submodule(path)
        kind = "layernorm" if isinstance(module, nn.LayerNorm) else "rmsnorm"
        more = {"width": width(module), "eps": epsilon(module), **more}
        norms.append(NormSite(path=prefix + path, layer=layer, role=role, kind=kind, **more))  # type: ignore[arg-type]

    try:
        for stack in stacks:
            for number, block in enumerate(stack.block_list(base)):
                layer, here = len(writers), f"{stack.blocks}.{number}."
                for branch in stack.branches(block).values():
                    role: Role = "behind the sum" if branch.post_norm else "before a branch"
                    readers = frozenset() if branch.post_norm else frozenset(prefix + here + r for r in branch.readers)
                    norm(here + branch.norm, layer, role, feeds=feeds(branch), readers=readers)
                    for path in branch.query_key_norms if isinstance(branch, AttentionBranch) else ():
                        norm(here + path, layer, "query-key", feeds="attention")
                writers[layer] = frozenset(prefix + here + branch.writer for branch in stack.branches(block).values())
                path = prefix + here + stack.mlp.activation
                model.get_submodule(path)
                activations.append(ActivationSite(path=path, layer=layer, width=stack.mlp.width(block)))
            if stack.final_norm is not None:
                norm(stack.final_norm, None, "final")
    except AttributeError as error:
        raise ModelError(f"sites= name a module that {type(base).__name__} does not have: {error}.") from error
    return ModelSites(
        stacks=tuple(prefix + stack.blocks for stack in stacks),
        layers=len(writers),
        norms=tuple(norms),
        activations=tuple(activations),
        writers=writers,
        unwatched={},
    )
