"""Corpus -> tokenizer -> windows: what a run trains and validates on."""

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .arguments import DataArguments
from .corpus import Corpus, load_corpus, split_by_hash
from .tokenization import load_tokenizer
from .windows import TokenWindows, build_windows, cache_folder


@dataclass
class TextData:
    """What a run trains and validates on."""

    tokenizer: PreTrainedTokenizerBase
    train: TokenWindows
    validation: TokenWindows


def load_data(args: DataArguments) -> TextData:
    """Read, split, tokenise and cut the corpus; everything is cached by content and found again.

    Raises:
        DataError: an empty corpus, one without a single window, or a damaged cache.
    """
    train, validation = load_splits(args)
    tokenizer = load_tokenizer(args.tokenizer, train, args.vocab_size, cache_folder(args))
    return TextData(
        tokenizer,
        TokenWindows(build_windows(train, tokenizer, args, "train")),
        TokenWindows(build_windows(validation, tokenizer, args, "validation"), args.max_validation_windows),
    )


def load_splits(args: DataArguments) -> tuple[Corpus, Corpus]:
    """The documents to train on and those to validate on."""
    corpus = whole_corpus(args)
    if args.validation_dataset is None:
        return split_by_hash(corpus, args.validation_fraction)
    kept = streaming_cache(args)
    return corpus, load_corpus(args.validation_dataset, args.max_validation_files, None, args.text_column, kept)


def whole_corpus(args: DataArguments) -> Corpus:
    """Every document, before any is held out."""
    kept = streaming_cache(args)
    return load_corpus(args.dataset, args.max_files, args.data_shuffle_seed, args.text_column, kept)


def load_validation(args: DataArguments, everything: bool = False) -> TokenWindows:
    """The held-out windows alone, or `everything`, for a tokenizer that exists; nothing is tokenised for training."""
    validation = whole_corpus(args) if everything else load_splits(args)[1]
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    return TokenWindows(build_windows(validation, tokenizer, args, "validation"), args.max_validation_windows)


def streaming_cache(args: DataArguments) -> Path | None:
    """Where the documents of a stream are kept; None where nothing is streamed."""
    return cache_folder(args) / "documents" if args.streaming else None
