r"""Gain, bias and mean-centring of LayerNorms folded into the matrices around them, so that only a division is left.

With $P = I - \mathbf 1 \mathbf 1^\top / D$, a reader of a norm computes
$W (g \odot P x / \sigma + b) + c = (W \mathrm{diag}(g)) (P x / \sigma) + (W b + c)$, and where every reader of the
residual stream is behind a $P$, the stream may be replaced by $P x$: embeddings and projections into it are multiplied
by $P$. A norm whose $\sigma$ is a constant $s$ disappears: its reader becomes $W \mathrm{diag}(g) P / s$.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ModelError, listed
from ..models.normalizations import FixedScale, Scale
from ..models.removal import RemovalNorm
from ..models.sites import Projection
from .families import blank, family_of, own_weights, placed, require_plain, set_block_norms, stacks_of
from .norm_sites import LEFT, NormSite, as_linear, beginnings, bias_fields, norm_sites
from .stabilizers import fold_stabilizers, fuse_identities, head_is_tied, untie_head


@dataclass
class Folding:
    """What became of the norms of a model."""

    norms: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Name of a norm -> what stood there and what is left."""
    untied: bool = False
    """Whether the head had to get weights of its own."""
    notes: list[str] = field(default_factory=list)

    @property
    def divisions(self) -> int:
        """How many norms still divide by sigma."""
        return sum(left != "none" for _, left in self.norms.values())


@torch.no_grad()
def fold(model: PreTrainedModel, fuse_identity: bool = False) -> tuple[PreTrainedModel, Folding]:
    """
    A model with equal outputs and as little left of its norms as is exact; computed in float64, rounded once.

    - A LayerNorm leaves "rmspre" (a division by the root mean square), or a LayerNorm with gain 1 and bias 0 where a
      part of the model reads the residual stream without a norm, so that its mean must stay.
    - A LayerNorm disabled by its epsilon, a [`RemovalNorm`] whose removal is finished, "fixed_scale", "scale" and
      "affine" leave nothing; "rmsnorm" leaves "rmspre".
    - Normed weights become plain ones; the scale of embeddings, residual gains, scales of MLPs and temperatures of
      heads go into the weights, a temperature behind a query-key norm stays.

    Args:
        model: of this package, any head. It stays as it is.
        fuse_identity: whether MLPs whose activation is "identity" become one matrix, "identity_fused".

    Returns:
        The new model, and what was done.

    Raises:
        ModelError: a norm that is half removed, or stands behind the sum of stream and branch; an epsilon that disables
            LayerNorm beside gains that were not scaled; adapters; a model that is offloaded.
    """
    require_plain(model)
    require_declared(model)
    work = placed(copy.deepcopy(model), torch.float64).eval()
    tied = head_is_tied(work)
    fold_stabilizers(work)
    if fuse_identity:
        fuse_identities(work)
    sites = norm_sites(work)
    check(work, sites)
    folding = Folding()
    live = [site for site in sites if isinstance(site.norm, nn.LayerNorm) and site.fixed_scale is None]
    reads_mean = [site.name for site in sites if not isinstance(site.norm, nn.LayerNorm)]
    centre = bool(live) and not reads_mean and all(stack.embeddings for stack in stacks_of(work))
    if live and reads_mean:
        folding.notes.append(
            f"{len(live)} norms still centre: the residual stream is read as it is at {len(reads_mean)} places, the "
            f"first of them {reads_mean[0]}."
        )
    if centre or (sites and sites[-1].foldable):
        untie_head(work)
    if tied and not head_is_tied(work):
        folding.untied = True
        folding.notes.append("The head has weights of its own now; they were those of the token embedding.")
    for site in sites:
        fold_site(site, centre, folding)
    if centre:
        centre_stream(work)
    return rebuilt(model, work, sites, folding), folding


def require_declared(model: PreTrainedModel) -> None:
    """Raise ModelError for a model of which nobody said what the streams begin with that its norms read."""
    if not all(stack.embeddings or stack.attention.post_norm for stack in stacks_of(model)):
        raise ModelError(f"{type(model).__name__} does not declare what its residual stream begins with: not folded.")


def check(model: PreTrainedModel, sites: Sequence[NormSite]) -> None:
    """Refuse norms that stand behind branches, are half removed, or disabled beside gains that were not scaled."""
    if behind := [site.name for site in sites if site.behind and site.kind != "none"]:
        raise ModelError(
            f"The norms of {type(model).__name__} cannot be folded: {len(behind)} stand behind the sum of stream and "
            f"branch, the first of them {behind[0]}. The stream itself goes on with what they give, and no projection "
            "stands there that could take over a gain or a scale."
        )
    for site in sites:
        norm, scale = site.norm, site.fixed_scale
        if isinstance(norm, RemovalNorm):
            gates = [*norm.gate.tolist(), norm.first_gate.item()]
            if any(gates) and not norm.finished:
                raise ModelError(
                    f"{site.name} is half removed (gates {gates}) and cannot be folded. Finish its schedule, with the "
                    "first position."
                )
        elif scale is not None and not isinstance(norm, FixedScale):
            largest = cast(Tensor, norm.weight).abs().max().item()
            if not largest > 1e-3 * scale:
                raise ModelError(
                    f"{site.name} is disabled by its epsilon ({scale**2:g}), but its gain is at most {largest:.3g} and "
                    f"would have to be of the size of {scale:.3g}: the checkpoint is half converted."
                )


