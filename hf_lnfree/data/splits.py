"""Corpus -> tokenizer -> windows, pairs or images: what a run trains and validates on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, ViTImageProcessorPil, WhisperFeatureExtractor

from .arguments import DataArguments
from .building import build_windows
from .corpus import Corpus, load_corpus, split_by_hash
from .corrupted import MaskedWindows, SpanWindows, sentinels, spans_in
from .images import MEAN, STD, load_images
from .objectives import Objective, objective_of
from .pairs import SOURCE, PairExamples, pairs_of, texts_of
from .speech import POSITIONS_A_SECOND, SpeechExamples, SpeechProcessor, corpus_of, load_recordings
from .tokenization import MASK, tokenizer_for
from .windows import TokenWindows, cache_folder


@dataclass
class RunData:
    """
    What a run trains and validates on.

    Args:
        objective: what is predicted.
        processor: of its inputs: a tokenizer, an image processor, or a feature extractor with a tokenizer.
        train: has `meta`, what results record of it.
        fields: what the data decide of a configuration.
    """

    objective: Objective
    processor: Any
    train: Any
    validation: Any
    fields: dict[str, Any]

    @property
    def tokenizer(self) -> Any:
        """The processor of text; of images, which have none, theirs."""
        return self.processor.tokenizer if isinstance(self.processor, SpeechProcessor) else self.processor


def load_data(args: DataArguments, seed: int = 0, **access: Any) -> RunData:
    """Read, split and cut the data as `args.objective` needs them; everything is cached by content and found again.

    Args:
        seed: of what is hidden from a model that has to find it; held-out windows hide the same under every seed.
        access: `trust_remote_code` and `revision` of a tokenizer that exists.

    Raises:
        DataError: an empty corpus, one without a single window, a tokenizer that lacks what the objective needs, or a
            damaged cache.
        ModelError: a tokenizer that is not there or cannot be read.
    """
    objective = objective_of(args.objective)
    if objective.name == "image":
        return image_data(args, objective)
    if objective.name == "speech":
        return speech_data(args, objective, access)
    train, validation = load_splits(args)
    if objective.name == "pairs":
        return pair_data(train, validation, args, objective, access)
    tokenizer = tokenizer_for(args.tokenizer, train, args.vocab_size, cache_folder(args), marks_of(args), **access)
    windows = (
        TokenWindows(build_windows(train, tokenizer, args, "train")),
        TokenWindows(build_windows(validation, tokenizer, args, "validation"), args.max_validation_windows),
    )
    splits: tuple[Any, Any] = windows
    if objective.name in CORRUPTED:
        hidden = CORRUPTED[objective.name]
        splits = hidden(windows[0], tokenizer, seed, True), hidden(windows[1], tokenizer, 0, False)
    fields = token_fields(tokenizer, decoder=objective.name == "span")
    return RunData(objective, tokenizer, *splits, fields)


def image_data(args: DataArguments, objective: Objective) -> RunData:
    """Images, and the processor that makes of an image what the model was trained on."""
    train, validation = load_images(args)
    channels, height, width = train.meta["shape"]
    processor = ViTImageProcessorPil(
        size={"height": height, "width": width}, image_mean=[MEAN] * channels, image_std=[STD] * channels
    )
    labels = train.meta["labels"]
    fields = {
        "image_size": height if height == width else [height, width],
        "num_channels": channels,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
    }
    return RunData(objective, processor, train, validation, fields)


def speech_data(args: DataArguments, objective: Objective, access: dict[str, Any]) -> RunData:
    """Recordings and their texts."""
    fraction = args.validation_fraction if args.validation_data is None else None
    train, validation = load_recordings(args.data, args.max_documents, args.text_column, fraction)
    if args.validation_data is not None:
        limit = args.max_validation_documents
        validation, _ = load_recordings(args.validation_data, limit, args.text_column, None)
    extractor = WhisperFeatureExtractor(chunk_length=args.audio_seconds)
    corpus = corpus_of(args.data, train)
    tokenizer = tokenizer_for(args.tokenizer, corpus, args.vocab_size, cache_folder(args), **access)
    length = args.context_length
    splits = (
        SpeechExamples(args.data, train, extractor, tokenizer, length),
        SpeechExamples(args.data, validation, extractor, tokenizer, length, args.max_validation_windows),
    )
    fields = token_fields(tokenizer, decoder=True) | {
        "max_source_positions": POSITIONS_A_SECOND * args.audio_seconds,
        "num_mel_bins": extractor.feature_size,
    }
    return RunData(objective, SpeechProcessor(extractor, tokenizer), *splits, fields)


def pair_data(
    train: Corpus, validation: Corpus, args: DataArguments, objective: Objective, access: dict[str, Any]
) -> RunData:
    """Sources and targets; a pair lies on the side of the document that it is from."""
    train, validation = pairs_of(train), pairs_of(validation)
    cache = cache_folder(args)
    tokenizer = tokenizer_for(args.tokenizer, texts_of(train), args.vocab_size, cache, marks_of(args), **access)
    length = args.context_length
    splits = (
        PairExamples(train, tokenizer, length),
        PairExamples(validation, tokenizer, length, args.max_validation_windows),
    )
    return RunData(objective, tokenizer, *splits, token_fields(tokenizer, decoder=True))


CORRUPTED = {"masked": MaskedWindows, "span": SpanWindows}
"""Objective -> the windows that hide a part."""


def marks_of(args: DataArguments) -> dict[str, Any]:
    """The tokens that a tokenizer needs for an objective, beside the end of a text and padding."""
    if args.objective == "masked":
        return {"mask_token": MASK}
    if args.objective == "span":
        return {"extra_special_tokens": sentinels(spans_in(args.context_length)[1])}
    return {}


def token_fields(tokenizer: PreTrainedTokenizerBase, decoder: bool = False) -> dict[str, Any]:
    """What a tokenizer decides of a configuration; a decoder beside an encoder starts with padding, as T5's does."""
    start = {"decoder_start_token_id": tokenizer.pad_token_id} if decoder else {}
    return start | {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def load_splits(args: DataArguments) -> tuple[Corpus, Corpus]:
    """The documents to train on and those to validate on."""
    corpus = whole_corpus(args)
    if args.validation_data is None:
        return split_by_hash(corpus, args.validation_fraction)
    kept = streaming_cache(args)
    return corpus, load_corpus(args.validation_data, args.max_validation_documents, None, column_of(args), kept)


def whole_corpus(args: DataArguments) -> Corpus:
    """Every document, before any is held out."""
    kept = streaming_cache(args)
    return load_corpus(args.data, args.max_documents, args.data_shuffle_seed, column_of(args), kept)


def column_of(args: DataArguments) -> str | None:
    """Of a table, the column that is read as text."""
    return SOURCE if args.objective == "pairs" else args.text_column


def load_validation(args: DataArguments, tokenizer: PreTrainedTokenizerBase, everything: bool = False) -> TokenWindows:
    """The held-out windows alone, or `everything`, for a tokenizer that exists; nothing is tokenised for training."""
    validation = whole_corpus(args) if everything else load_splits(args)[1]
    return TokenWindows(build_windows(validation, tokenizer, args, "validation"), args.max_validation_windows)


def streaming_cache(args: DataArguments) -> Path | None:
    """Where the documents of a stream are kept; None where nothing is streamed."""
    return cache_folder(args) / "documents" if args.streaming else None
