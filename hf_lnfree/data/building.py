"""Tokens of a corpus, written as they come. A journal says how far they are good, so that a killed run goes on there.

What is made is found again by the hash of all that went into it.
"""

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from ..files import content_key, replace_file, resumable_folder, write_json
from .arguments import DataArguments
from .corpus import Corpus
from .encoding import Piece, tokenised
from .tokenization import tokenizer_hash
from .windows import cache_folder, written

logger = logging.getLogger(__name__)

TOKENS, DIGESTS, JOURNAL = "tokens.bin", "digests.bin", "journal.json"
READ_AT_ONCE = 2**24  # bytes
JOURNAL_EVERY = 1.0  # seconds


def build_windows(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, args: DataArguments, split: str) -> Path:
    """
    Tokenise and cut a corpus into a folder that `TokenWindows` opens; found again when nothing changed, and finished
    where a run that was killed had begun it.

    Raises:
        DataError: no window, or no end-of-text token to pack with.
    """
    length, sha256 = args.context_length, tokenizer_hash(tokenizer)
    key = content_key(corpus.key, sha256, length, args.packing)
    folder = cache_folder(args) / "windows" / key
    if folder.exists():
        return folder
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    with resumable_folder(folder, cache_folder(args) / "tokenising" / key) as partial:
        if partial is None:  # another process has made it meanwhile
            return folder
        cutter = Cutter(length, args.packing, tokenizer.eos_token_id)
        with TokenWriter(partial, cutter, dtype) as writer:
            start = writer.done.rows
            if start:
                logger.info("Tokenising %s goes on after row %d of %d.", corpus.name, start, len(corpus.rows))
            with closing(tokenised(corpus, tokenizer, dtype, split, start, args.tokenizing_processes)) as pieces:
                for piece in pieces:
                    writer.add(piece)
            done = writer.done
            dropped = done.dropped + len(done.rest)
            if not done.windows:
                raise DataError(
                    f"The {split} split of {corpus.name!r} holds no window of {length} tokens ({done.documents} "
                    f"documents, {dropped} tokens). Shorten --context-length, or give more text; a training may also "
                    "pack documents (packing=packed)."
                )
        meta = {
            "sha256": done.sha256,
            "corpus": corpus.name,
            "corpus_sha256": done.corpus_sha256,
            "documents": done.documents,
            "packing": args.packing,
            "windows": done.windows,
            "context_length": length,
            "dropped_tokens": dropped,
            "dtype": dtype.name,
            "tokenizer_sha256": sha256,
        }
        write_json(partial / "meta.json", meta)
        for scratch in (DIGESTS, JOURNAL):
            (partial / scratch).unlink(missing_ok=True)
    written(folder)
    return folder


class Cutter:
    """
    Cuts documents into windows of T tokens, one after the other.

    Args:
        packing: "exact": the whole windows of each document, its tail dropped; "packed": documents are joined by the
            end-of-text token `eos`.

    Raises:
        DataError: there is no such token to pack with.
    """

    def __init__(self, length: int, packing: str, eos: int | None):
        if packing == "packed" and eos is None:
            raise DataError("packing='packed' joins documents with an end-of-text token, and this tokenizer has none.")
        self.length, self.end = length, [eos] if packing == "packed" else None
        self.rest: np.ndarray | Sequence[int] = []
        """Tokens of packed documents behind the last whole window."""
        self.dropped = 0

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """The windows [N, T] that a document completes."""
        if self.end is not None:
            ids = np.concatenate((np.array(self.rest, ids.dtype), ids, np.array(self.end, ids.dtype)))
        whole = len(ids) - len(ids) % self.length
        if self.end is not None:
            self.rest = ids[whole:]
        else:
            self.dropped += len(ids) - whole
        return ids[:whole].reshape(-1, self.length)


@dataclass
class Done:
    """
    How much of a corpus is tokenised.

    Args:
        rows: of the corpus, that were read.
        rest: tokens behind the last whole window, which the next document goes on from.
        sha256, corpus_sha256: of the tokens, and of the hashes of the documents.
    """

    rows: int = 0
    documents: int = 0
    windows: int = 0
    dropped: int = 0
    rest: list[int] = field(default_factory=list)
    sha256: str = hashlib.sha256().hexdigest()
    corpus_sha256: str = hashlib.sha256().hexdigest()


class TokenWriter:
    """
    Appends the windows of documents to a file, and their hashes to another, and notes every second how far it is.

    What a journal in the folder says is there already is read once, for its hash, and kept if it is what was written.
    """

    def __init__(self, folder: Path, cutter: Cutter, dtype: np.dtype):
        self.journal, self.cutter = folder / JOURNAL, cutter
        self.done = done = read_journal(self.journal)
        self.tokens = HashedFile(folder / TOKENS, done.windows * cutter.length * dtype.itemsize)
        self.digests = HashedFile(folder / DIGESTS, 32 * done.documents)
        if (self.tokens.sha256, self.digests.sha256) != (done.sha256, done.corpus_sha256):
            self.done = Done()
            for file in (self.tokens, self.digests):
                file.start_over()
        cutter.rest, cutter.dropped = self.done.rest, self.done.dropped
        self.saved = time.monotonic()

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if error[0] is not None:
                with suppress(OSError):
                    self.save()
        finally:
            with self.digests.file, self.tokens.file:
                pass

    def add(self, piece: Piece) -> None:
        """Write down some documents; all before `piece.rows` are then done."""
        windows = 0
        for ids in piece.ids:
            found = self.cutter(ids)
            self.tokens.write(found.data)
            windows += len(found)
        self.digests.write(b"".join(piece.digests))
        self.done = Done(
            rows=piece.rows,
            documents=self.done.documents + len(piece.ids),
            windows=self.done.windows + windows,
            dropped=self.cutter.dropped,
            rest=list(map(int, self.cutter.rest)),
            sha256=self.tokens.sha256,
            corpus_sha256=self.digests.sha256,
        )
        if time.monotonic() - self.saved >= JOURNAL_EVERY:
            self.save()

    def save(self) -> None:
        """Note how far it is."""
        self.tokens.file.flush()
        self.digests.file.flush()
        replace_file(self.journal, json.dumps(asdict(self.done)))
        self.saved = time.monotonic()


class HashedFile:
    """
    A file that is appended to, with the hash of what is in it.

    Args:
        size: bytes of it that are kept; what is behind them is cut off.
    """

    def __init__(self, path: Path, size: int):
        self.file = open(path, "a+b")  # noqa: SIM115
        self.hash = hashlib.sha256()
        self.file.seek(0)
        while block := self.file.read(min(size, READ_AT_ONCE)):
            self.hash.update(block)
            size -= len(block)
        self.file.truncate(self.file.tell())

    @property
    def sha256(self) -> str:
        return self.hash.hexdigest()

    def write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.hash.update(data)

    def start_over(self) -> None:
        """With nothing in it."""
        self.file.truncate(0)
        self.hash = hashlib.sha256()


def read_journal(path: Path) -> Done:
    """How far a run came that was killed; nowhere where there is no journal, or no whole one."""
    try:
        return Done(**json.loads(path.read_text()))
    except (OSError, TypeError, ValueError):
        return Done()
