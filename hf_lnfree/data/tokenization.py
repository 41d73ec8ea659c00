"""The tokenizer of a run: one that exists, or a byte-level BPE trained on the corpus."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..files import atomic_folder, content_key
from ..loading import load_tokenizer
from .corpus import Corpus

END_OF_TEXT, PADDING, MASK = "<|endoftext|>", "<|padding|>", "<|mask|>"


def tokenizer_for(
    name: str | None,
    corpus: Corpus,
    vocab_size: int,
    cache: Path,
    marks: Mapping[str, Any] | None = None,
    **access: Any,
) -> PreTrainedTokenizerBase:
    """
    The tokenizer of that name or folder; without one, a byte-level BPE trained on the corpus and kept in `cache`.

    Args:
        marks: special tokens that such a one has beside the end of a text and padding, as tokenizers call them.
    """
    if name is not None:
        return load_tokenizer(name, **access)
    folder = cache / "tokenizers" / content_key(corpus.key, vocab_size, *([marks] if marks else []))
    if not folder.exists():
        with atomic_folder(folder) as partial:
            train_bpe(corpus.texts, vocab_size, marks or {}).save_pretrained(partial)
    return load_tokenizer(folder)


def train_bpe(texts: Iterable[str], vocab_size: int, marks: Mapping[str, Any] = {}) -> PreTrainedTokenizerFast:
    """A byte-level BPE as GPT-2 has it, with an end-of-text and a padding token, and other `marks`."""
    more = [token for mark in marks.values() for token in ([mark] if isinstance(mark, str) else mark)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT, PADDING, *more],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=PADDING, **marks
    )


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of vocabulary, merges and normalisation; of a slow tokenizer its vocabulary, of images all settings."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return hashlib.sha256(tokenizer.to_json_string().encode()).hexdigest()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(state.encode()).hexdigest()
