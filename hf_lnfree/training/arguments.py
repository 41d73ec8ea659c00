"""What `hf-lnfree train` can be told: arguments of the model, the data and the training."""

from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal

import torch
import yaml
from transformers import AutoConfig, PreTrainedConfig, TrainingArguments

from .corpus import STDLIB
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
            raise ValueError(
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
class DataArguments:
    """Corpus, tokenizer and windows."""

    dataset: str = field(
        default=STDLIB,
        metadata={"help": "'stdlib', a file, a folder, or a Hub dataset as 'name' or 'name:split'"},
    )
    validation_dataset: str | None = field(
        default=None, metadata={"help": "as --dataset; without it, validation_fraction of the files by their hash"}
    )
    validation_fraction: float = field(default=0.05, metadata={"help": "share of files held out, by file hash"})
    text_column: str | None = field(default=None, metadata={"help": "column of a Hub dataset that holds the text"})
    max_files: int | None = field(default=None, metadata={"help": "train on the first N files, after shuffling"})
    max_validation_files: int | None = field(default=None, metadata={"help": "validate on the first N files"})
    max_validation_windows: int | None = field(default=None, metadata={"help": "validate on N windows, spread evenly"})
    data_shuffle_seed: int | None = field(default=None, metadata={"help": "shuffle a Hub dataset before max_files"})
    streaming: bool = field(
        default=False, metadata={"help": "stream Hub datasets and keep max_files documents, instead of downloading all"}
    )
    context_length: int = field(default=128, metadata={"help": "tokens a window"})
    windows: Literal["exact", "packed"] = field(
        default="exact",
        metadata={"help": "exact: within a document, tail dropped (the paper); packed: documents joined by EOS"},
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "name or folder; without it a byte-level BPE is trained on the corpus"}
    )
    vocab_size: int = field(default=4096, metadata={"help": "size of the BPE that is trained"})
    tokenizing_processes: int | None = field(default=None, metadata={"help": "processes that tokenise; one a core"})
    cache_dir: str | None = field(default=None, metadata={"help": "where tokenised data is kept; HF_HOME/hf_lnfree"})

    _argument_group_name = "data arguments"

    def __post_init__(self) -> None:
        if self.windows not in ("exact", "packed"):
            raise ValueError(f"windows={self.windows!r} is not known. Allowed: 'exact', 'packed'.")
        if self.context_length < 2:
            raise ValueError(f"context_length must be at least 2 (one prediction), got {self.context_length}.")
        if self.tokenizing_processes is not None and self.tokenizing_processes < 1:
            raise ValueError(f"tokenizing_processes must be at least 1, got {self.tokenizing_processes}.")
        if self.validation_dataset is None and not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie between 0 and 1, got {self.validation_fraction}.")


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
