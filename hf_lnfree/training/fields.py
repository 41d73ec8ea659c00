"""What a run can be told of its model and its training, beside what every `Trainer` can be told (`host_fields`).

Nothing heavy is imported here: `hf-lnfree train --help` reads it.
"""

from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal

import yaml

from ..checks import FILLED, SHARE, at_least, fits, require_fields
from ..errors import SettingsError
from .recipes import PAPER_MODELS, PAPER_ROWS, paper_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ALIASES = {"out": "output_dir", "device": "use_cpu"}
"""Names of this package, in files and as flags, beside those of `TrainingArguments`, which mean the same."""

FROM_SCRATCH = 1e-3
"""The learning rate of a new model where files and flags give none, as in the paper; 5e-5 suits a checkpoint."""

OF_A_ROW = (
    *("norm", "final_norm", "layer_norms", "activation", "activation_function", "hidden_act"),
    *("layer_activations", "slope_scope", "negative_slope"),
)
"""Fields of a configuration that a row stands for."""

OF_THE_HOST = {
    **dict.fromkeys(
        ("architectures", "auto_map", "transformers_version", "tokenizer_class"), "is written with a model"
    ),
    **dict.fromkeys(("return_dict", "output_hidden_states"), "is what a training reads of its model"),
    **dict.fromkeys(("is_encoder_decoder", "add_cross_attention"), "is for a decoder beside an encoder"),
    **dict.fromkeys(("id2label", "label2id", "num_labels", "problem_type"), "is for classification"),
    **dict.fromkeys(("summary_type", "summary_use_proj", "summary_activation"), "is for classification"),
    **dict.fromkeys(("summary_proj_to_labels", "summary_first_dropout", "classifier_dropout"), "is for classification"),
    "chunk_size_feed_forward": "is read by no GPT-2 and no GPT-NeoX",
}
"""Fields of a configuration that are none of a training's: name -> why."""

DTYPES = ("float32", "float64", "bfloat16", "float16")
"""What weights may be in, as torch names it."""


@dataclass(kw_only=True)
class CheckpointArguments:
    """How checkpoints are read."""

    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code that comes with a model or a tokenizer."}
    )
    revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the model, if it is on the Hub."}
    )

    _argument_group_name = "Model"

    def __post_init__(self) -> None:
        require_fields(self, dict.fromkeys(("revision", "model_name_or_path", "attn_implementation"), FILLED))


