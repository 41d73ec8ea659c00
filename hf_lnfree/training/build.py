"""What a run begins with: its objective, its data, its model."""

from dataclasses import replace
from typing import Any

import transformers
from transformers import PreTrainedModel

from ..data.arguments import DIGITS, STDLIB, DataArguments
from ..data.objectives import Objective, objective_of_class
from ..data.splits import RunData, load_data
from ..errors import SettingsError
from ..loading import load_config, load_model
from .arguments import ModelArguments
from .recipes import objectives_of

NEEDS = {"image": ("images", f"{DIGITS!r}, or "), "speech": ("recordings", "")}
"""Objective -> what it reads, and what of that needs no network; others read text."""


def with_objective(model_args: ModelArguments, data_args: DataArguments) -> DataArguments:
    """
    The same data, with the objective of the family or of the checkpoint where none was asked for.

    Raises:
        SettingsError: a family that is not trained for the one that was.
        ModelError: the configuration of a checkpoint cannot be read.
    """
    wanted, start = data_args.objective, model_args.model_name_or_path
    if start is None:
        allowed = objectives_of(model_args.family)
        if wanted is not None and wanted not in allowed:
            raise SettingsError(
                f"objective={wanted!r} is not for family {model_args.family!r}, which is trained for "
                f"{' or '.join(map(repr, allowed))}."
            )
        found = wanted or allowed[0]
    elif wanted is not None:
        found = wanted
    else:
        config = load_config(start, **model_args.access(start))
        found = objective_of_class((config.architectures or [""])[0]).name
    kind, own = NEEDS.get(found, ("text", f"{STDLIB!r}, or "))
    if data_args.data in (STDLIB, DIGITS) and repr(data_args.data) not in own:
        raise SettingsError(
            f"objective={found!r} needs {kind}, and data={data_args.data!r} is none. Give {own}a folder or a Hub "
            "dataset."
        )
    return replace(data_args, objective=found)


def auto_class(objective: Objective) -> Any:
    """The Auto class of transformers for it."""
    return getattr(transformers, objective.auto_class)


def load_run_data(model_args: ModelArguments, data_args: DataArguments, seed: int = 0) -> RunData:
    """The data of a run; without a tokenizer of its own, a checkpoint's is taken.

    Raises:
        DataError, ModelError: as `load_data`.
        SettingsError: as `with_objective`.
    """
    data_args = with_objective(model_args, data_args)
    name = data_args.tokenizer or model_args.model_name_or_path
    return load_data(replace(data_args, tokenizer=name), seed, **model_args.access(name))


def build_model(model_args: ModelArguments, data_args: DataArguments, data: RunData) -> PreTrainedModel:
    """
    A new model of a row, or a checkpoint.

    Raises:
        SettingsError: the tokenizer, the windows or the images do not fit it.
        ModelError: a checkpoint that cannot be loaded.
    """
    kind, start = auto_class(data.objective), model_args.model_name_or_path
    config = model_args.config(data_args.context_length, **data.fields)
    vocabulary = data.fields.get("vocab_size")
    if vocabulary is not None and config.vocab_size < vocabulary:
        raise SettingsError(
            f"The tokenizer has {vocabulary} entries and the model's vocabulary {config.vocab_size}. "
            + ("Leave vocab_size out." if start is None else "Use its own (--tokenizer).")
        )
    for name, (says, advice) in SIZES.items():
        wanted = data.fields.get(name)
        if wanted is not None and (found := getattr(config, name)) != wanted:
            raise SettingsError(
                f"The {data.objective.example}s have {wanted} {says}, and the model takes {found}. {advice}"
            )
    if start is None:
        return kind.from_config(config, trust_remote_code=False)
    labels = data.fields.get("id2label")
    fresh = labels is not None and labels != config.id2label
    if fresh:
        config.id2label, config.label2id = labels, data.fields["label2id"]
    access = model_args.access(start)
    changed = bool(model_args.overrides) or fresh
    return load_model(start, kind, config=config, changed=changed, new_shapes=("classifier",) * fresh, **access)


SIZES = {
    "image_size": ("pixels a side", "Leave image_size out of config_overrides, or give --image-size."),
    "num_channels": ("channels", "Leave num_channels out of config_overrides, or give images with as many."),
    "max_source_positions": (
        "positions",
        "Leave max_source_positions out of config_overrides, or give --audio-seconds.",
    ),
    "num_mel_bins": ("mel bins", "Leave num_mel_bins out of config_overrides."),
}
"""Field of a configuration that the data decide -> what it counts, and what to do where the model has another."""
