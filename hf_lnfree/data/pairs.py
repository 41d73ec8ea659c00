"""Pairs of a source and a target, for models that write one from the other.

A table or a Hub dataset has a column for each. Python files have them too: the docstring of a function, and its name.
"""

import ast
import hashlib
import json
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from .corpus import Corpus
from .documents import Table
from .windows import evenly

SOURCE, TARGET = "source", "target"


def pairs_of(corpus: Corpus) -> Corpus:
    """
    The pairs in a corpus, each as one line of JSON; in memory.

    Raises:
        DataError: it holds none.
    """
    if isinstance(corpus.rows, Table) and TARGET in corpus.rows.rows.column_names:
        targets = corpus.rows.rows.select_columns(TARGET)
        rows = ((document.text, targets[document.row][TARGET]) for document in corpus.documents())
        found = [(source, target) for source, target in rows if target]
    else:
        found = [pair for text in corpus.texts for pair in functions(text)]
    if not found:
        raise DataError(
            f"The corpus {corpus.name!r} holds no pairs. Give a .jsonl or .parquet file or a Hub dataset with the "
            f"columns {SOURCE!r} and {TARGET!r}, or Python files: there the docstring of a function is a source, and "
            "its name the target."
        )
    return Corpus.from_texts(corpus.name, list(dict.fromkeys(json.dumps(pair) for pair in found)))


def functions(code: str) -> Iterator[tuple[str, str]]:
    """Docstring and name of every function of a Python file that has one; nothing where the file does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the code that is read
            tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (said := ast.get_docstring(node)):
            yield said, node.name


def texts_of(pairs: Corpus) -> Corpus:
    """What a tokenizer is trained on: both sides of every pair."""
    return Corpus.from_texts(pairs.name, ["\n".join(json.loads(line)) for line in pairs.texts])


class PairExamples(Dataset):
    """
    Token ids of sources and targets, each cut after `length` and ended by an end of text.

    Args:
        pairs: as `pairs_of` makes them.

    Raises:
        DataError: the tokenizer has no end-of-text token.
    """

    def __init__(self, pairs: Corpus, tokenizer: PreTrainedTokenizerBase, length: int, limit: int | None = None):
        if tokenizer.eos_token_id is None:
            raise DataError("objective 'pairs' ends its texts with an end-of-text token, and this tokenizer has none.")
        lines = list(pairs.texts)
        contents, sides, dropped = hashlib.sha256(), [], 0
        for texts in zip(*map(json.loads, lines), strict=True):
            ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
            dropped += sum(max(0, len(row) + 1 - length) for row in ids)
            sides.append([np.array([*row[: length - 1], tokenizer.eos_token_id]) for row in ids])
        for row in (row for side in sides for row in side):
            contents.update(row.data)
        self.meta = {
            "sha256": contents.hexdigest(),
            "corpus": pairs.name,
            "corpus_sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
            "documents": len(lines),
            "windows": len(lines),
            "context_length": length,
            "tokens": sum(len(row) for side in sides for row in side),
            "dropped_tokens": dropped,
        }
        every = list(zip(*sides, strict=True))
        self.pairs = [every[i] for i in evenly(len(every), limit)]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        source, target = self.pairs[index]
        return {"input_ids": torch.from_numpy(source), "labels": torch.from_numpy(target)}
