"""Texts as the token ids that are scored, and the bytes that these stand for."""

from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import SettingsError

BATCH = 64  # texts tokenised at a time
LONGEST = 50_000_000  # characters: a tokenizer takes a text as a whole, and about thirty bytes for each of them


class TokenisedDocuments:
    """
    Token ids of texts, one document at a time; `sizes` holds the bytes of UTF-8 of those that were handed out.

    Args:
        texts: read when they are needed.
        tokenizer: of the model.
        first: a token before each document, so that its first own token is predicted too; None for none.

    Raises:
        SettingsError: a text too long to be tokenised as a whole.
    """

    def __init__(self, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, first: int | None):
        self.texts, self.tokenizer, self.first = texts, tokenizer, first
        self.sizes: deque[int] = deque()

    def __iter__(self) -> Iterator[Tensor]:
        batch: list[str] = []
        for number, text in enumerate(self.texts):
            if len(text) > LONGEST:
                raise SettingsError(
                    f"Document {number} has {len(text):,} characters, and a tokenizer takes a document as a whole, up "
                    f"to {LONGEST:,} here. Cut it into documents: a .jsonl file with one text a line."
                )
            batch.append(text)
            if len(batch) == BATCH:
                yield from self.tokenised(batch)
                batch = []
        yield from self.tokenised(batch)

    def tokenised(self, texts: list[str]) -> Iterator[Tensor]:
        if not texts:
            return
        fast = self.tokenizer.is_fast
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
        for index, text in enumerate(texts):
            ids = encoded["input_ids"][index]
            if self.first is not None:
                ids, predicted = [self.first, *ids], text
            elif fast:
                predicted = text[encoded["offset_mapping"][index][0][1] :] if ids else ""
            else:
                predicted = text[len(self.tokenizer.decode(ids[:1])) :]
            self.sizes.append(len(predicted.encode(errors="surrogatepass")))
            yield torch.tensor(ids, dtype=torch.long)
