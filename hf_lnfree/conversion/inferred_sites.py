"""Where a model that nobody declared keeps its norms and activations: one trial forward pass is watched.

Names differ from family to family, dataflow does not. A block adds what a branch made of the residual stream to the
stream, so a stream is what is added to something that was computed from it. A norm stands before a branch if it is
given the stream, behind a branch if it is given something else and what it returns is added to the stream, and behind
the sum if it is given the stream and returns it.
"""

import inspect
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ModelError, listed
from ..models.normalizations import Feeds
from ..models.replaced import NormKind
from .dataflow import NORMED_OTHERWISE, SeenNorm, StreamWatch, is_norm

Role = Literal[
    "before a branch", "behind a branch", "behind the sum", "final", "query-key", "inner", "embedding", "other"
]
BLOCK_ROLES = ("before a branch", "behind a branch", "behind the sum")


@dataclass(frozen=True, kw_only=True)
class NormSite:
    """
    A norm of a model.

    Args:
        path: from the model on.
        layer: its block, counted through all stacks; None outside blocks.
        role: what it does for the residual stream; the last four leave it as it is.
        kind: what it computes.
        width: D, which it normalises over.
        eps: what it adds to the mean square.
        feeds: what reads it first.
        readers: the projections that are given what it returns.
    """

    path: str
    layer: int | None
    role: Role
    kind: NormKind
    width: int
    eps: float
    feeds: Feeds = "final"
    readers: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class ActivationSite:
    """An activation of a block's MLP, with the number of values that it is given per token."""

    path: str
    layer: int
    width: int


@dataclass(frozen=True, kw_only=True)
class ModelSites:
    """
    What replacing needs to know of a model.

    Args:
        stacks: the lists of blocks, in the order in which layers are counted.
        layers: how many blocks they have together.
        norms, activations: what was found, in the order of the model's modules.
        writers: the projections that write into the stream, by layer.
        unwatched: modules that normalise and that cannot be replaced, with the reason.
    """

    stacks: tuple[str, ...]
    layers: int
    norms: tuple[NormSite, ...]
    activations: tuple[ActivationSite, ...]
    writers: dict[int, frozenset[str]]
    unwatched: dict[str, str]


