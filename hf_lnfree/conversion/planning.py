"""What must be true of a stock checkpoint before it becomes a model of ours, and how it does."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from ..errors import ModelError, listed
from ..loading import reading
from .checkpoint import Checkpoint
from .families import Family, family_of, set_block_norms
from .norm_sites import DISABLING_EPS, norm_sites
from .published_removal import fixed_deviations, is_state

DEFAULT_EPS = 1e-5
# Masks and positions that old checkpoints hold and no class reads.
BUFFERS = re.compile(r"(^|\.)(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$|embeddings\.position_ids$")
# Heads that BERT and ViT were pretrained with; transformers leaves them out for a class that has none.
OTHER_HEADS = re.compile(r"(^|\.)pooler\.|^cls\.seq_relationship\.")


@dataclass
class Plan:
    """How a stock checkpoint becomes one of ours."""

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    names: dict[str, str]
    """Name in the files -> name in the model; what is left out is not here."""
    own: list[str] = field(default_factory=list)
    """What the class ties and the checkpoint does not."""
    values: dict[str, Tensor] = field(default_factory=dict)
    """What the model has beside the stored tensors: the deviations that its norms are fixed to."""
    disabled: bool = False
    """Whether its LayerNorms are disabled, by their epsilon or a fixed deviation, and have to be folded."""
    absent: set[str] = field(default_factory=set)
    """Parameters of norms that the checkpoint does not have; "none" stands there in the model."""
    left_out: list[str] = field(default_factory=list)
    """Names in the files that the class has no place for, as the stock class has none."""
    notes: list[str] = field(default_factory=list)


def plan(checkpoint: Checkpoint) -> Plan:
    """
    Compare a stock checkpoint with the class of ours that has its parameters.

    LayerNorms that the checkpoint has no parameters for are taken to be identities ("none"), and an epsilon from 1e6 on
    to disable those that are there: the two forms in which GPT-2 without LayerNorm is published. Of the third, the
    training checkpoint of a finished removal, norms have "fixed_scale".

    Raises:
        ModelError: another architecture, missing or unknown tensors, shapes that do not fit the configuration; a
            removal that is not finished.
    """
    with reading(checkpoint.source):
        model_class, config, eps = target(checkpoint)
        if deviations := fixed_deviations(checkpoint):
            config.norm = config.final_norm = "fixed_scale"
        with torch.device("meta"):
            model = model_class(config)
    parameters = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    renaming = [change for change in get_model_conversion_mapping(model) if isinstance(change, WeightRenaming)]
    found = {
        name: find_name(renamed(name, renaming), model.base_model_prefix, parameters) for name in checkpoint.shapes
    }
    result = Plan(model_class, config, {stored: name for stored, name in found.items() if name is not None})
    for norm, deviation in deviations.items():
        if (name := find_name(f"{norm}sigma", model.base_model_prefix, parameters)) is not None:
            result.values[name] = deviation
    missing = set(parameters) - set(result.names.values()) - set(result.values)
    result.absent = absent_norms(model, missing, config)
    missing -= result.absent
    for tied, source in model.all_tied_weights_keys.items():
        if {tied, source} <= set(result.names.values()):
            untie_unless_equal(checkpoint, result, tied, source, model.all_tied_weights_keys)
        else:
            missing -= {tied}
    passed_over = [BUFFERS, *map(re.compile, model._keys_to_ignore_on_load_unexpected or ())]
    unknown = {stored for stored, name in found.items() if name is None and not is_state(stored, deviations)}
    unknown = {stored for stored in unknown if not any(known.search(stored) for known in passed_over)}
    result.left_out = sorted(filter(OTHER_HEADS.search, unknown))
    unknown -= set(result.left_out)
    problems = [
        f"{what} {len(names)} tensors: {listed(sorted(names))}"
        for what, names in (("lacks", missing), ("has unknown", unknown))
        if names
    ]
    if wrong := [
        f"{stored} as {list(checkpoint.shapes[stored])} instead of {list(parameters[name])}"
        for stored, name in result.names.items()
        if checkpoint.shapes[stored] != parameters[name]
    ]:
        problems.append(f"has {listed(wrong)}")
    if problems:
        raise ModelError(f"{checkpoint.source} is not what its config.json says: it {'; it '.join(problems)}.")
    if result.left_out:
        result.notes.append(f"Left out, as {model_class.__name__} has no part for it: {listed(result.left_out)}.")
    if deviations:
        result.disabled = True
        result.notes.append(
            f"The removal of its {len(deviations)} LayerNorms is finished (arXiv 2507.02559): each divides by the "
            "deviation that it was fixed to."
        )
    elif eps >= DISABLING_EPS:
        result.disabled = True
        result.notes.append(
            f"An epsilon of {eps:g} disables its LayerNorms: x / sqrt(var + eps) is taken as x / sqrt(eps)."
        )
    return result


def target(checkpoint: Checkpoint) -> tuple[type[PreTrainedModel], PreTrainedConfig, float]:
    """The class and configuration of ours for a stock checkpoint, with a norm in every place, and its epsilon."""
    stored = checkpoint.config
    family = family_of(stored.get("model_type", ""))
    if stored["model_type"] == family.config.model_type:
        raise ModelError(f"{checkpoint.source} is a model of this package already.")
    if "quantization_config" in stored:
        raise ModelError(f"{checkpoint.source} is quantized. Convert the weights that it was made from.")
    model_class = family.class_of(stored.get("architectures"), checkpoint.shapes)
    config = our_config(family, stored)
    return model_class, config, eps_of(family, config)


def our_config(family: Family, stored: Mapping[str, Any]) -> PreTrainedConfig:
    """The stock configuration with a norm in every place."""
    stock = family.stock_config.from_dict(dict(stored)).to_dict()
    fields = {k: v for k, v in stock.items() if k not in ("model_type", "architectures", "transformers_version")}
    norm = family.config.stock_norm
    after = "none" if family.stacks[-1].final_norm is None else norm
    return family.config(**fields | {"norm": norm, "final_norm": after})


def eps_of(family: Family, config: PreTrainedConfig) -> float:
    """The epsilon of every norm; that of `nn.LayerNorm` where the stock class knows no other."""
    return DEFAULT_EPS if family.eps_field is None else getattr(config, family.eps_field)


def renamed(stored: str, changes: Iterable[WeightRenaming]) -> str:
    """What transformers calls a tensor today that has an older name in a file."""
    for change in changes:
        stored, _ = change.rename_source_key(stored)
    return stored


def find_name(stored: str, prefix: str, parameters: Mapping[str, Any]) -> str | None:
    """The parameter that a stored tensor belongs to, with the backbone's prefix or without, whatever its head is."""
    candidates = (stored, f"{prefix}.{stored}", stored.removeprefix(f"{prefix}."))
    return next((name for name in candidates if name in parameters), None)


