"""Texts, or rows of a dataset, as batches of windows of tokens."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Window(NamedTuple):
    """
    Tokens that a model reads at once.

    Args:
        ids: [T]
        text: number of the text that it was cut from, counted from 0.
        kinds: [T] what `kinds` of `TextWindows` says of the tokens; None without it.
    """

    ids: list[int]
    text: int
    kinds: list[int] | None = None


@dataclass
class TextWindows:
    """
    Batches of `batch_size` windows, padded on the right.

    A text of at most `length` tokens is one window, with the tokenizer's special tokens. A longer one is cut into
    windows of exactly `length` tokens without special tokens; the tokens after the last whole window are left out, so
    that none of its windows is much shorter than the others. Texts without a token are left out.

    Args:
        texts: strings, or rows that hold one in `column`.
        kinds: says of a text, and of where in it each token lies, what class every token has; it needs a tokenizer that
            tells where tokens lie.
    """

    texts: Iterable[Any]
    tokenizer: PreTrainedTokenizerBase
    column: str
    length: int
    batch_size: int
    kinds: Callable[[str, Sequence[tuple[int, int]]], list[int]] | None = None
    read: int = 0
    """Texts read so far."""
    windows: int = 0
    """Cut from them."""
    tokens_left_out: int = 0
    """At the ends of texts."""

    def counts(self) -> dict[str, int]:
        """What was read so far."""
        return {"texts": self.read, "windows": self.windows, "tokens_left_out": self.tokens_left_out}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self.together(windows) for windows in self.batches())

    def batches(self) -> Iterator[list[Window]]:
        """The windows, `batch_size` at a time."""
        remaining = self.cut()
        while windows := list(islice(remaining, self.batch_size)):
            yield windows

    def together(self, windows: Sequence[Window]) -> dict[str, Tensor]:
        """As a model takes them."""
        padding = self.tokenizer.pad_token_id or 0  # masked, so that any token will do
        ids = [torch.tensor(window.ids) for window in windows]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=padding),
            "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
        }

    def cut(self) -> Iterator[Window]:
        """The windows of all texts, in order."""
        for row in self.texts:
            text = row if isinstance(row, str) else row[self.column]
            # Longer than the tokenizer's maximum on purpose; verbose=False keeps it from saying so.
            ids, kinds = self.encode(text)
            number = self.read
            self.read += 1
            if len(ids) <= self.length:
                self.windows += bool(ids)
                yield from [Window(ids, number, kinds)] if ids else []
                continue
            ids, kinds = self.encode(text, add_special_tokens=False)
            whole = max(len(ids) - len(ids) % self.length, min(len(ids), self.length))
            self.tokens_left_out += len(ids) - whole
            for start in range(0, whole, self.length):
                part = slice(start, min(start + self.length, whole))
                self.windows += 1
                yield Window(ids[part], number, None if kinds is None else kinds[part])

    def encode(self, text: str, **options: Any) -> tuple[list[int], list[int] | None]:
        """Token ids of a text, and of which kind each is."""
        if self.kinds is None:
            return self.tokenizer(text, verbose=False, **options)["input_ids"], None
        found = self.tokenizer(text, verbose=False, return_offsets_mapping=True, **options)
        return found["input_ids"], self.kinds(text, found["offset_mapping"])


def model_inputs(model: PreTrainedModel, input_ids: Tensor) -> dict[str, Any]:
    """Windows as the model takes them; a decoder beside an encoder reads the same text, one token later."""
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if model.config.is_encoder_decoder:
        config = model.config
        marks = (getattr(config, f"{name}_token_id", None) for name in ("decoder_start", "bos", "pad"))
        first = torch.full_like(input_ids[:, :1], next(mark for mark in marks if mark is not None))
        inputs["decoder_input_ids"] = torch.cat((first, input_ids[:, :-1]), dim=1)
    return inputs