def block_lists(model: nn.Module) -> list[str]:
    """
    Lists of repeated blocks that hold norms: of lists within lists the inner ones where all their elements are of one
    class, else the outer ones (a T5 block is a list of branches).
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and not any(is_norm(element) for element in module)
        and any(is_norm(inner) for inner in module.modules())
    }

    def inside(name: str, others: list[str]) -> bool:
        return any(name.startswith(f"{other}.") for other in others)

    uniform = [name for name, module in lists.items() if len({type(element) for element in module}) == 1]
    uniform = [name for name in uniform if not any(inside(other, [name]) for other in uniform)]
    mixed = [name for name in lists if name not in uniform]
    mixed = [name for name in mixed if not inside(name, uniform) and not any(inside(u, [name]) for u in uniform)]
    mixed = [name for name in mixed if not inside(name, mixed)]
    return [name for name in lists if name in uniform or name in mixed]


def infer_sites(model: PreTrainedModel, inputs: Mapping[str, Any] | None = None) -> ModelSites:
    """
    Watch `model` through one forward pass.

    Args:
        inputs: what the model is called with; by default a few tokens or one picture.

    Raises:
        ModelError: no repeated blocks with norms, a forward pass that fails, or a norm of a block whose part in it
            cannot be told.
    """
    lists = block_lists(model)
    if not lists:
        raise ModelError(
            f"{type(model).__name__} has no list of repeated blocks (nn.ModuleList) with norms. Say where they are: "
            "sites=, a tuple of hf_lnfree.StackSites."
        )
    watch = watched(model, lists, inputs)
    every = ", ".join(lists)
    lists = [name for name in lists if any(n in watch.added for path, n in watch.blocks.items() if in_list(path, name))]
    if not lists:
        raise ModelError(
            f"No block of {every} adds to a stream that it is given, so what its norms do cannot be told. Say where "
            "they are: sites=, a tuple of hf_lnfree.StackSites."
        )
    blocks = {path: n for n, path in enumerate(p for name in lists for p in watch.blocks if in_list(p, name))}
    norms, unwatched = judge(model, watch, blocks)
    return ModelSites(
        stacks=tuple(lists),
        layers=len(blocks),
        norms=norms,
        activations=tuple(
            ActivationSite(path=path, layer=blocks[block], width=width)
            for path, width in watch.widths.items()
            if (block := block_of(path, blocks)) is not None
        ),
        writers={blocks[path]: frozenset(watch.writers[n]) for path, n in watch.blocks.items() if path in blocks},
        unwatched=unwatched | functions(watch, blocks),
    )


def in_list(path: str, name: str) -> bool:
    """Whether a path is that of an element of a list."""
    return path.rpartition(".")[0] == name


def block_of(path: str, blocks: dict[str, int]) -> str | None:
    """The block that a module is part of."""
    return next((block for block in blocks if path.startswith(f"{block}.")), None)


def watched(model: PreTrainedModel, lists: list[str], inputs: Mapping[str, Any] | None) -> StreamWatch:
    """
    The watch after one forward pass in evaluation mode; the model is left as it was.

    Raises:
        ModelError: the forward pass fails.
    """
    paths = [f"{name}.{n}" for name in lists for n in range(len(model.get_submodule(name)))]  # type: ignore[arg-type]
    watch = StreamWatch({path: n for n, path in enumerate(paths)})
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        given = trial_inputs(model) if inputs is None else inputs
        with torch.no_grad(), watch.hooked(model), watch:
            model(**given)
    except Exception as error:
        own = "the inputs=" if inputs is not None else "a trial input"
        raise ModelError(
            f"{type(model).__name__} cannot be watched: its forward pass fails on {own} that it is given "
            f"({type(error).__name__}: {str(error)[:200]}). Give an example of what it is called with as inputs=, a "
            "dict, load its weights if it is on the meta device, or say where its norms are with sites=, a tuple of "
            "hf_lnfree.StackSites."
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    return watch


def trial_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """
    Raises:
        ModelError: it is not known what the model reads.
    """
    config, name = model.config, model.main_input_name
    own = getattr(config, "vision_config", None) or config
    accepted = inspect.signature(model.forward).parameters
    given: dict[str, Any]
    if name == "input_ids":
        given = dict(model.dummy_inputs)
        if "decoder_input_ids" in accepted:
            given.setdefault("decoder_input_ids", given["input_ids"])
    elif name == "pixel_values":
        size = getattr(own, "image_size", 224)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        given = {name: torch.zeros(1, getattr(own, "num_channels", 3), height, width)}
    elif name == "input_features" and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        given = {name: torch.zeros(1, config.num_mel_bins, 2 * config.max_source_positions)}
        if "decoder_input_ids" in accepted:
            given["decoder_input_ids"] = torch.ones(1, 4, dtype=torch.long)
    elif name == "input_values":
        given = {name: torch.zeros(1, 8000)}
    else:
        raise ModelError(f"no input is known for {name!r}")
    if "use_cache" in accepted:
        # Without a cache, values of positions are looked at, which tensors without values do not have.
        given["use_cache"] = model.device.type == "meta"
    return {key: like(value, model) for key, value in given.items()}


def like(value: Any, model: PreTrainedModel) -> Any:
    """A tensor on the model's device, numbers in its dtype."""
    if not isinstance(value, Tensor):
        return value
    return value.to(model.device, model.dtype if value.is_floating_point() else None)


CENTRING = {"native_layer_norm", "rsub", "sub", "var", "var_mean"}  # operators that an RMSNorm has no use for