def fold_site(site: NormSite, centre: bool, folding: Folding) -> None:
    """Fold one norm into its readers, in place, and note what is left of it."""
    norm, scale, left = site.norm, site.fixed_scale, site.kind
    if isinstance(norm, nn.LayerNorm) and not site.foldable:
        folding.notes.append(f"{site.name} keeps its gain and bias: nothing after it can take them.")
    elif isinstance(norm, nn.LayerNorm):
        left = "none" if scale is not None else "rmspre" if centre else "layernorm"
        for reader in site.readers:
            fold_affine(reader, norm.weight if scale is None else norm.weight / scale, norm.bias)
            if scale is not None:
                weight = as_linear(reader)
                weight -= weight.mean(1, keepdim=True)
        norm.weight.fill_(1.0)
        norm.bias.zero_()
    elif site.foldable:
        left = LEFT.get(site.kind, "rmspre") if scale is None else "none"
        for reader in site.readers:
            gain = cast(Tensor, norm.scale if isinstance(norm, Scale) else norm.weight) / (scale or 1.0)
            fold_affine(reader, gain, getattr(norm, "bias", None))
    disabled = scale is not None and not isinstance(norm, (RemovalNorm, FixedScale))
    folding.norms[site.name] = (f"disabled {site.kind}" if disabled else site.kind, left)


def fold_affine(reader: Projection, gain: Tensor, bias: Tensor | None) -> None:
    """Let a projection read x where it read `gain * x + bias`, in place."""
    weight = as_linear(reader)
    if bias is not None and bias.any():
        shift = weight @ bias
        reader.bias = nn.Parameter(shift if reader.bias is None else reader.bias + shift)
    weight *= gain


def centre_stream(model: PreTrainedModel) -> None:
    """Take the mean out of everything that is written into the residual stream, in place."""
    for stack in stacks_of(model):
        assert stack.embeddings, "what the stream begins with is not declared"
        for start in beginnings(model, stack):
            start -= start.mean(-1, keepdim=True)
        for block in stack.block_list(model.base_model):
            for branch in stack.branches(block).values():
                writer = branch.writer_module(block)
                weight = as_linear(writer)
                weight -= weight.mean(0, keepdim=True)
                if writer.bias is not None:
                    writer.bias.sub_(writer.bias.mean())


def rebuilt(
    model: PreTrainedModel, work: PreTrainedModel, sites: Sequence[NormSite], folding: Folding
) -> PreTrainedModel:
    """`work` as a model whose configuration says what is left of the norms, in the dtype of `model`."""
    config = work.config
    by_layer: dict[int | None, set[str]] = {}
    for site in sites:
        by_layer.setdefault(site.layer, set()).add(folding.norms[site.name][1])
    left = set().union(*by_layer.values())
    if mixed := [layer for layer, kinds in by_layer.items() if len(kinds) > 1]:
        where = "The end of a stack" if mixed[0] is None else f"Layer {mixed[0]}"
        raise ModelError(
            f"{where} has norms that are removed and others that are not, and a configuration has one kind of norm "
            "there. Remove the others too."
        )
    config.final_norm = by_layer.pop(None, {config.final_norm}).pop()
    # The configuration of an encoder alone counts the layers of a decoder, too.
    set_block_norms(config, [kinds.pop() for kinds in by_layer.values()] + config.block_norms[len(by_layer) :])
    disabled = any(kind.startswith("disabled") for kind, _ in folding.norms.values())
    if disabled and config.stock_norm not in left:
        eps_field = family_of(config.model_type).eps_field
        if eps_field is not None:
            setattr(config, eps_field, getattr(type(config)(), eps_field))  # of no norm; a usual one for who adds some
    state = work.state_dict()
    config.lm_head_bias = "lm_head.bias" in state
    biases = {name for name in state if name.endswith(".bias")} - {name for name, _ in model.named_parameters()}
    of_mlps = {name for name in biases if ".mlp." in name}
    if of_mlps:
        config.mlp_bias = True
    if biases - of_mlps - {"lm_head.bias"}:
        for name in bias_fields(config):
            setattr(config, name, True)
    if config.linear_bias == "query_key" and any(kind == "layernorm" for kind, _ in folding.norms.values()):
        config.linear_bias = "all"
        folding.notes.append("Biases that were frozen at zero hold those of the norms now: linear_bias is 'all'.")
    new = blank(type(model), config, model.dtype, own_weights(work))
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    kept = new.state_dict()
    lost = {name for name in set(state) - set(kept) if name.rpartition(".")[0] not in folding.norms}
    if lost:
        raise ModelError(f"{type(model).__name__} has no place for {listed(sorted(lost))}, which folding made.")
    missing = {name: torch.zeros_like(kept[name]) for name in kept if name not in state and name.endswith(".bias")}
    state = {name: tensor.to(dtypes.get(name, model.dtype)) for name, tensor in state.items() if name in kept}
    new.load_state_dict(state | missing)
    if model.can_generate():
        new.generation_config = copy.deepcopy(model.generation_config)
    return placed(new, model.device).train(model.training)