@dataclass
class ModelArguments(CheckpointArguments):
    """Either a row of the paper, changed by config_overrides, or an existing checkpoint."""

    family: str = field(
        default="gpt2",
        metadata={
            "help": "gpt2 (GPT-2 small), gpt_neox (Pythia-70M), llama (SmolLM-135M), opt (OPT-125M), qwen3 (0.6B), "
            "bert (base), vit (B/16), t5 (small), whisper (tiny)."
        },
    )
    row: str = field(default="SM+R", metadata={"help": f"A row of the paper: {', '.join(PAPER_ROWS)}."})
    config_overrides: dict | str | None = field(
        default="{}", metadata={"help": "Fields of the configuration, like '{n_layer: 8, n_embd: 96}'."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Begin with this checkpoint; --family and --row are not used then."}
    )
    attn_implementation: str = field(
        default="auto", metadata={"help": "eager, sdpa, flash_attention_2, ...; auto: the fastest, see choices.json."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # A YAML file gives a mapping, the command line its text; the text is what a result file records.
        given = as_mapping(self.config_overrides)
        if not isinstance(self.config_overrides, str):
            self.config_overrides = yaml.safe_dump(given, default_flow_style=True).strip()
        for name in given:
            if name in OF_THE_HOST:
                raise SettingsError(f"config_overrides: {name} {OF_THE_HOST[name]}: leave it out.")
        if (dtype := given.get("dtype")) is not None and dtype not in DTYPES:
            raise SettingsError(f"config_overrides: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        if self.family not in PAPER_MODELS or self.row not in PAPER_ROWS:
            paper_config(self.family, self.row)  # raises, naming what is allowed

    @property
    def overrides(self) -> dict[str, Any]:
        return as_mapping(self.config_overrides)

    @property
    def name(self) -> str:
        """What pictures call the model: its row and what was changed of it, or the last part of its checkpoint."""
        if self.model_name_or_path is not None:
            return PurePath(self.model_name_or_path).name
        changed = [f"{name}: {value}" for name, value in self.overrides.items() if name in OF_A_ROW]
        return f"{self.row} ({', '.join(changed)})" if changed else self.row

    def access(self, name: str | None) -> dict[str, Any]:
        """How a checkpoint of that name is read: the revision is that of the model."""
        revision = self.revision if name == self.model_name_or_path else None
        return {"trust_remote_code": self.trust_remote_code, "revision": revision}

    def config(self, context_length: int, **defaults: Any) -> "PreTrainedConfig":
        """The model's configuration; config_overrides win over `defaults`, which win over the row's own fields."""
        if self.model_name_or_path is not None:
            from ..loading import load_config

            return load_config(self.model_name_or_path, **self.access(self.model_name_or_path), **self.overrides)
        return paper_config(self.family, self.row, context_length, **{**defaults, **self.overrides})


class YAML(yaml.SafeLoader):
    """YAML in which no key of a mapping stands twice: PyYAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(None, None, f"{key.value!r} stands there twice", key.start_mark)
            seen.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep)


def as_mapping(overrides: Any) -> dict[str, Any]:
    """`config_overrides`, which may be written as text, as a mapping."""
    try:
        found = yaml.load(overrides, YAML) if isinstance(overrides, str) else overrides
    except yaml.YAMLError as error:
        raise SettingsError(f"config_overrides is not YAML: {error}") from error
    if found is not None and not fits(found, dict[str, Any]):
        raise SettingsError(f"config_overrides must be a mapping like '{{n_layer: 8}}', got {overrides!r}.")
    return found or {}


@dataclass
class TrainingFields:
    """What `LNFreeTrainingArguments` have beyond `TrainingArguments`, or begin with otherwise."""

    output_dir: str = field(
        default="runs/train", metadata={"help": "Folder for checkpoints, log.jsonl, entropy.json and results.json."}
    )
    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] = field(
        default="end", metadata={"help": "When --push-to-hub pushes; end: the finished run, with its card."}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Log losses that are NaN as 0."})
    loss: Literal["auto", "plain", "compiled", "chunked"] = field(
        default="auto",
        metadata={"help": "Equal in value: plain, compiled (faster), chunked (no logits in memory); auto chooses."},
    )
    slope_weight_decay: float | None = field(
        default=None, metadata={"help": "Weight decay of learnable slopes; none by default (the paper's code: 0.1)."}
    )
    entropy_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the penalty on head entropies away from a learned target; 0 for none."},
    )
    entropy_tolerance: float = field(
        default=0.1, metadata={"help": "Deviation that costs nothing, as a share of the largest entropy."}
    )
    entropy_target: float = field(default=0.5, metadata={"help": "Share of it where the learned targets start."})
    entropy_form: Literal["heads", "rows"] = field(
        default="heads",
        metadata={"help": "Means of heads against the causal bound, or rows against ln T as published."},
    )
    probe_steps: int = field(
        default=100, metadata={"help": "Sample entropy, slopes and more of every layer every N steps; 0 for never."}
    )
    probe_sequences: int = field(default=16, metadata={"help": "Held-out windows that a sample looks at."})
    probe_geometry: bool = field(
        default=False,
        metadata={"help": "Sample the geometry of every MLP too: specialisation, selectivity, directions."},
    )
    recorder_samples: int = field(
        default=20, metadata={"help": "Samples kept in memory, for flight_recorder.json when a run dies."}
    )
    on_nonfinite: Literal["stop", "skip", "rollback"] = field(
        default="stop",
        metadata={"help": "When loss or gradient is not finite; rollback: to the last sample, at half the rate."},
    )
    attention_report_windows: int = field(
        default=256, metadata={"help": "Held-out windows behind the final entropy report; 0 for none."}
    )

    _argument_group_name = "Training"


RANGES: dict[str, Any] = {
    **dict.fromkeys(("slope_weight_decay", "entropy_weight", "probe_steps", "attention_report_windows"), at_least(0)),
    **dict.fromkeys(("entropy_tolerance", "entropy_target"), SHARE),
    **dict.fromkeys(("probe_sequences", "recorder_samples"), at_least(1)),
}
"""What numbers of `TrainingFields` may be."""
