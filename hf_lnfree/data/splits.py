"""Corpus -> tokenizer -> windows: what a run trains and validates on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .arguments import DataArguments
from .corpus import Corpus, load_corpus, split_by_hash
from .tokenization import tokenizer_for
from .windows import TokenWindows, build_windows, cache_folder


@dataclass
class TextData:
    """What a run trains and validates on."""

    tokenizer: PreTrainedTokenizerBase
    train: TokenWindows
    validation: TokenWindows


def load_data(args: DataArguments, **access: Any) -> TextData:
    """Read, split, tokenise and cut the corpus; everything is cached by content and found again.

    Args:
        access: `trust_remote_code` and `revision` of a tokenizer that exists.

    Raises:
        DataError: an empty corpus, one without a single window, or a damaged cache.
        ModelError: a tokenizer that is not there or cannot be read.
    """
    train, validation = load_splits(args)
    tokenizer = tokenizer_for(args.tokenizer, train, args.vocab_size, cache_folder(args), **access)
    return TextData(
        tokenizer,
        TokenWindows(build_windows(train, tokenizer, args, "train")),
        TokenWindows(build_windows(validation, tokenizer, args, "validation"), args.max_validation_windows),
    )


def load_splits(args: DataArguments) -> tuple[Corpus, Corpus]:
    """The documents to train on and those to validate on."""
    corpus = whole_corpus(args)
    if args.validation_data is None:
        return split_by_hash(corpus, args.validation_fraction)
    kept = streaming_cache(args)
    return corpus, load_corpus(args.validation_data, args.max_validation_documents, None, args.text_column, kept)


def whole_corpus(args: DataArguments) -> Corpus:
    """Every document, before any is held out."""
    kept = streaming_cache(args)
    return load_corpus(args.data, args.max_documents, args.data_shuffle_seed, args.text_column, kept)


def load_validation(args: DataArguments, tokenizer: PreTrainedTokenizerBase, everything: bool = False) -> TokenWindows:
    """The held-out windows alone, or `everything`, for a tokenizer that exists; nothing is tokenised for training."""
    validation = whole_corpus(args) if everything else load_splits(args)[1]
    return TokenWindows(build_windows(validation, tokenizer, args, "validation"), args.max_validation_windows)


def streaming_cache(args: DataArguments) -> Path | None:
    """Where the documents of a stream are kept; None where nothing is streamed."""
    return cache_folder(args) / "documents" if args.streaming else None
