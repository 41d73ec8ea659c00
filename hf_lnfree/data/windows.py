"""Windows of token ids in a memory-mapped file: made once, by as many processes as there are cores, and checked.

Every process that trains on them shares the file. It is found again by the hash of all that went into it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Features, List, Value
from huggingface_hub import constants
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, default_data_collator

from ..errors import DataError
from ..files import atomic_folder, content_key, file_hash, write_json
from .arguments import DataArguments
from .corpus import Corpus, document_hash
from .processes import ending_with_us
from .tokenization import tokenizer_hash

BATCH = 256  # documents tokenised at a time
DOCUMENTS_A_PROCESS = 2000  # fewer are not worth starting one


class TokenWindows(Dataset):
    """
    Windows of exactly T token ids in a memory-mapped file that several processes can share.

    Args:
        folder: holds `tokens.bin` and `meta.json`, as `build_windows` writes them.
        limit: use N windows, spread evenly: neighbours are from the same file.
    """

    def __init__(self, folder: Path, limit: int | None = None):
        self.meta = read_meta(folder)
        shape = (self.meta["windows"], self.meta["context_length"])
        tokens = np.memmap(folder / "tokens.bin", dtype=self.meta["dtype"], mode="r", shape=shape)
        chosen = evenly(len(tokens), limit)
        self.tokens: np.ndarray = tokens if len(chosen) == len(tokens) else tokens[chosen]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
        """A whole batch in one read, as `DataLoader` asks for it."""
        ids = torch.from_numpy(self.tokens[indices].astype(np.int64))
        return [{"input_ids": row, "labels": row} for row in ids]

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.size)

    @property
    def sha256(self) -> str:
        """Hash of the file of tokens."""
        return self.meta["sha256"]


def evenly(total: int, limit: int | None) -> np.ndarray:
    """Numbers below `total`, at most `limit` of them, spread evenly."""
    count = total if limit is None else min(limit, total)
    return np.arange(count) * total // max(1, count)


def window_batches(windows: TokenWindows, count: int, batch_size: int = 16) -> list[torch.Tensor]:
    """`count` windows spread evenly over a split, as `input_ids` batches [B, T]."""
    return [batch["input_ids"] for batch in batches_of(windows, default_data_collator, count, batch_size)]


def batches_of(
    split: Any, collate: Callable[[list[Any]], Any], count: int, batch_size: int = 16
) -> list[dict[str, Any]]:
    """`count` examples spread evenly over a split, in batches as the model is trained on."""
    chosen = torch.linspace(0, len(split) - 1, min(count, len(split))).long().unique().tolist()
    examples = [split[i] for i in chosen]
    return [dict(collate(examples[i : i + batch_size])) for i in range(0, len(examples), batch_size)]


def cache_folder(args: DataArguments) -> Path:
    """Where tokenised data is kept."""
    return Path(args.cache_dir or Path(constants.HF_HOME) / "hf_lnfree").expanduser()


def build_windows(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, args: DataArguments, split: str) -> Path:
    """Tokenise and cut a corpus into a folder that `TokenWindows` opens; found again when nothing changed.

    Raises:
        DataError: no window, no end-of-text token to pack with, or a folder found whose tokens are damaged.
    """
    length = args.context_length
    key = content_key(corpus.key, tokenizer_hash(tokenizer), length, args.packing)
    folder = cache_folder(args) / "windows" / key
    if folder.exists():
        check_windows(folder)
        return folder
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    with atomic_folder(folder) as partial:
        documents = tokenised(corpus, tokenizer, dtype, split, partial, args.tokenizing_processes)
        contents, corpus_hash = hashlib.sha256(), hashlib.sha256()
        count = dropped = number = 0

        def ids() -> Iterator[np.ndarray]:
            nonlocal number
            for digest, document in documents:
                corpus_hash.update(digest)
                number += 1
                yield document

        with open(partial / "tokens.bin", "wb") as file:
            for windows, lost in cut(ids(), length, args.packing, tokenizer.eos_token_id):
                count, dropped = count + len(windows), dropped + lost
                contents.update(windows.data)
                file.write(windows.data)
        if not count:
            raise DataError(
                f"The {split} split of {corpus.name!r} holds no window of {length} tokens ({number} documents, "
                f"{dropped} tokens). Shorten --context-length, or give more text; a training may also pack documents "
                "(packing=packed)."
            )
        meta = {
            "sha256": contents.hexdigest(),
            "corpus": corpus.name,
            "corpus_sha256": corpus_hash.hexdigest(),
            "documents": number,
            "packing": args.packing,
            "windows": count,
            "context_length": length,
            "dropped_tokens": dropped,
            "dtype": dtype.name,
        }
        write_json(partial / "meta.json", meta)
        for scratch in partial.glob("ids*.arrow"):
            scratch.unlink()
    return folder


def read_meta(folder: Path) -> dict[str, Any]:
    """What `build_windows` wrote beside the tokens; ValueError when the two do not fit."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        expected = meta["windows"] * meta["context_length"] * np.dtype(meta["dtype"]).itemsize
        size = (folder / "tokens.bin").stat().st_size
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(damaged(folder, f"{type(error).__name__} {error}")) from error
    if size != expected:
        raise DataError(damaged(folder, f"tokens.bin has {size} bytes instead of {expected}"))
    return meta


