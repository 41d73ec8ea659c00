"""Where documents come from: the interpreter's standard library, local files, or a dataset on the Hub.

A corpus is rows of a `datasets.Dataset`, which for the Hub lie memory-mapped on the disk, and a key that tells it from
any other without reading it. Training and validation are told apart by the hash of each document, so one that occurs
twice never stands on both sides.
"""

import glob
import hashlib
import logging
import math
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from datasets import Dataset, Features, Value, config, load_dataset
from datasets.arrow_writer import ArrowWriter
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub import HfApi
from tqdm.auto import tqdm

from ..errors import DataError, listed
from ..files import atomic_folder, content_key, file_hash
from ..loading import is_hub_name, reason
from .arguments import STDLIB

logger = logging.getLogger(__name__)

STDLIB_LEFT_OUT = {
    "config",
    "distutils",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "site-packages",
    "test",
    "tests",
    "tkinter",
    "turtledemo",
    "__pycache__",
}
TEXT_SUFFIXES = {".py", ".pyi", ".txt", ".md", ".rst", ".json", ".jsonl"}
TEXT_COLUMNS = ("content", "text", "code")
TABLES = {".jsonl": "json", ".parquet": "parquet"}
HUB_ALIASES = {"codeparrot-ds-": "huggingface-course/codeparrot-ds-"}


SHUFFLE_BUFFER = 10_000  # documents of a stream that are shuffled at a time


@dataclass(frozen=True)
class Corpus:
    """
    Documents of one split in a fixed order, read when they are needed.

    Args:
        name: what it was asked for by.
        rows: the dataset that holds them.
        column: of `rows`, with the text.
        key: hash that changes whenever the documents do.
        side: which part of a corpus that is split by hash; None for all of it.
        validation_fraction: share of documents on the validation side.
    """

    name: str
    rows: Dataset
    column: str
    key: str
    side: Literal["train", "validation"] | None = None
    validation_fraction: float = 0.0

    @classmethod
    def from_texts(cls, name: str, texts: list[str]) -> "Corpus":
        """A corpus in memory, whose key is the hash of its texts."""
        rows = Dataset.from_dict({"text": texts}, features=Features({"text": Value("large_string")}))
        return cls(name, rows, "text", content_key(*(document_hash(text).hex() for text in texts)))

    def keeps(self, text: str) -> bool:
        """Whether a document counts: not blank, and on this side."""
        if not text.strip():
            return False
        if self.side is None:
            return True
        return (place(text) < self.validation_fraction) == (self.side == "validation")

    @property
    def texts(self) -> Iterator[str]:
        for batch in self.rows.select_columns(self.column).iter(1000):
            yield from filter(self.keeps, batch[self.column])


def document_hash(text: str) -> bytes:
    """sha256 of the text in UTF-8."""
    return hashlib.sha256(text.encode()).digest()


def place(text: str) -> float:
    """Where the hash of a document lies between 0 and 1; it is held out below the fraction that is."""
    return int.from_bytes(document_hash(text)[:8], "big") / 2**64


def load_corpus(
    data: str,
    max_documents: int | None = None,
    shuffle_seed: int | None = None,
    text_column: str | None = None,
    streaming_cache: Path | None = None,
) -> Corpus:
    """
    Find every document of a corpus.

    Args:
        data: "stdlib", a file or folder of text, a .jsonl or .parquet file with a text a row, or the name of a Hub
            dataset with its split ("name" or "name:split").
        max_documents: keep the first N documents, after shuffling.
        shuffle_seed: shuffle documents first (Hub datasets only; local files are sorted by path).
        text_column: column of a table or a Hub dataset; found by itself among `content`, `text`, `code`.
        streaming_cache: stream a Hub dataset and keep no more than the documents asked for, in this folder, instead of
            downloading all of it. A stream is shuffled in a buffer of 10,000, so its order is another one.

    Raises:
        DataError: nothing was found, or nothing of it could be decoded.
    """
    path = Path(data).expanduser()
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise DataError(f"{data!r} is neither a file nor a folder.")
    if path.is_dir():
        require_corpus(data, path)
    if path.suffix in TABLES and path.is_file():
        corpus = _table(path, max_documents, text_column)
    elif data == STDLIB or path.exists():
        root = Path(sysconfig.get_paths()["stdlib"]) if data == STDLIB else path
        corpus = Corpus.from_texts(data, list(_read_files(_local_files(data, root)[:max_documents], root)))
    else:
        corpus = _hub_corpus(data, max_documents, shuffle_seed, text_column, streaming_cache)
    if next(corpus.texts, None) is None:
        raise DataError(
            f"The corpus {data!r} is empty. Give 'stdlib', a file or folder with text "
            f"({', '.join(sorted(TEXT_SUFFIXES))}), or the name of a Hub dataset."
        )
    return corpus


