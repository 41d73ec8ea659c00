"""Windows of token ids in memory-mapped files, which every process that trains on them shares.

A process checks a file by its hash when it opens it for the first time; one that it has written, it knows.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import constants
from torch.utils.data import Dataset
from transformers import default_data_collator

from ..errors import DataError
from ..files import content_key, file_hash, file_state
from .arguments import DataArguments

ALIKE = ("context_length", "dtype", "packing", "tokenizer_sha256")
"""What several folders of windows must have in common to be one set."""
ADDED = ("documents", "windows", "dropped_tokens")
_known: dict[tuple[int, ...], str] = {}
"""The hashes of token files that this process has written or checked, by what tells a change of them."""


class TokenWindows(Dataset):
    """
    Windows of exactly T token ids in memory-mapped files that several processes can share.

    Args:
        folders: hold `tokens.bin` and `meta.json`, as `build_windows` writes them; several are one set, in this order.
        limit: use N windows, spread evenly: neighbours are from the same file.

    Raises:
        DataError: tokens that are not those which were written, or folders that do not fit together.
    """

    def __init__(self, folders: Path | Sequence[Path], limit: int | None = None):
        folders = [folders] if isinstance(folders, Path) else list(folders)
        self.meta = joined_meta(folders, [checked_meta(folder) for folder in folders])
        arrays = [
            np.memmap(folder / "tokens.bin", dtype=self.meta["dtype"], mode="r").reshape(
                -1, self.meta["context_length"]
            )
            for folder in folders
        ]
        tokens = arrays[0] if len(arrays) == 1 else Shards(arrays)
        every = limit is None or limit >= len(tokens)
        self.tokens: np.ndarray | Shards = tokens if every else tokens[evenly(len(tokens), limit)]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
        """A whole batch in one read, as `DataLoader` asks for it."""
        ids = torch.from_numpy(self.tokens[np.asarray(indices)].astype(np.int64))
        return [{"input_ids": row, "labels": row} for row in ids]

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.size)

    @property
    def sha256(self) -> str:
        """Hash of the file of tokens; of several, of their hashes."""
        return self.meta["sha256"]


class Shards:
    """Arrays [N, T] of one type as one that is indexed by numbers of rows, and copied in no other way."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        self.arrays = arrays
        self.ends = np.cumsum([len(array) for array in arrays])

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def size(self) -> int:
        return sum(array.size for array in self.arrays)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        rows = np.where(rows < 0, rows + len(self), rows)
        if ((rows < 0) | (rows >= len(self))).any():
            raise IndexError(f"There are {len(self)} windows.")
        shard = np.searchsorted(self.ends, rows, side="right")
        found = np.empty((len(rows), *self.arrays[0].shape[1:]), self.arrays[0].dtype)
        for number in np.unique(shard):
            here, array = shard == number, self.arrays[number]
            found[here] = array[rows[here] - (self.ends[number] - len(array))]
        return found


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


def checked_meta(folder: Path) -> dict[str, Any]:
    """`read_meta`, or raise DataError where the tokens are not those that were written."""
    meta, tokens = read_meta(folder), folder / "tokens.bin"
    state = file_state(tokens)
    if state not in _known:
        _known[state] = file_hash(tokens)
    if _known[state] != meta["sha256"]:
        raise DataError(damaged(folder, "the hash of tokens.bin is another one than meta.json says"))
    return meta


def written(folder: Path) -> None:
    """Take the hash of tokens that this process has just written from `meta.json`."""
    _known[file_state(folder / "tokens.bin")] = read_meta(folder)["sha256"]


def joined_meta(folders: Sequence[Path], metas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """
    What is recorded of several folders as one set.

    Raises:
        DataError: they are of different lengths, packings or tokenizers.
    """
    first = metas[0]
    if len(metas) == 1:
        return first
    for key in ALIKE:
        values = [meta.get(key) for meta in metas]
        if other := next((number for number, value in enumerate(values) if value != values[0]), None):
            raise DataError(
                f"The windows in {folders[0]} and {folders[other]} are no one set: {key} is {values[0]} and "
                f"{values[other]}. Make them with the same tokenizer, context length and packing."
            )
    return {
        **first,
        "corpus": ", ".join(dict.fromkeys(meta["corpus"] for meta in metas)),
        **{key: content_key(*(meta[key] for meta in metas)) for key in ("sha256", "corpus_sha256")},
        **{key: sum(meta[key] for meta in metas) for key in ADDED},
    }


def damaged(folder: Path, why: str) -> str:
    """What a user is told of a cache that cannot be used."""
    return f"The tokens cached in {folder} are damaged: {why}. Remove that folder; they are then made anew."
