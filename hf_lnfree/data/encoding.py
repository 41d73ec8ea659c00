"""Texts to token ids, by as many processes as there are cores, in the order of the corpus and in constant memory.

Each process has every n-th chunk of rows and a pipe of its own, which is read in turn: what is not yet read waits.
"""

import multiprocessing
import os
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
from datasets.utils import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import DataError
from .corpus import Corpus
from .processes import ending_with_us

CHUNK = 64  # rows that one process reads at a time
CHARACTERS = 2**19  # tokenised at a time, and what the last document has above them
ROWS_A_PROCESS = 2000  # fewer are not worth starting one
Encoder = Callable[[list[str]], list[np.ndarray]]


class Piece(NamedTuple):
    """Some documents: where the rows begin that come after them, their hashes, and their token ids."""

    rows: int
    digests: list[bytes]
    ids: list[np.ndarray]


def tokenised(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    dtype: np.dtype,
    split: str,
    start: int = 0,
    processes: int | None = None,
) -> Generator[Piece]:
    """The documents of a corpus from row `start` on, in order."""
    total = len(corpus.rows)
    if processes is None:
        processes = min(usable_cores(), (total - start) // ROWS_A_PROCESS)
    chunks = [range(first, min(first + CHUNK, total)) for first in range(start, total, CHUNK)]
    found = (
        in_processes(corpus, tokenizer, dtype, chunks, processes)
        if processes > 1
        else pieces(corpus, encoder(tokenizer, dtype), chunks)
    )
    with closing(found), tqdm(total=total, initial=start, desc=f"tokenising {split}", unit=" documents") as bar:
        for piece in found:
            yield piece
            bar.update(piece.rows - bar.n)


def encoder(tokenizer: PreTrainedTokenizerBase, dtype: np.dtype) -> Encoder:
    """Texts to ids, without special tokens and not cut."""

    def by_tokenizer(texts: list[str]) -> list[np.ndarray]:
        # Documents are longer than the tokenizer's maximum on purpose; verbose=False keeps it from saying so.
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [np.array(row, dtype) for row in ids]

    def by_backend(texts: list[str]) -> list[np.ndarray]:
        found = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(row.ids, dtype) for row in found]

    kind: Any = type(tokenizer)
    if isinstance(tokenizer, PreTrainedTokenizerFast) and all(
        getattr(kind, name) is getattr(PreTrainedTokenizerFast, name) for name in ("__call__", "_encode_plus")
    ):
        by_tokenizer([""])  # takes truncation and padding from the backend
        return by_backend
    return by_tokenizer


def pieces(corpus: Corpus, encode: Encoder, chunks: list[range]) -> Generator[Piece]:
    """Those of some chunks; the last of each ends where the chunk does."""
    for chunk in chunks:
        digests: list[bytes] = []
        texts: list[str] = []
        size = 0
        for document in corpus.documents(chunk):
            if size >= CHARACTERS:
                yield Piece(document.row, digests, encode(texts))
                digests, texts, size = [], [], 0
            digests.append(document.digest)
            texts.append(document.text)
            size += len(document.text)
        yield Piece(chunk.stop, digests, encode(texts) if texts else [])


def in_processes(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, dtype: np.dtype, chunks: list[range], processes: int
) -> Generator[Piece]:
    """`pieces` by several processes."""
    pipes, workers = [], []
    try:
        with ending_with_us(), one_thread_each():
            for number in range(processes):
                ours, theirs = multiprocessing.Pipe(duplex=False)
                job = (theirs, corpus, tokenizer, dtype, chunks[number::processes])
                workers.append(multiprocessing.Process(target=work, args=job, daemon=True))
                workers[-1].start()
                theirs.close()
                pipes.append(ours)
        for number, chunk in enumerate(chunks):
            end = chunk.start
            while end != chunk.stop:
                piece = received(pipes[number % processes])
                end = piece.rows
                yield piece
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()


def received(pipe: Connection) -> Piece:
    """What comes next, or raise what went wrong."""
    try:
        found = pipe.recv()
    except EOFError:
        raise DataError("A process that tokenised was ended from outside, perhaps for want of memory.") from None
    if isinstance(found, Exception):
        raise found
    return found


def work(
    pipe: Connection, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, dtype: np.dtype, chunks: list[range]
) -> None:
    """In a process of its own. A thread sends, so that a chunk is tokenised while the one before waits to be read."""
    waiting: queue.Queue = queue.Queue(CHUNK)
    sender = threading.Thread(target=send_all, args=(pipe, waiting))
    sender.start()
    try:
        for piece in pieces(corpus, encoder(tokenizer, dtype), chunks):
            waiting.put(piece)
    except Exception as error:
        waiting.put(error)
    waiting.put(None)
    sender.join()


def send_all(pipe: Connection, waiting: queue.Queue) -> None:
    """Until None is found."""
    while (found := waiting.get()) is not None:
        pipe.send(found)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Processes that start inside have tokenizers of one thread."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def usable_cores() -> int:
    """Those this process may run on, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
