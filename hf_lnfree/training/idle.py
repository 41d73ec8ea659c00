"""Fields that a run would not look at are refused where they are given: whoever sets one expects it to do something.

What a base file says is not asked for here, nor what a later place switches off: rows and scales share a base of which
each reads its part.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedConfig
from transformers.training_args import SchedulerType

from ..data.arguments import STDLIB
from ..errors import SettingsError
from ..models.configuration_lnfree import WITH_ALPHA
from .fields import as_mapping

SLOPES = {"leaky_relu", "learnable_leaky_relu", "prelu"}
LEARNED = {"learnable_leaky_relu", "prelu"}
MODEL = ("family", "row", "model_name_or_path")
WITHOUT_WARMUP = (SchedulerType.CONSTANT, SchedulerType.REDUCE_ON_PLATEAU)


@dataclass(frozen=True)
class Reader:
    """What reads a field: whether it is there, in which words, and the fields that decide it."""

    there: Callable[[Any], Any]
    words: str
    decided_by: tuple[str, ...]


PENALTY = Reader(lambda run: run.entropy_weight > 0, "entropy_weight above 0", ("entropy_weight",))
CHOICE_OF_BEST = Reader(
    lambda run: run.load_best_model_at_end or run.save_strategy == "best" or "plateau" in run.lr_scheduler_type,
    "load_best_model_at_end, save_strategy 'best' or lr_scheduler_type 'reduce_lr_on_plateau'",
    ("load_best_model_at_end", "save_strategy", "lr_scheduler_type"),
)
TEXT = Reader(lambda run: run.objective != "image", "an objective on text", ("objective", "family"))
OF_A_RUN = {
    **dict.fromkeys(("entropy_tolerance", "entropy_target", "entropy_form"), PENALTY),
    **dict.fromkeys(("metric_for_best_model", "greater_is_better"), CHOICE_OF_BEST),
    "num_train_epochs": Reader(lambda run: run.max_steps < 0, "max_steps=-1, which otherwise wins", ("max_steps",)),
    **dict.fromkeys(
        ("probe_sequences", "probe_geometry"),
        Reader(lambda run: run.probe_steps > 0, "probe_steps above 0", ("probe_steps",)),
    ),
    "eval_steps": Reader(lambda run: run.eval_strategy == "steps", "eval_strategy 'steps'", ("eval_strategy",)),
    "save_steps": Reader(lambda run: run.save_strategy == "steps", "save_strategy 'steps'", ("save_strategy",)),
    "save_total_limit": Reader(lambda run: run.save_strategy != "no", "a save_strategy", ("save_strategy",)),
    "warmup_steps": Reader(
        lambda run: run.lr_scheduler_type not in WITHOUT_WARMUP,
        "an lr_scheduler_type with a warm-up",
        ("lr_scheduler_type",),
    ),
    "validation_fraction": Reader(
        lambda run: run.validation_data is None, "no validation_data, which otherwise wins", ("validation_data",)
    ),
    "max_validation_documents": Reader(
        lambda run: run.validation_data is not None, "validation_data", ("validation_data",)
    ),
    **dict.fromkeys(("context_length", "tokenizer", "packing"), TEXT),
    "audio_seconds": Reader(lambda run: run.objective == "speech", "objective 'speech'", ("objective", "family")),
    "image_size": Reader(lambda run: run.objective == "image", "objective 'image'", ("objective", "family")),
    **dict.fromkeys(
        ("text_column", "streaming", "data_shuffle_seed"),
        Reader(
            lambda run: {run.data, run.validation_data} - {STDLIB, None},
            f"data or validation_data other than {STDLIB!r}",
            ("data", "validation_data"),
        ),
    ),
    "vocab_size": Reader(
        lambda run: run.tokenizer is None and getattr(run, "model_name_or_path", None) is None and TEXT.there(run),
        "neither tokenizer nor model_name_or_path, which have a vocabulary of their own",
        ("tokenizer", "model_name_or_path"),
    ),
    **dict.fromkeys(
        ("family", "row"),
        Reader(
            lambda run: run.model_name_or_path is None,
            "no model_name_or_path, which otherwise wins",
            ("model_name_or_path",),
        ),
    ),
    "revision": Reader(
        lambda run: getattr(run, "model_name_or_path", "of a removal") is not None,
        "model_name_or_path",
        ("model_name_or_path",),
    ),
    "slope_weight_decay": Reader(
        lambda run: run.config is None or LEARNED & set(run.config.block_activations),
        f"an activation whose slope is learned, {', '.join(sorted(LEARNED))}",
        ("activation_function", "hidden_act", "layer_activations", *MODEL),
    ),
    "lora_alpha": Reader(lambda run: run.lora_rank is not None, "lora_rank", ("lora_rank",)),
    "fsdp_config": Reader(lambda run: run.fsdp, "fsdp", ("fsdp",)),
}
"""Field of a run -> what reads it."""

OF_A_MODEL = {
    "negative_slope": Reader(
        lambda config: SLOPES & set(config.block_activations),
        f"an activation with a slope, {', '.join(sorted(SLOPES))}",
        ("activation_function", "hidden_act", "layer_activations", *MODEL),
    ),
    "slope_scope": Reader(
        lambda config: LEARNED & set(config.block_activations),
        f"an activation whose slope is learned, {', '.join(sorted(LEARNED))}",
        ("activation_function", "hidden_act", "layer_activations", *MODEL),
    ),
    "norm_alpha": Reader(
        lambda config: set(WITH_ALPHA) & {*config.block_norms, config.final_norm},
        f"a norm with an alpha, {', '.join(WITH_ALPHA)}",
        ("norm", "final_norm", "layer_norms", *MODEL),
    ),
    "weight_norm_scope": Reader(lambda config: config.weight_norm != "none", "a weight_norm", ("weight_norm", *MODEL)),
    "norm": Reader(lambda config: config.layer_norms is None, "no layer_norms, which otherwise win", ("layer_norms",)),
    **dict.fromkeys(
        ("activation_function", "hidden_act"),
        Reader(
            lambda config: config.layer_activations is None,
            "no layer_activations, which otherwise win",
            ("layer_activations",),
        ),
    ),
}
"""Field of config_overrides -> what reads it."""


def refuse_idle(
    parts: Sequence[Any], config: PreTrainedConfig | None, given: Mapping[str, Any], later: Mapping[str, Any]
) -> None:
    """
    Args:
        parts: the dataclasses of a run, as they are at the end.
        config: of its model, if that is a new one.
        given: the fields of the place that is asked.
        later: fields of the places after it.

    Raises:
        SettingsError: the first field that is given, is not what it is by default, and is read by nothing.
    """
    values = {field.name: getattr(part, field.name) for part in parts for field in dataclasses.fields(part)}
    defaults = {field.name: field.default for part in parts for field in dataclasses.fields(part)}
    overridden = as_mapping(given.get("config_overrides"))
    names = {*later, *as_mapping(later.get("config_overrides"))}
    refuse(SimpleNamespace(**values, config=config), OF_A_RUN, defaults, given, names)
    if config is not None:
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
        refuse(config, OF_A_MODEL, defaults, overridden, names, "config_overrides: ")


def refuse(
    values: Any,
    readers: Mapping[str, Reader],
    defaults: Mapping[str, Any],
    given: Collection[str],
    later: set[str],
    where: str = "",
) -> None:
    """Raise SettingsError for a field that is given in vain."""
    for name, reader in readers.items():
        if name in given and name in defaults and not {name, *reader.decided_by} & later:
            value = getattr(values, name)
            if value != defaults[name] and not reader.there(values):
                raise SettingsError(f"{where}{name}={value!r} has no effect: it needs {reader.words}. Leave it out.")
