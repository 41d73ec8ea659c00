"""Which text, which tokenizer, which windows."""

from dataclasses import dataclass, field
from typing import Literal

from ..errors import SettingsError

STDLIB = "stdlib"
"""The name of the corpus that needs no network: Python's standard library."""


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
            raise SettingsError(f"windows={self.windows!r} is not known. Allowed: 'exact', 'packed'.")
        if self.context_length < 2:
            raise SettingsError(f"context_length must be at least 2 (one prediction), got {self.context_length}.")
        if self.tokenizing_processes is not None and self.tokenizing_processes < 1:
            raise SettingsError(f"tokenizing_processes must be at least 1, got {self.tokenizing_processes}.")
        if self.validation_dataset is None and not 0 < self.validation_fraction < 1:
            raise SettingsError(f"validation_fraction must lie between 0 and 1, got {self.validation_fraction}.")