def require_corpus(data: str, folder: Path) -> None:
    """Raise DataError for a folder above the working folder or the user's: a disk full of files, read by a slip."""
    for below, what in ((Path.cwd(), "the folder that you work in"), (Path.home(), "your home folder")):
        inside = below.resolve() != folder.resolve() and below.resolve().is_relative_to(folder.resolve())
        if inside or folder.resolve() == Path.home().resolve():
            raise DataError(
                f"{data!r} is {folder.resolve()}, which is or holds {what}: every text file below it would be read. "
                "Give the folder of the text itself."
            )


def split_by_hash(corpus: Corpus, validation_fraction: float) -> tuple[Corpus, Corpus]:
    """
    Training and validation part; a document's side follows from its own sha256 alone.

    Of a few documents the fraction may hold out none: then the one whose hash comes first is held out.

    Raises:
        DataError: nothing is left to train on.
    """
    train, validation = sides(corpus, validation_fraction)
    if next(validation.texts, None) is None:
        places = list(map(place, corpus.texts))
        train, validation = sides(corpus, math.nextafter(min(places), 1))
        if len(places) > 1:
            logger.info(
                "validation_fraction=%s holds out none of the %d documents of %s: one is held out.",
                validation_fraction,
                len(places),
                corpus.name,
            )
    if next(train.texts, None) is None:
        raise DataError(
            f"The train split of {corpus.name!r} is empty: {len(corpus.rows)} documents, of which at least one "
            f"is held out (validation_fraction={validation_fraction}). Give more documents, or held-out text of its "
            "own: validation_data for a training, a file for a measurement."
        )
    return train, validation


def sides(corpus: Corpus, fraction: float) -> tuple[Corpus, Corpus]:
    """The documents whose hash lies at or above the fraction, and those below."""

    def part(side: Literal["train", "validation"]) -> Corpus:
        key = content_key(corpus.key, side, fraction)
        return replace(corpus, key=key, side=side, validation_fraction=fraction)

    return part("train"), part("validation")


def _local_files(dataset: str, root: Path) -> list[Path]:
    if dataset == STDLIB:
        return _stdlib_files(root)
    return sorted(p for p in root.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file()) if root.is_dir() else [root]


def _stdlib_files(root: Path) -> list[Path]:
    def wanted(path: Path) -> bool:
        folders = path.relative_to(root).parts[:-1]
        return not any(folder.split("-")[0] in STDLIB_LEFT_OUT or folder in STDLIB_LEFT_OUT for folder in folders)

    return sorted(p for p in root.rglob("*.py") if wanted(p))


def _read_files(paths: list[Path], root: Path) -> Iterator[str]:
    undecodable = []
    for path in paths:
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            undecodable.append(path.name)
    if undecodable:
        warnings.warn(
            f"{len(undecodable)} of {len(paths)} files in {root} are not UTF-8 and were left out: "
            f"{listed(undecodable)}",
            stacklevel=2,
        )