def judge(model: nn.Module, watch: StreamWatch, blocks: dict[str, int]) -> tuple[tuple[NormSite, ...], dict[str, str]]:
    """
    Every norm with its role, and what cannot be replaced, with the reason.

    Raises:
        ModelError: a block calls a norm now so, now so, or not at all.
    """
    sites, unwatched, uncalled, unclear = [], {}, [], []
    for path, module in model.named_modules():
        block, seen = block_of(path, blocks), watch.norms.get(path)
        if isinstance(module, NORMED_OTHERWISE):
            unwatched[path] = f"a {type(module).__name__} normalises over more than the width"
        elif not is_norm(module):
            continue
        elif seen is None:
            unwatched[path] = "the trial forward pass does not reach it"
            uncalled += [path] if block is not None else []
        elif seen.width != next((p.numel() for p in module.parameters()), seen.width):
            unwatched[path] = "its weight has another shape than one vector of what it is given"
        elif len(seen.given_stream) > 1:
            unclear.append(path)
        else:
            layer = None if block is None else blocks[block]
            sites.append(
                NormSite(
                    path=path,
                    layer=layer,
                    role=outer_role(seen, watch, blocks) if block is None else inner_role(seen),
                    kind="layernorm" if seen.operators & CENTRING else "rmsnorm",
                    width=seen.width,
                    eps=epsilon(module),
                    feeds=seen.feeds or "final",
                    readers=frozenset(seen.readers),
                )
            )
    unknown = {"the trial forward pass does not call": uncalled, "do different things from call to call": unclear}
    for why, paths in unknown.items():
        if paths:
            raise ModelError(
                f"Norms of repeated blocks that {why}: {listed(paths)}. Give inputs=, a dict with which the model "
                "calls them all, or say where norms are with sites=, a tuple of hf_lnfree.StackSites."
            )
    return tuple(with_feeds(sites, blocks)), unwatched


def inner_role(seen: SeenNorm) -> Role:
    """Of a norm in a block."""
    if True in seen.given_stream:
        return "behind the sum" if seen.joins else "before a branch"
    if seen.joins:
        return "behind a branch"
    return "query-key" if seen.attended else "inner"


def outer_role(seen: SeenNorm, watch: StreamWatch, blocks: dict[str, int]) -> Role:
    """Of a norm outside blocks: the final one is given the stream as the last block of a stack left it."""
    if not seen.after_stream:
        return "embedding"
    if seen.after not in blocks or True not in seen.given_stream or seen.width != watch.streams[seen.after]:
        return "other"
    stack, _, number = seen.after.rpartition(".")
    return "final" if f"{stack}.{int(number) + 1}" not in blocks else "other"


def with_feeds(sites: list[NormSite], blocks: dict[str, int]) -> Iterator[NormSite]:
    """The last norm of a stack may have no reader in the base model: it has that of its like in other blocks."""
    feeds: dict[str, Counter[Feeds]] = defaultdict(Counter)
    for site in sites:
        feeds[in_block(site.path, blocks)][site.feeds] += site.feeds != "final"
    for site in sites:
        if site.layer is None or site.feeds != "final":
            yield site if site.role != "final" else replace(site, feeds="final")
        else:
            ((common, count),) = feeds[in_block(site.path, blocks)].most_common(1)
            yield replace(site, feeds=common if count else "attention")


def in_block(path: str, blocks: dict[str, int]) -> str:
    """The path of a module within its block."""
    block = block_of(path, blocks)
    return path if block is None else path.removeprefix(f"{block}.")


def epsilon(module: nn.Module) -> float:
    """Families have several names for it."""
    names = ("eps", "variance_epsilon", "epsilon", "norm_eps")
    return next((value for name in names if isinstance(value := getattr(module, name, None), float)), 1e-6)


def functions(watch: StreamWatch, blocks: dict[str, int]) -> dict[str, str]:
    """Blocks that call a norm which is no module."""
    return {
        path: "it calls a function that normalises, which is no module"
        for path, n in watch.blocks.items()
        if path in blocks and watch.functions[n]
    }
