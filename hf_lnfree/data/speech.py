"""Recordings with what is said in them: a folder of WAV files with a table of texts, or a dataset on the Hub."""

import csv
import hashlib
import json
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Audio, load_dataset
from datasets.exceptions import DatasetNotFoundError
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, WhisperFeatureExtractor

from ..errors import DataError
from ..loading import is_hub_name, reason
from .corpus import Corpus, place
from .windows import evenly

RATE = 16_000  # samples a second, as Whisper reads them
POSITIONS_A_SECOND = 50  # of its encoder
TABLES = ("metadata.jsonl", "metadata.csv")
TEXTS = ("text", "transcription", "sentence")
SAMPLES = {1: ("u1", 128, 128.0), 2: ("<i2", 0, 32768.0), 4: ("<i4", 0, 2147483648.0)}
"""Bytes of a sample -> how numpy reads it, what silence is, and the largest."""


@dataclass(frozen=True)
class Recording:
    """The samples of a recording, -1 to 1, or where they lie, and what is said."""

    audio: Path | np.ndarray
    text: str

    @property
    def samples(self) -> np.ndarray:
        """[S] float32."""
        return read_wave(self.audio) if isinstance(self.audio, Path) else self.audio

    @property
    def digest(self) -> str:
        """Hash of the sound."""
        data = self.audio.read_bytes() if isinstance(self.audio, Path) else self.audio.tobytes()
        return hashlib.sha256(data).hexdigest()


class SpeechExamples(Dataset):
    """
    `input_features` [mels, frames] of recordings, cut after some seconds or filled up with silence, and `labels`, the
    token ids of the texts with an end of text.

    Raises:
        DataError: the tokenizer has no end-of-text token.
    """

    def __init__(
        self,
        name: str,
        recordings: list[Recording],
        extractor: WhisperFeatureExtractor,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        limit: int | None = None,
    ):
        if tokenizer.eos_token_id is None:
            raise DataError("objective 'speech' ends its texts with an end-of-text token, and this tokenizer has none.")
        self.extractor = extractor
        ids = tokenizer([r.text for r in recordings], add_special_tokens=False, verbose=False)["input_ids"]
        labels = [torch.tensor([*row[: length - 1], tokenizer.eos_token_id]) for row in ids]
        digests = [recording.digest for recording in recordings]
        contents = hashlib.sha256("".join(digests).encode())
        for row in labels:
            contents.update(row.numpy().data)
        texts = "\n".join(f"{d} {r.text}" for d, r in zip(digests, recordings, strict=True))
        positions = POSITIONS_A_SECOND * extractor.chunk_length
        self.meta = {
            "sha256": contents.hexdigest(),
            "corpus": name,
            "corpus_sha256": hashlib.sha256(texts.encode()).hexdigest(),
            "documents": len(recordings),
            "windows": len(recordings),
            "tokens": positions * len(recordings) + sum(map(len, labels)),
            "dropped_tokens": sum(max(0, len(row) + 1 - length) for row in ids),
        }
        every = list(zip(recordings, labels, strict=True))
        self.examples = [every[i] for i in evenly(len(every), limit)]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        recording, labels = self.examples[index]
        features = self.extractor(recording.samples, sampling_rate=RATE, return_tensors="pt").input_features[0]
        return {"input_features": features, "labels": labels}


@dataclass
class SpeechProcessor:
    """What makes features of sound and ids of text; both are saved beside a model."""

    extractor: WhisperFeatureExtractor
    tokenizer: PreTrainedTokenizerBase

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        self.extractor.save_pretrained(folder, **options)
        self.tokenizer.save_pretrained(folder, **options)


