"""Texts, or rows of a dataset, as batches of windows of tokens."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class TextWindows:
    """
    Batches of `batch_size` windows, padded on the right.

    A text of at most `length` tokens is one window, with the tokenizer's special tokens. A longer one is cut into
    windows of exactly `length` tokens without special tokens; the tokens after the last whole window are left out, so
    that none of its windows is much shorter than the others. Texts without a token are left out.

    Args:
        texts: strings, or rows that hold one in `column`.
    """

    texts: Iterable[Any]
    tokenizer: PreTrainedTokenizerBase
    column: str
    length: int
    batch_size: int
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
        padding = self.tokenizer.pad_token_id or 0  # masked, so that any token will do
        remaining = self._windows()
        while ids := [torch.tensor(window) for window in islice(remaining, self.batch_size)]:
            mask = [torch.ones_like(i) for i in ids]
            yield {
                "input_ids": pad_sequence(ids, batch_first=True, padding_value=padding),
                "attention_mask": pad_sequence(mask, batch_first=True),
            }

    def _windows(self) -> Iterator[list[int]]:
        for row in self.texts:
            text = row if isinstance(row, str) else row[self.column]
            # Longer than the tokenizer's maximum on purpose; verbose=False keeps it from saying so.
            ids = self.tokenizer(text, verbose=False)["input_ids"]
            self.read += 1
            if len(ids) <= self.length:
                self.windows += bool(ids)
                yield from [ids] if ids else []
                continue
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            whole = max(len(ids) - len(ids) % self.length, min(len(ids), self.length))
            self.tokens_left_out += len(ids) - whole
            for start in range(0, whole, self.length):
                self.windows += 1
                yield ids[start : min(start + self.length, whole)]


def model_inputs(model: PreTrainedModel, input_ids: Tensor) -> dict[str, Any]:
    """Windows as the model takes them; a decoder beside an encoder reads the same text, one token later."""
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if model.config.is_encoder_decoder:
        config = model.config
        marks = (getattr(config, f"{name}_token_id", None) for name in ("decoder_start", "bos", "pad"))
        first = torch.full_like(input_ids[:, :1], next(mark for mark in marks if mark is not None))
        inputs["decoder_input_ids"] = torch.cat((first, input_ids[:, :-1]), dim=1)
    return inputs
