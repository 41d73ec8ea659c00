"""Documents on a disk, read when they are needed: rows of a table, or files of their own.

Both give the number, the hash and the text of each document that counts. No more of them is in memory than is read at
a time; of a file its path and its hash stay.
"""

import hashlib
import os
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import NamedTuple, Protocol

from datasets import Dataset

from ..errors import DataError, listed

BATCH = 64  # rows of a table that are read at a time
CHANGED = "{} was changed while it was read. Try again when nobody writes to it."


class Document(NamedTuple):
    """A text, the row that it stands in, and its hash."""

    row: int
    digest: bytes
    text: str


class Documents(Protocol):
    """What a corpus reads from."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def read(self, rows: range, keeps: Callable[[bytes], bool]) -> Iterator[Document]:
        """The documents of these rows that are not blank and whose hash is to be kept, in order."""
        ...


@dataclass(frozen=True)
class Table:
    """
    Rows of a dataset, which may lie memory-mapped on the disk.

    Args:
        column: with the text.
    """

    rows: Dataset
    column: str

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: range, keeps: Callable[[bytes], bool]) -> Iterator[Document]:
        texts = self.rows.select_columns(self.column)
        for start in range(rows.start, rows.stop, BATCH):
            batch = texts[start : min(start + BATCH, rows.stop)][self.column]
            for row, text in enumerate(batch, start):
                if isinstance(text, str) and text.strip() and keeps(digest := document_hash(text)):
                    yield Document(row, digest, text)


class TextFiles:
    """
    Files that are a document each. Each is read once to find its hash, and held to it whenever it is read again.

    Args:
        root: where they are, for messages.
        paths: in the order that they are read in; those that are not UTF-8 or blank are left out.
    """

    def __init__(self, root: Path, paths: Iterable[str]):
        kept, self.ends = bytearray(), array("Q", [0])  # one object, not one a file
        digests, undecodable, count, contents = bytearray(), [], 0, hashlib.sha256()
        for count, path in enumerate(paths, 1):
            try:
                digest, text = read_file(path)
            except UnicodeDecodeError:
                undecodable.append(os.path.basename(path))
                continue
            contents.update((b"\n" if count - len(undecodable) > 1 else b"") + digest.hex().encode())
            if text.strip():
                kept += os.fsencode(path)
                self.ends.append(len(kept))
                digests += digest
        self.paths, self.digests = bytes(kept), bytes(digests)
        self.key = contents.hexdigest()
        """`content_key` of the hashes of all files, blank ones too."""
        if undecodable:
            warnings.warn(
                f"{len(undecodable)} of {count} files in {root} are not UTF-8 and were left out: {listed(undecodable)}",
                stacklevel=2,
            )

    def __len__(self) -> int:
        return len(self.ends) - 1

    def path(self, row: int) -> str:
        return os.fsdecode(self.paths[self.ends[row] : self.ends[row + 1]])

    def read(self, rows: range, keeps: Callable[[bytes], bool]) -> Iterator[Document]:
        """
        Raises:
            DataError: a file is another one than when its hash was found.
        """
        for row in rows:
            digest = self.digests[32 * row : 32 * row + 32]
            if not keeps(digest):
                continue
            path = self.path(row)
            try:
                found, text = read_file(path)
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(CHANGED.format(path)) from error
            if found != digest:
                raise DataError(CHANGED.format(path))
            yield Document(row, digest, text)


def read_file(path: str) -> tuple[bytes, str]:
    """Hash and text of a file in UTF-8, with line ends as Python reads them."""
    with open(path, "rb") as file:
        content = file.read()
    text = content.decode()
    if b"\r" in content:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        return document_hash(text), text
    return hashlib.sha256(content).digest(), text


def document_hash(text: str) -> bytes:
    """sha256 of the text in UTF-8."""
    return hashlib.sha256(text.encode()).digest()


def files_below(
    folder: str, suffixes: set[str], left_out: Callable[[str], bool] = lambda folder: False
) -> Iterator[str]:
    """
    Paths of all files with one of these suffixes, in the order in which `sorted` puts them; a folder at a time is
    listed.
    Links to folders are not followed, and folders that may not be read are passed over.

    Args:
        left_out: of the name of a folder, whether what is below is not read.
    """
    names, folders = [], set()
    try:
        with os.scandir(folder) as found:
            for entry in found:
                if entry.is_dir(follow_symlinks=False):
                    folders.add(entry.name)
                elif not (PurePath(entry.name).suffix in suffixes and entry.is_file()):
                    continue
                names.append(entry.name)
    except PermissionError:
        return
    for name in sorted(names):
        path = os.path.join(folder, name)
        if name not in folders:
            yield path
        elif not left_out(name):
            yield from files_below(path, suffixes, left_out)
