"""Where documents come from: the interpreter's standard library, local files, or a dataset on the Hub.

A corpus is documents that stay on the disk until they are read, and a key that tells it from any other without reading
it. Training and validation are told apart by the hash of each document, so one that occurs twice never stands on both
sides.
"""

import logging
import math
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

from datasets import Dataset, Features, Value

from ..errors import DataError
from ..files import content_key
from .arguments import STDLIB
from .documents import Document, Documents, Table, TextFiles, document_hash, files_below
from .tables import SHARD, TABLES, hub_rows, table_rows

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


@dataclass(frozen=True)
class Corpus:
    """
    Documents of one split in a fixed order, read when they are needed.

    Args:
        name: what it was asked for by.
        rows: what they are read from.
        key: hash that changes whenever the documents do.
        side: which part of a corpus that is split by hash; None for all of it.
        validation_fraction: share of documents on the validation side.
    """

    name: str
    rows: Documents
    key: str
    side: Literal["train", "validation"] | None = None
    validation_fraction: float = 0.0

    @classmethod
    def from_texts(cls, name: str, texts: list[str]) -> "Corpus":
        """A corpus in memory, whose key is the hash of its texts."""
        rows = Dataset.from_dict({"text": texts}, features=Features({"text": Value("large_string")}))
        return cls(name, Table(rows, "text"), content_key(*(document_hash(text).hex() for text in texts)))

    def keeps(self, digest: bytes) -> bool:
        """Whether a document with this hash is on this side."""
        return self.side is None or (place_of(digest) < self.validation_fraction) == (self.side == "validation")

    def documents(self, rows: range | None = None) -> Iterator[Document]:
        """Those that count, not blank and on this side, of all rows or some."""
        return self.rows.read(range(len(self.rows)) if rows is None else rows, self.keeps)

    @property
    def texts(self) -> Iterator[str]:
        return (document.text for document in self.documents())


def place(text: str) -> float:
    """Where the hash of a document lies between 0 and 1; it is held out below the fraction that is."""
    return place_of(document_hash(text))


def place_of(digest: bytes) -> float:
    """`place` of the document with this hash."""
    return int.from_bytes(digest[:8], "big") / 2**64


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
        data: "stdlib", a file or folder of text, a .jsonl or .parquet file with a text a row, a folder of .parquet
            files, which are one table, or the name of a Hub dataset with its split ("name" or "name:split").
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
    if data != STDLIB and is_table(path):
        corpus = Corpus(str(path), *table_rows(path, max_documents, text_column))
    elif data == STDLIB or path.exists():
        root = Path(sysconfig.get_paths()["stdlib"]) if data == STDLIB else path
        files = TextFiles(root, islice(text_files(data, root), max_documents))
        corpus = Corpus(data, files, files.key)
    else:
        corpus = Corpus(data, *hub_rows(data, max_documents, shuffle_seed, text_column, streaming_cache))
    if next(corpus.texts, None) is None:
        raise DataError(
            f"The corpus {data!r} is empty. Give 'stdlib', a file or folder with text "
            f"({', '.join(sorted(TEXT_SUFFIXES))}), or the name of a Hub dataset."
        )
    return corpus


def is_table(path: Path) -> bool:
    """Whether a path is a table, or a folder of tables and no texts."""
    if not path.is_dir():
        return path.is_file() and path.suffix in TABLES
    table = next(files_below(str(path), {SHARD}), None)
    text = next(files_below(str(path), TEXT_SUFFIXES), None)
    if table and text:
        logger.warning("%s is read for its text files, like %s; %s and its like are left out.", path, text, table)
    return bool(table and not text)


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
        places = [place_of(document.digest) for document in corpus.documents()]
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


def text_files(data: str, root: Path) -> Iterator[str]:
    """Paths of the documents below a folder, or of the one that is a file."""
    if not root.is_dir():
        return iter([str(root)])
    if data == STDLIB:
        return files_below(str(root), {".py"}, no_library)
    return files_below(str(root), TEXT_SUFFIXES)


def no_library(folder: str) -> bool:
    """Whether a folder of the standard library's holds tests, tools, or what was installed."""
    return folder in STDLIB_LEFT_OUT or folder.split("-")[0] in STDLIB_LEFT_OUT
