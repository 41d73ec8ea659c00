"""Norms and activations of any model of transformers, replaced in place; it is said of each what became of it."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

from transformers import PreTrainedModel

from ..errors import ModelError, SettingsError
from ..models.activations import FUSED, activation_names
from ..models.normalizations import normalization_names
from ..models.replaced import New, NewActivations, NewNorms
from ..models.sites import StackSites
from .declared_sites import declared_sites
from .inferred_sites import BLOCK_ROLES, ActivationSite, ModelSites, NormSite, infer_sites
from .installing import install
from .replaceable import refuse, refuse_shared
from .replacement_report import ReplacementReport, ReplacementRow

UNBOUNDED = ("none", "scale", "affine", "fixed_scale")
WHY_LEFT = {
    "query-key": "it normalises queries or keys",
    "inner": "it stands inside a branch",
    "embedding": "it stands before the first block",
    "other": "it stands outside the blocks",
    "final": "final_norm was not given",
}


def replace_norms(
    model: PreTrainedModel,
    norm: str | None = "none",
    *,
    final_norm: str | None = None,
    activation: str | None = None,
    layers: Iterable[int] | None = None,
    query_key_norm: bool = True,
    norm_alpha: float = 0.5,
    norm_alpha_attention: float | None = None,
    norm_alpha_mlp: float | None = None,
    norm_alpha_final: float | None = None,
    negative_slope: float = 0.01,
    slope_scope: Literal["layer", "global"] = "layer",
    inputs: Mapping[str, Any] | None = None,
    sites: tuple[StackSites, ...] | None = None,
) -> ReplacementReport:
    r"""
    Replace the norms, and if asked the activations, of the blocks of any model of transformers, in place.

    The names and numbers mean what they mean in a configuration of this package ([`LNFreeConfigMixin`]); None leaves
    what is there. Where a norm stands and what it does is seen in one trial forward pass. Gains and biases of the old
    norm go over to a new one that has them; with `norm="none"` they are gone. `model.save_pretrained` and the Auto
    classes then work as before, see `save_norm_free` and `load_norm_free`.

    Args:
        norm: what takes the place of the norms of blocks: of those before a branch, behind one, and behind the sum.
        final_norm: the same for the norm after the last block of a stack.
        activation: what takes the place of the activations of MLPs.
        layers: which blocks, counted from 0 through all stacks, an encoder's first; None means all.
        query_key_norm: False takes away the norms of queries and keys, too.
        norm_alpha, norm_alpha_attention, norm_alpha_mlp, norm_alpha_final, negative_slope, slope_scope: as in a
            configuration.
        inputs: what the model is called with in the trial; by default a few tokens or one picture.
        sites: where norms and activations are, from the base model on, if they are not to be inferred.

    Returns:
        A report with a row for every norm and activation: what became of it, or why it was left.

    Raises:
        SettingsError: an unknown name, or a layer that is not there.
        ModelError: the model cannot be saved or loaded with what is replaced, or it cannot be told where its norms are.
    """
    refuse(model)
    check_names(norm, final_norm, activation)
    found = (
        infer_sites(model, dict(inputs) if inputs is not None else None)
        if sites is None
        else declared_sites(model, sites)
    )
    chosen = chosen_layers(layers, found.layers)
    alphas = {"attention": norm_alpha_attention, "mlp": norm_alpha_mlp, "final": norm_alpha_final}
    rows: list[ReplacementRow] = []
    news: list[New] = []
    for site in found.norms:
        name, why = new_norm(site, norm, final_norm, query_key_norm, chosen)
        rows.append(ReplacementRow(site.path, site.kind, name or site.kind, why))
        if name is not None:
            own = alphas[site.feeds]
            alpha = float(norm_alpha if own is None else own)
            new = NewNorms(norm=name, was=site.kind, width=site.width, eps=site.eps, alpha=alpha, paths=[site.path])
            add(news, new)
    for place in found.activations:
        name, why = new_activation(place, activation, chosen)
        was = type(model.get_submodule(place.path)).__name__
        rows.append(ReplacementRow(place.path, was, name or was, why))
        if name is not None:
            kind = NewActivations(
                activation=name, width=place.width, negative_slope=float(negative_slope), slope_scope=slope_scope
            )
            add(news, replace(kind, paths=[place.path]))
    rows += [ReplacementRow(path, "norm", "norm", why) for path, why in found.unwatched.items()]
    if activation is not None and not any(isinstance(new, NewActivations) for new in news):
        raise ModelError(
            f"The chosen blocks of {type(model).__name__} call no module as activation but a function. Leave "
            "activation=None."
        )
    refuse_shared(model, [path for new in news for path in new.paths])
    dropped = install(model, news) if news else 0
    return ReplacementReport(type(model).__name__, tuple(rows), tuple(notes(found, rows, dropped)))


def check_names(norm: str | None, final_norm: str | None, activation: str | None) -> None:
    """
    Raises:
        SettingsError: an unknown name, or nothing to do.
    """
    norms = [name for name in normalization_names() if name != "removal"]
    activations = [name for name in activation_names() if name != FUSED]
    for argument, name, known in (
        ("norm", norm, norms),
        ("final_norm", final_norm, norms),
        ("activation", activation, activations),
    ):
        if name is not None and name not in known:
            raise SettingsError(
                f"{argument}={name!r} is not known to replace_norms. Allowed: None, {', '.join(map(repr, known))}."
            )


def chosen_layers(layers: Iterable[int] | None, count: int) -> set[int]:
    """
    Raises:
        SettingsError: a layer that is not there, or something else than whole numbers.
    """
    if layers is None:
        return set(range(count))
    chosen = set(layers)
    wrong = [layer for layer in chosen if type(layer) is not int or not 0 <= layer < count]
    if wrong:
        raise SettingsError(f"layers={wrong!r} are not among the {count} blocks, 0 to {count - 1}.")
    return chosen


def new_norm(
    site: NormSite, norm: str | None, final_norm: str | None, query_key_norm: bool, chosen: set[int]
) -> tuple[str | None, str]:
    """(the norm that is to stand there, ""), or (None, why the old one stays)."""
    if site.role in BLOCK_ROLES:
        wanted = norm
    elif site.role == "final":
        wanted = final_norm
    else:
        wanted = "none" if site.role == "query-key" and not query_key_norm else None
    if wanted is None:
        return None, WHY_LEFT.get(site.role, "norm was not given")
    if site.layer is not None and site.layer not in chosen:
        return None, "its layer was not chosen"
    if wanted == site.kind:
        return None, f"it is a {wanted} already"
    return wanted, ""


def new_activation(place: ActivationSite, activation: str | None, chosen: set[int]) -> tuple[str | None, str]:
    """The same for an activation."""
    if activation is None:
        return None, "activation was not given"
    return (activation, "") if place.layer in chosen else (None, "its layer was not chosen")


def add(news: list[New], new: New) -> None:
    """To those of its kind."""
    for index, known in enumerate(news):
        if replace(known, paths=[]) == replace(new, paths=[]):
            news[index] = replace(known, paths=[*known.paths, *new.paths])
            return
    news.append(new)


def notes(found: ModelSites, rows: list[ReplacementRow], dropped: int) -> Iterator[str]:
    """What follows for the model."""
    became = {row.path: row.became for row in rows if not row.why}
    roles = {site.role for site in found.norms if became.get(site.path) in UNBOUNDED}
    if "behind the sum" in roles:
        yield "Norms behind the sum of stream and branch are gone: nothing bounds the stream, which grows with depth."
    if "behind a branch" in roles:
        yield "The norms behind branches are gone: nothing bounds what a branch adds to the stream."
    if dropped:
        yield f"{dropped} gains and biases went with their norms, as what stands there has none."
