"""Where documents come from: the interpreter's standard library, local files, or a dataset on the Hub.

A corpus is a list of texts and a hash over them. Training and validation are told apart by the hash of each file, so a
file that occurs twice never stands on both sides.
"""

import hashlib
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

STDLIB = "stdlib"
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
HUB_ALIASES = {"codeparrot-ds-": "huggingface-course/codeparrot-ds-"}


@dataclass(frozen=True)
class Corpus:
    """Texts of one split, and what identifies them."""

    name: str
    texts: list[str]

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for text in self.texts:
            digest.update(hashlib.sha256(text.encode()).digest())
        return digest.hexdigest()


def load_corpus(
    dataset: str, max_files: int | None = None, shuffle_seed: int | None = None, text_column: str | None = None
) -> Corpus:
    """
    Read every document of a corpus.

    Args:
        dataset: "stdlib", a file or folder, or the name of a Hub dataset with its split ("name" or "name:split").
        max_files: keep the first N documents, after shuffling.
        shuffle_seed: shuffle documents first (Hub datasets only; local files are sorted by path).
        text_column: column of a Hub dataset; found by itself among `content`, `text`, `code`.

    Raises:
        ValueError: nothing was found, or nothing of it could be decoded.
    """
    path = Path(dataset).expanduser()
    if dataset == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        texts: Iterable[str] = _read_files(_stdlib_files(root), root)
    elif path.exists():
        paths = sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES) if path.is_dir() else [path]
        texts = _read_files(paths, path)
    else:
        texts = _read_hub(dataset, shuffle_seed, text_column)
    kept = [text for text in islice(texts, max_files) if text.strip()]
    if not kept:
        raise ValueError(
            f"The corpus {dataset!r} is empty. Give 'stdlib', a file or folder with text "
            f"({', '.join(sorted(TEXT_SUFFIXES))}), or the name of a Hub dataset."
        )
    return Corpus(dataset, kept)


def split_by_hash(corpus: Corpus, validation_fraction: float) -> tuple[Corpus, Corpus]:
    """Training and validation part; a document's side follows from its own sha256 alone."""
    sides: tuple[list[str], list[str]] = ([], [])
    for text in corpus.texts:
        position = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
        sides[position < validation_fraction].append(text)
    for side, texts in zip(("training", "validation"), sides, strict=True):
        if not texts:
            raise ValueError(
                f"The {side} split of {corpus.name!r} is empty: {len(corpus.texts)} documents, "
                f"validation_fraction={validation_fraction}. Give more documents, another fraction, or a dataset for "
                "validation (--validation_dataset)."
            )
    return Corpus(corpus.name, sides[0]), Corpus(corpus.name, sides[1])


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
            f"{', '.join(undecodable[:5])}{', ...' if len(undecodable) > 5 else ''}",
            stacklevel=2,
        )


def _read_hub(dataset: str, shuffle_seed: int | None, text_column: str | None) -> Iterator[str]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    name, _, split = dataset.partition(":")
    for alias, full in HUB_ALIASES.items():
        name = full + name.removeprefix(alias) if name.startswith(alias) else name
    try:
        rows = load_dataset(name, split=split or "train")
    except (DatasetNotFoundError, ConnectionError, OSError) as error:
        raise ValueError(
            f"{dataset!r} is neither 'stdlib' nor a path on this machine, and the Hub has no such dataset or cannot be "
            f"reached ({type(error).__name__})."
        ) from error
    columns = [text_column] if text_column else [c for c in TEXT_COLUMNS if c in rows.column_names]
    if not columns or columns[0] not in rows.column_names:
        raise ValueError(
            f"{dataset!r} has no text column {text_column or TEXT_COLUMNS}; its columns are {rows.column_names}. "
            "Name one with --text_column."
        )
    if shuffle_seed is not None:
        rows = rows.shuffle(seed=shuffle_seed)
    for row in rows:
        yield row[columns[0]]
