"""What `hf-lnfree train` can be told of the model and the training; of the data, see `data.arguments`."""

from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal

import torch
import yaml
from transformers import AutoConfig, PreTrainedConfig, TrainingArguments

from ..errors import SettingsError
from .recipes import PAPER_MODELS, PAPER_ROWS, paper_config


@dataclass
class ModelArguments:
    """Either a row of the paper, changed by config_overrides, or an existing checkpoint."""

    family: str = field(default="gpt2", metadata={"help": "gpt2 (GPT-2 small) or gpt_neox (Pythia-70M)"})
    row: str = field(default="SM+R", metadata={"help": f"one of {', '.join(PAPER_ROWS)}"})
    config_overrides: str = field(
        default="{}", metadata={"help": "configuration fields as a YAML mapping, e.g. '{n_layer: 8, n_embd: 96}'"}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "start from these weights; family and row are not used then"}
    )

    attn_implementation: str = field(
        default="auto", metadata={"help": "eager, sdpa, flash_attention_2, ...; auto for the fastest, see choices.json"}
    )

    _argument_group_name = "model arguments"

    def __post_init__(self) -> None:
        # A YAML file gives a mapping, the command line its text; the text is what a result file records.
        if not isinstance(self.config_overrides, str):
            self.config_overrides = yaml.safe_dump(self.config_overrides, default_flow_style=True).strip()
        if not isinstance(self.overrides, dict):
            raise SettingsError(
                f"config_overrides must be a mapping like '{{n_layer: 8}}', got {self.config_overrides!r}."
            )
        if self.family not in PAPER_MODELS or self.row not in PAPER_ROWS:
            paper_config(self.family, self.row)  # raises, naming what is allowed

    @property
    def overrides(self) -> dict[str, Any]:
        return yaml.safe_load(self.config_overrides) or {}

    @property
    def name(self) -> str:
        """What pictures call the model: its row, or the last part of the checkpoint that it began with."""
        return self.row if self.model_name_or_path is None else PurePath(self.model_name_or_path).name

    def config(self, context_length: int, **defaults: Any) -> PreTrainedConfig:
        """The model's configuration; config_overrides win over `defaults`, which win over the row's own fields."""
        if self.model_name_or_path is not None:
            return AutoConfig.from_pretrained(self.model_name_or_path, **self.overrides)
        return paper_config(self.family, self.row, context_length, **{**defaults, **self.overrides})


@dataclass
class LNFreeTrainingArguments(TrainingArguments):
    """[`TrainingArguments`] with the study's own; NaN losses are logged as NaN and not as 0."""

    output_dir: str = field(default="runs/train", metadata={"help": "checkpoints, log.jsonl and results.json"})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "replace NaN in logged losses by 0"})
    dataloader_pin_memory: bool = field(
        default=torch.accelerator.is_available(), metadata={"help": "pin host memory; only with an accelerator"}
    )
    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] = field(
        default="end", metadata={"help": "when --push_to_hub pushes; end: the finished run, with its card"}
    )
    loss: Literal["auto", "plain", "compiled", "chunked"] = field(
        default="auto",
        metadata={"help": "equal in value: plain, compiled (faster), chunked (no logits in memory); auto chooses"},
    )
    slope_weight_decay: float | None = field(
        default=None, metadata={"help": "weight decay of learnable slopes; none by default (the paper's code: 0.1)"}
    )
    entropy_weight: float = field(
        default=0.0,
        metadata={"help": "of the penalty on head entropies away from a learned target; 0 for none"},
    )
    entropy_tolerance: float = field(
        default=0.1, metadata={"help": "deviation that costs nothing, as a share of the largest entropy"}
    )
    entropy_target: float = field(default=0.5, metadata={"help": "share of it where the learned targets start"})
    entropy_form: Literal["heads", "rows"] = field(
        default="heads",
        metadata={"help": "means of heads against the causal bound, or rows against ln T as published"},
    )
    probe_steps: int = field(
        default=100, metadata={"help": "sample entropy, slopes and more of every layer every N steps; 0 for never"}
    )
    probe_sequences: int = field(default=16, metadata={"help": "held-out windows that a sample looks at"})
    recorder_samples: int = field(
        default=20, metadata={"help": "samples kept in memory, for flight_recorder.json when a run dies"}
    )
    on_nonfinite: Literal["stop", "skip", "rollback"] = field(
        default="stop",
        metadata={"help": "when loss or gradient is not finite; rollback: to the last sample, at half the rate"},
    )
    attention_report_windows: int = field(
        default=256, metadata={"help": "held-out windows behind the final entropy report; 0 for none"}
    )

    _argument_group_name = "training arguments (transformers.TrainingArguments)"