def absent_norms(model: PreTrainedModel, missing: set[str], config: PreTrainedConfig) -> set[str]:
    """The parameters of norms that a checkpoint does not have at all; `config` gets "none" for these."""
    parameters = dict(model.named_parameters())
    places: dict[int | None, set[str]] = {}
    for site in norm_sites(model):
        names = {f"{site.name}.{part}" for part in ("weight", "bias")} & set(parameters)
        places[site.layer] = places.get(site.layer, set()) | names
    gone = {layer for layer, names in places.items() if names <= missing}
    there = config.block_norms
    last = max(layer for layer in places if layer is not None)  # of those that the class has
    if {last, None} <= gone:
        config.final_norm = "none"
    else:
        gone -= {None}
    set_block_norms(config, ["none" if layer in gone else kind for layer, kind in enumerate(there)])
    return set().union(*(places[layer] for layer in gone))


def untie_unless_equal(
    checkpoint: Checkpoint, result: Plan, tied: str, source: str, model_ties: Mapping[str, str]
) -> None:
    """A head that is stored beside the embedding it should share: left out when equal, else it stays its own."""
    stored = {name: key for key, name in result.names.items()}
    if torch.equal(checkpoint.tensor(stored[tied]), checkpoint.tensor(stored[source])):
        del result.names[stored[tied]]
    else:
        result.own.append(tied)
        if len(model_ties) == 1:  # T5 ties the embeddings of its stacks by the same field
            result.config.tie_word_embeddings = False
        result.notes.append(f"{tied} differs from {source}, which config.json ties it to: it is a weight of its own.")
