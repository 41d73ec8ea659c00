"""Tables with a document a row: files of JSON lines or Parquet, and datasets on the Hub, whole or as a stream.

Their rows lie memory-mapped on the disk.
"""

import glob
import itertools
import logging
from pathlib import Path

from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets, config, load_dataset
from datasets.arrow_writer import ArrowWriter
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub import HfApi
from tqdm.auto import tqdm

from ..errors import DataError
from ..files import content_key, file_hash, file_state, resumable_folder
from ..loading import is_hub_name, reason
from .documents import CHANGED, Table, files_below

logger = logging.getLogger(__name__)

TABLES = {".jsonl": "json", ".parquet": "parquet"}
SHARD = ".parquet"
"""What the files of a folder end with that are one table."""
TEXT_COLUMNS = ("content", "text", "code")
HUB_ALIASES = {"codeparrot-ds-": "huggingface-course/codeparrot-ds-"}
SHUFFLE_BUFFER = 10_000  # documents of a stream that are shuffled at a time
PART = 10_000  # documents of a stream that are written to a file


def hub_rows(
    data: str,
    max_documents: int | None,
    shuffle_seed: int | None,
    text_column: str | None,
    streaming_cache: Path | None,
) -> tuple[Table, str]:
    """The rows of a dataset on the Hub and their key; see `load_corpus`."""
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
        work = streaming_cache.with_name("streaming") / key
        return Table(_kept(streaming_cache / key, work, rows, column), "text"), key
    if shuffle_seed is not None:
        rows = rows.shuffle(seed=shuffle_seed)
    if max_documents is not None:
        rows = rows.select(range(min(max_documents, len(rows))))
    return Table(rows, column), content_key(rows._fingerprint, column)


def table_rows(path: Path, max_documents: int | None, text_column: str | None) -> tuple[Table, str]:
    """The rows of a file, or of all Parquet files below a folder, and their key; see `load_corpus`."""
    files = [path] if path.is_file() else list(map(Path, files_below(str(path), {SHARD})))
    if empty := [file for file in files if not file.stat().st_size]:
        raise DataError(f"{empty[0]} is empty.")
    before = list(map(file_state, files))
    digests = list(map(file_hash, files))
    digest = digests[0] if len(files) == 1 else content_key(*digests)
    # datasets takes names for patterns, and knows a file by its name and time: here it is known by its bytes.
    cache = Path(config.HF_DATASETS_CACHE) / "hf_lnfree" / digest
    kind = files[0].suffix
    try:
        names = [glob.escape(str(file.resolve())) for file in files]
        rows = load_dataset(TABLES[kind], data_files=names, split="train", cache_dir=str(cache))
    except (DatasetGenerationError, ValueError) as error:
        raise DataError(f"{path} cannot be read as {kind}: {error.__cause__ or error}") from error
    column = _text_column(str(path), rows.column_names, text_column)
    for file, state in zip(files, before, strict=True):
        if file_state(file) != state:
            raise DataError(CHANGED.format(file))
    every = len(rows)
    if rows.features[column] not in (Value("string"), Value("large_string")) or rows.data.column(column).null_count:
        rows = rows.filter(are_texts, batched=True, input_columns=[column], desc="texts")
    if every > len(rows):
        logger.info("%d of %d rows of %s have no text in %r and are left out.", every - len(rows), every, path, column)
    if max_documents is not None:
        rows = rows.select(range(min(max_documents, len(rows))))
    return Table(rows, column), content_key(digest, column, max_documents)


def are_texts(values: list) -> list[bool]:
    """Which of them are."""
    return [isinstance(value, str) for value in values]


def _text_column(data: str, names: list[str], wanted: str | None) -> str:
    columns = [wanted] if wanted else [column for column in TEXT_COLUMNS if column in names]
    if not columns or columns[0] not in names:
        raise DataError(
            f"{data!r} has no text column {wanted or TEXT_COLUMNS}; its columns are {names}. "
            "Name one with --text-column."
        )
    return columns[0]


def _kept(folder: Path, work: Path, stream: IterableDataset, column: str) -> Dataset:
    """The text of a stream, written down once, in files of 10,000; those that a killed run has written are kept."""
    if not folder.exists():
        with resumable_folder(folder, work) as partial:
            if partial is not None:
                _write(partial, stream, column)
    return concatenate_datasets([Dataset.from_file(str(file)) for file in sorted(folder.glob("documents*.arrow"))])


def _write(folder: Path, stream: IterableDataset, column: str) -> None:
    """What is not yet in a folder. The stream is read from its beginning, as its order may ask for it."""
    done = len(list(folder.glob("documents-*.arrow")))
    features = Features({"text": Value("large_string")})
    rows = iter(tqdm(stream.skip(done * PART), initial=done * PART, desc="streaming", unit="file", leave=False))
    for number in itertools.count(done):
        found = itertools.islice(rows, PART)
        first = next(found, None)
        if first is None and number:
            return
        partial = folder / "partial.arrow"
        with ArrowWriter(path=str(partial), features=features) as writer:
            for row in itertools.chain([] if first is None else [first], found):
                writer.write({"text": row[column]})
            writer.finalize()
        partial.rename(folder / f"documents-{number:05}.arrow")