def _hub_corpus(
    data: str,
    max_documents: int | None,
    shuffle_seed: int | None,
    text_column: str | None,
    streaming_cache: Path | None,
) -> Corpus:
    name, _, split = data.partition(":")
    split = split or "train"
    for alias, full in HUB_ALIASES.items():
        name = full + name.removeprefix(alias) if name.startswith(alias) else name
    if not is_hub_name(name):
        raise DataError(f"{data!r}: no such file or folder; a dataset on the Hub looks like owner/name or name:split.")
    try:
        rows = load_dataset(name, split=split, streaming=streaming_cache is not None)
        # A stream has no fingerprint of its data: the commit stands for it.
        commit = HfApi().dataset_info(name).sha if streaming_cache is not None else None
    except (DatasetNotFoundError, ConnectionError, OSError) as error:
        raise DataError(
            f"{data!r} is neither 'stdlib' nor a path on this machine, and the Hub has no such dataset or cannot be "
            f"reached ({type(error).__name__})."
        ) from error
    except (ValueError, RuntimeError, DatasetGenerationError) as error:  # a split, a script, or its files
        raise DataError(f"{data!r} cannot be read: {reason(error)}") from error
    column = _text_column(data, rows.column_names or list(next(iter(rows))), text_column)  # a stream may not know
    if streaming_cache is not None:
        if shuffle_seed is not None:
            rows = rows.shuffle(seed=shuffle_seed, buffer_size=SHUFFLE_BUFFER)
        key = content_key("stream", name, split, commit, column, shuffle_seed, SHUFFLE_BUFFER, max_documents)
        rows = rows if max_documents is None else rows.take(max_documents)
        return Corpus(data, _kept(streaming_cache / key, rows, column), "text", key)
    if shuffle_seed is not None:
        rows = rows.shuffle(seed=shuffle_seed)
    if max_documents is not None:
        rows = rows.select(range(min(max_documents, len(rows))))
    return Corpus(data, rows, column, content_key(rows._fingerprint, column))


def _table(path: Path, max_documents: int | None, text_column: str | None) -> Corpus:
    if not path.stat().st_size:
        raise DataError(f"{path} is empty.")
    digest = file_hash(path)
    # datasets takes names for patterns, and knows a file by its name and time: here it is known by its bytes.
    cache = Path(config.HF_DATASETS_CACHE) / "hf_lnfree" / digest
    try:
        files = glob.escape(str(path.resolve()))
        rows = load_dataset(TABLES[path.suffix], data_files=files, split="train", cache_dir=str(cache))
    except (DatasetGenerationError, ValueError) as error:
        raise DataError(f"{path} cannot be read as {path.suffix}: {error.__cause__ or error}") from error
    column = _text_column(str(path), rows.column_names, text_column)
    if file_hash(path) != digest:
        raise DataError(f"{path} was changed while it was read. Try again when nobody writes to it.")
    every = len(rows)
    rows = rows.filter(lambda row: isinstance(row[column], str), desc="texts")
    if every > len(rows):
        logger.info("%d of %d rows of %s have no text in %r and are left out.", every - len(rows), every, path, column)
    if max_documents is not None:
        rows = rows.select(range(min(max_documents, len(rows))))
    return Corpus(str(path), rows, column, content_key(digest, column, max_documents))


def _text_column(data: str, names: list[str], wanted: str | None) -> str:
    columns = [wanted] if wanted else [column for column in TEXT_COLUMNS if column in names]
    if not columns or columns[0] not in names:
        raise DataError(
            f"{data!r} has no text column {wanted or TEXT_COLUMNS}; its columns are {names}. "
            "Name one with --text-column."
        )
    return columns[0]


def _kept(folder: Path, stream: Iterable[dict], column: str) -> Dataset:
    """The text of a stream, written down once."""
    if not folder.exists():
        with atomic_folder(folder) as partial:
            features = Features({"text": Value("large_string")})
            with ArrowWriter(path=str(partial / "documents.arrow"), features=features) as writer:
                for row in tqdm(stream, desc="streaming", unit="file", leave=False):
                    writer.write({"text": row[column]})
                writer.finalize()
    return Dataset.from_file(str(folder / "documents.arrow"))