def load_recordings(
    data: str, limit: int | None, text_column: str | None, fraction: float | None
) -> tuple[list[Recording], list[Recording]]:
    """
    Recordings, and those of them that are held out by the hash of their sound; none for a `fraction` of None.

    Raises:
        DataError: nothing was found, a table that does not fit its folder, or sound that cannot be read.
    """
    path = Path(data).expanduser()
    found = list(of_folder(path, text_column) if path.is_dir() else of_hub(data, text_column))[:limit]
    if not found:
        raise DataError(f"{data!r} holds no recordings.")
    if fraction is None:
        return found, []
    held_out = [place(recording.digest) < fraction for recording in found]
    train = [recording for recording, out in zip(found, held_out, strict=True) if not out]
    if not train or all(not out for out in held_out):
        raise DataError(
            f"validation_fraction={fraction} holds out {sum(held_out)} of the {len(found)} recordings of {data!r}. "
            "Give more, or validation_data."
        )
    return train, [recording for recording, out in zip(found, held_out, strict=True) if out]


def of_folder(folder: Path, text_column: str | None) -> Iterator[Recording]:
    """As datasets has it: a table beside the files, with a `file_name` and a text a row."""
    table = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    if table is None:
        raise DataError(f"{folder} has no table of its recordings: {' or '.join(TABLES)}, with file_name and text.")
    with open(table, encoding="utf-8", newline="") as file:
        rows = (
            list(csv.DictReader(file))
            if table.suffix == ".csv"
            else [json.loads(line) for line in file if line.strip()]
        )
    for row in rows:
        column = text_of(str(table), list(row), text_column)
        sound = folder / row.get("file_name", "")
        if not sound.is_file():
            raise DataError(f"{table}: {row.get('file_name')!r} is no file of its folder.")
        yield Recording(sound, row[column])


def of_hub(data: str, text_column: str | None) -> Iterator[Recording]:
    """A dataset on the Hub with a column of sound and one of text."""
    name, _, split = data.partition(":")
    if not is_hub_name(name):
        raise DataError(
            f"{data!r}: no such folder. Give a folder of WAV files with {TABLES[0]}, or the name of a Hub dataset."
        )
    try:
        rows = load_dataset(name, split=split or "train")
    except (DatasetNotFoundError, ConnectionError, OSError, ValueError) as error:
        raise DataError(f"{data!r} is no folder, and cannot be read from the Hub: {reason(error)}") from error
    sounds = [name for name, feature in rows.features.items() if isinstance(feature, Audio)]
    if len(sounds) != 1:
        raise DataError(f"{data!r} needs one column of sound; it has {rows.features}.")
    column = text_of(data, rows.column_names, text_column)
    try:
        for row in rows.cast_column(sounds[0], Audio(sampling_rate=RATE)):
            yield Recording(np.asarray(row[sounds[0]]["array"], dtype=np.float32), row[column])
    except ImportError as error:
        raise DataError(f"{data!r}: its sound cannot be decoded: {reason(error)}") from error


def text_of(where: str, columns: list[str], wanted: str | None) -> str:
    """The column with what is said."""
    for column in [wanted] if wanted else TEXTS:
        if column in columns:
            return column
    raise DataError(f"{where} has no column {wanted or ' or '.join(TEXTS)}; it has {', '.join(columns)}.")


def read_wave(path: Path) -> np.ndarray:
    """
    [S] the samples of a WAV file, float32, a mean over its channels.

    Raises:
        DataError: no PCM of 8, 16 or 32 bits, or another rate than 16,000 a second.
    """
    advice = f"Convert it: ffmpeg -i IN -ar {RATE} -ac 1 -c:a pcm_s16le OUT.wav"
    try:
        with wave.open(str(path), "rb") as file:
            rate, width, channels = file.getframerate(), file.getsampwidth(), file.getnchannels()
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise DataError(f"{path} cannot be read as WAV ({error}). {advice}") from error
    if rate != RATE or width not in SAMPLES:
        raise DataError(f"{path} has {rate} samples a second of {8 * width} bits. {advice}")
    dtype, zero, largest = SAMPLES[width]
    samples = (np.frombuffer(data, dtype=dtype).astype(np.float32) - zero) / largest
    return samples.reshape(-1, channels).mean(1)


def corpus_of(name: str, recordings: list[Recording]) -> Corpus:
    """What a tokenizer is trained on."""
    return Corpus.from_texts(name, [recording.text for recording in recordings])