def check_windows(folder: Path) -> None:
    """Raise DataError unless the tokens are those that were written."""
    meta = read_meta(folder)
    if file_hash(folder / "tokens.bin") != meta["sha256"]:
        raise DataError(damaged(folder, "the hash of tokens.bin is another one than meta.json says"))


def damaged(folder: Path, why: str) -> str:
    """What a user is told of a cache that cannot be used."""
    return f"The tokens cached in {folder} are damaged: {why}. Remove that folder; they are then made anew."


def cut(
    documents: Iterable[np.ndarray], length: int, packing: str, eos: int | None
) -> Iterator[tuple[np.ndarray, int]]:
    """For each document its whole windows, [N, `length`] token ids, and the number of tokens that are dropped."""
    if packing == "exact":
        for ids in documents:
            whole = len(ids) - len(ids) % length
            yield ids[:whole].reshape(-1, length), len(ids) - whole
        return
    if eos is None:
        raise DataError("packing='packed' joins documents with an end-of-text token, and this tokenizer has none.")
    rest = np.empty(0, np.uint16)
    for ids in documents:
        rest = np.concatenate((rest.astype(ids.dtype), ids, np.array([eos], ids.dtype)))
        whole = len(rest) - len(rest) % length
        yield rest[:whole].reshape(-1, length), 0
        rest = rest[whole:]
    yield rest[:0].reshape(-1, length), len(rest)


def usable_cores() -> int:
    """Those this process may run on, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tokenised(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    dtype: np.dtype,
    split: str,
    scratch: Path,
    processes: int | None,
) -> Iterator[tuple[bytes, np.ndarray]]:
    """The hash and the token ids of every document, in order; an Arrow file in `scratch` lies between."""

    def encode(batch: dict[str, list[str]]) -> dict[str, list]:
        texts = [text for text in batch[corpus.column] if corpus.keeps(text)]
        if not texts:
            return {"sha256": [], "ids": []}
        # Documents are longer than the tokenizer's maximum on purpose; verbose=False keeps it from saying so.
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return {"sha256": [document_hash(text) for text in texts], "ids": ids}

    if processes is None:
        processes = min(usable_cores(), len(corpus.rows) // DOCUMENTS_A_PROCESS)
    with ending_with_us():
        rows = corpus.rows.map(
            encode,
            batched=True,
            batch_size=BATCH,
            remove_columns=corpus.rows.column_names,
            features=Features({"sha256": Value("binary"), "ids": List(Value(dtype.name))}),
            num_proc=processes if processes > 1 else None,
            cache_file_name=str(scratch / "ids.arrow"),
            load_from_cache_file=False,
            new_fingerprint=corpus.key[:32],
            desc=f"tokenising {split}",
        )
    for table in rows.with_format("arrow").iter(1000):
        column = table["ids"].combine_chunks()
        ids, ends = column.values.to_numpy(), column.offsets.to_numpy()
        for row, digest in enumerate(table["sha256"]):
            yield digest.as_py(), ids[ends[row] : ends[row + 1]]
