"""Which data, which tokenizer, which windows. Nothing heavy is imported here: `hf-lnfree train --help` reads it."""

from dataclasses import dataclass, field
from typing import Any, Literal

from ..checks import FILLED, MOST_PROCESSES, SHARE, Range, at_least, require_fields
from ..errors import SettingsError
from .objectives import OBJECTIVES, objective_of

STDLIB = "stdlib"
"""The name of the corpus that needs no network: Python's standard library."""
DIGITS = "digits"
"""The name of the images that need no network: scikit-learn's handwritten digits."""
SMALLEST_VOCABULARY = 258  # all bytes, the end of a text and padding
BETWEEN = Range(0, 1, open="both")
RANGES: dict[str, Any] = {
    "context_length": at_least(2),  # one prediction
    "vocab_size": Range(SMALLEST_VOCABULARY, 10_000_000),  # the tokenizers library reserves memory for as many
    "validation_fraction": SHARE,
    "data_shuffle_seed": at_least(0),
    "image_size": at_least(1),
    "audio_seconds": Range(1, 30),
    **dict.fromkeys(("max_documents", "max_validation_documents", "max_validation_windows"), at_least(1)),
    "tokenizing_processes": Range(1, MOST_PROCESSES),
    **dict.fromkeys(("data", "validation_data", "text_column", "tokenizer", "cache_dir"), FILLED),
}
"""What numbers and texts may be."""


@dataclass
class DataArguments:
    """Corpus, objective, tokenizer and windows."""

    data: str = field(
        default=STDLIB,
        metadata={
            "help": "Text: 'stdlib' (Python's standard library), a file, a folder, or a Hub dataset as NAME or "
            "NAME:SPLIT. Images: 'digits' (scikit-learn's), a folder with one for each label, or a Hub dataset. "
            "Speech: a folder of WAV files with metadata.jsonl, or a Hub dataset."
        },
    )
    objective: str | None = field(
        default=None,
        metadata={
            "help": "What is predicted, by the family if not given: "
            + ", ".join(f"{objective.name} ({objective.says})" for objective in OBJECTIVES.values())
            + "."
        },
    )
    validation_data: str | None = field(
        default=None, metadata={"help": "Held-out text, named like --data; without it, a part of --data."}
    )
    validation_fraction: float = field(
        default=0.05, metadata={"help": "Share of the documents that is held out, chosen by their hash; at least one."}
    )
    text_column: str | None = field(
        default=None,
        metadata={"help": "Column with the text, of a table or a Hub dataset; content, text or code by default."},
    )
    max_documents: int | None = field(
        default=None, metadata={"help": "Train on the first N documents (files of a folder), after shuffling."}
    )
    max_validation_documents: int | None = field(
        default=None, metadata={"help": "Validate on the first N documents of --validation-data."}
    )
    max_validation_windows: int | None = field(default=None, metadata={"help": "Validate on N windows, spread evenly."})
    data_shuffle_seed: int | None = field(
        default=None, metadata={"help": "Shuffle a Hub dataset with this seed before the first N are taken."}
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Stream Hub datasets and keep the documents that are used, instead of downloading all."},
    )
    context_length: int = field(default=128, metadata={"help": "Tokens a window."})
    packing: Literal["exact", "packed"] = field(
        default="exact",
        metadata={
            "help": "exact: windows within a document, its tail dropped (the paper); packed: documents joined "
            "by the end-of-text token."
        },
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Bring images to N x N pixels; without it they must have one size."}
    )
    audio_seconds: int = field(
        default=30, metadata={"help": "Cut recordings after N seconds, and fill up shorter ones."}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub name; without it the checkpoint's own, or for a new model a byte-level BPE trained "
            "on the text."
        },
    )
    vocab_size: int = field(default=4096, metadata={"help": "Entries of the BPE that is trained."})
    tokenizing_processes: int | None = field(
        default=None, metadata={"help": "Processes that tokenise; one a core by default."}
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Where tokenised text is kept; HF_HOME/hf_lnfree by default."}
    )

    _argument_group_name = "Data"

    def __post_init__(self) -> None:
        require_fields(self, RANGES)
        objective_of(self.objective)
        if self.validation_data is None and self.validation_fraction not in BETWEEN:
            raise SettingsError(f"validation_fraction must be {BETWEEN}, got {self.validation_fraction}.")
