"""Corpus -> tokenizer -> windows of token ids in a memory-mapped file, cached by the hash of all that went in."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub import constants
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .cache import atomic_folder, content_key
from .corpus import STDLIB, Corpus, load_corpus, split_by_hash
from .tokenization import load_tokenizer, tokenizer_hash

BATCH = 256  # documents tokenised at a time


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
    context_length: int = field(default=128, metadata={"help": "tokens a window"})
    windows: Literal["exact", "packed"] = field(
        default="exact",
        metadata={"help": "exact: within a document, tail dropped (the paper); packed: documents joined by EOS"},
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "name or folder; without it a byte-level BPE is trained on the corpus"}
    )
    vocab_size: int = field(default=4096, metadata={"help": "size of the BPE that is trained"})
    cache_dir: str | None = field(default=None, metadata={"help": "where tokenised data is kept; HF_HOME/hf_lnfree"})

    _argument_group_name = "data arguments"

    def __post_init__(self) -> None:
        if self.windows not in ("exact", "packed"):
            raise ValueError(f"windows={self.windows!r} is not known. Allowed: 'exact', 'packed'.")
        if self.context_length < 2:
            raise ValueError(f"context_length must be at least 2 (one prediction), got {self.context_length}.")
        if self.validation_dataset is None and not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie between 0 and 1, got {self.validation_fraction}.")


class TokenWindows(Dataset):
    """
    Windows of exactly T token ids in a memory-mapped file that several processes can share.

    Args:
        folder: holds `tokens.bin` and `meta.json`, as `build_windows` writes them.
        limit: use N windows, spread evenly: neighbours are from the same file.
    """

    def __init__(self, folder: Path, limit: int | None = None):
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
        shape = (self.meta["windows"], self.meta["context_length"])
        step = max(1, shape[0] // limit) if limit else 1
        self.tokens = np.memmap(folder / "tokens.bin", dtype=self.meta["dtype"], mode="r", shape=shape)[::step][:limit]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.tokens[index].astype(np.int64))
        return {"input_ids": ids, "labels": ids}

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.size)

    @property
    def sha256(self) -> str:
        """Hash of the documents, the tokenizer and the way of cutting."""
        return self.meta["sha256"]


@dataclass
class TextData:
    """What a run trains and validates on."""

    tokenizer: PreTrainedTokenizerBase
    train: TokenWindows
    validation: TokenWindows


def load_data(args: DataArguments) -> TextData:
    """Read, split, tokenise and cut the corpus; everything is cached by content and found again.

    Raises:
        ValueError: an empty corpus, or one without a single window.
    """
    train, validation = load_splits(args)
    cache = cache_folder(args)
    tokenizer = load_tokenizer(args.tokenizer, train, args.vocab_size, cache)
    parts = {}
    for name, part in {"train": train, "validation": validation}.items():
        folder = build_windows(part, tokenizer, args.context_length, args.windows, cache, name)
        parts[name] = TokenWindows(folder, args.max_validation_windows if name == "validation" else None)
    return TextData(tokenizer, **parts)


def load_splits(args: DataArguments) -> tuple[Corpus, Corpus]:
    """The documents to train on and those to validate on."""
    corpus = load_corpus(args.dataset, args.max_files, args.data_shuffle_seed, args.text_column)
    if args.validation_dataset is None:
        return split_by_hash(corpus, args.validation_fraction)
    return corpus, load_corpus(args.validation_dataset, args.max_validation_files, None, args.text_column)


def load_validation(args: DataArguments, everything: bool = False) -> TokenWindows:
    """The held-out windows alone, or `everything`, for a tokenizer that exists; nothing is tokenised for training."""
    if everything:
        validation = load_corpus(args.dataset, args.max_files, args.data_shuffle_seed, args.text_column)
    else:
        _, validation = load_splits(args)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    folder = build_windows(validation, tokenizer, args.context_length, args.windows, cache_folder(args), "validation")
    return TokenWindows(folder, args.max_validation_windows)


def cache_folder(args: DataArguments) -> Path:
    return Path(args.cache_dir or Path(constants.HF_HOME) / "hf_lnfree").expanduser()


def build_windows(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, length: int, windows: str, cache: Path, split: str
) -> Path:
    """Tokenise and cut a corpus into a folder that `TokenWindows` opens; found again when nothing changed."""
    key = content_key(corpus.sha256, tokenizer_hash(tokenizer), length, windows)
    folder = cache / "windows" / key
    if folder.exists():
        return folder
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    count = tokens = 0
    with atomic_folder(folder) as partial:
        with open(partial / "tokens.bin", "wb") as file:
            for ids, is_window in cut(_tokenised(corpus, tokenizer, split), length, windows, tokenizer.eos_token_id):
                tokens += len(ids)
                if is_window:
                    file.write(np.asarray(ids, dtype=dtype).tobytes())
                    count += 1
        if not count:
            raise ValueError(
                f"The {split} split of {corpus.name!r} holds no window of {length} tokens ({len(corpus.texts)} "
                f"documents, {tokens} tokens). Shorten --context_length, use --windows packed, or give more text."
            )
        meta = {
            "sha256": key,
            "corpus": corpus.name,
            "corpus_sha256": corpus.sha256,
            "documents": len(corpus.texts),
            "cutting": windows,
            "windows": count,
            "context_length": length,
            "dropped_tokens": tokens - count * length,
            "dtype": np.dtype(dtype).name,
        }
        (partial / "meta.json").write_text(json.dumps(meta, indent=1))
    return folder


def cut(documents: Iterable[list[int]], length: int, windows: str, eos: int | None) -> Iterator[tuple[list[int], bool]]:
    """Pieces of token ids, each with whether it is a whole window; what is not, is dropped by the caller."""
    if windows == "packed" and eos is None:
        raise ValueError("windows='packed' joins documents with an end-of-text token, and this tokenizer has none.")
    rest: list[int] = []
    for ids in documents:
        rest = [*rest, *ids, eos] if windows == "packed" else ids  # type: ignore[list-item]
        whole = len(rest) - len(rest) % length
        for start in range(0, whole, length):
            yield rest[start : start + length], True
        rest = rest[whole:]
        if windows == "exact" and rest:
            yield rest, False
    if windows == "packed" and rest:
        yield rest, False


def _tokenised(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, split: str) -> Iterator[list[int]]:
    with tqdm(total=len(corpus.texts), desc=f"tokenising {split}", unit="file", leave=False) as bar:
        for start in range(0, len(corpus.texts), BATCH):
            texts = corpus.texts[start : start + BATCH]
            # Documents are longer than the tokenizer's maximum on purpose; verbose=False keeps it from saying so.
            yield from tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            bar.update(len(texts))
