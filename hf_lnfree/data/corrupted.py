"""Windows of which a part is hidden, for a model that has to find it: masked tokens (BERT) and cut-out spans (T5).

What is hidden of a window depends on the seed, the epoch and the window's number alone, so that a resumed run hides
what the uninterrupted one would have.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from ..errors import DataError
from .windows import TokenWindows

NOISE, MEAN_SPAN = 0.15, 3.0
"""Share of tokens that is hidden, and the mean length of a span (arXiv 1810.04805 and 1910.10683)."""


class CorruptedWindows(Dataset):
    """
    Args:
        windows: what a part is hidden of.
        tokenizer: has the tokens that stand for what is hidden.
        seed: of the choice.
        renewed: whether every epoch hides another part; held-out windows stay as they are.
    """

    def __init__(self, windows: TokenWindows, tokenizer: PreTrainedTokenizerBase, seed: int, renewed: bool):
        self.windows, self.tokenizer, self.seed, self.renewed = windows, tokenizer, seed, renewed
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # workers of a loader see it change
        self.meta = windows.meta

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        found = self.windows.__getitems__(indices)
        return [self.corrupt(item["input_ids"], self.source(i)) for i, item in zip(indices, found, strict=True)]

    def set_epoch(self, epoch: int) -> None:
        """As the loaders of accelerate and datasets call it."""
        self.epoch.fill_(epoch if self.renewed else 0)

    def source(self, index: int) -> np.random.Generator:
        """The random numbers of one window."""
        return np.random.default_rng((self.seed, int(self.epoch), index))

    def corrupt(self, ids: Tensor, source: np.random.Generator) -> dict[str, Tensor]:
        """Inputs and labels of a window."""
        raise NotImplementedError


class MaskedWindows(CorruptedWindows):
    """
    15 % of the tokens are to be found; of these 80 % are masked, 10 % are another token and 10 % stay (arXiv
    1810.04805, 3.1). Labels are -100 elsewhere. As transformers' `DataCollatorForLanguageModeling` does it.

    Raises:
        DataError: the tokenizer has no mask token.
    """

    def __init__(self, windows: TokenWindows, tokenizer: PreTrainedTokenizerBase, seed: int, renewed: bool):
        super().__init__(windows, tokenizer, seed, renewed)
        if tokenizer.mask_token is None:
            raise DataError(
                "objective 'masked' hides tokens behind a mask token, and this tokenizer has none. Use that of a BERT, "
                "or none, and one is trained on the text."
            )
        self.collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=NOISE)

    def corrupt(self, ids: Tensor, source: np.random.Generator) -> dict[str, Tensor]:
        self.collator.generator = torch.Generator().manual_seed(int(source.integers(2**63)))
        masked, labels = self.collator.torch_mask_tokens(ids[None].clone())
        return {"input_ids": masked[0], "labels": labels[0]}


class SpanWindows(CorruptedWindows):
    """
    Spans of 3 tokens on average, 15 % of all, are cut out, a sentinel in the place of each; the labels are the spans,
    each behind its sentinel, and an end of text (arXiv 1910.10683, 3.1.4). All windows give the same lengths.

    Raises:
        DataError: the tokenizer has no end of text, or too few sentinels (`<extra_id_0>`, ...) for such windows.
    """

    def __init__(self, windows: TokenWindows, tokenizer: PreTrainedTokenizerBase, seed: int, renewed: bool):
        super().__init__(windows, tokenizer, seed, renewed)
        length = windows.meta["context_length"]
        self.noise, self.spans = spans_in(length)
        names = sentinels(self.spans)
        known = tokenizer.get_vocab()
        if missing := [name for name in names if name not in known]:
            raise DataError(
                f"objective 'span' puts a sentinel in the place of each of {self.spans} spans, and this tokenizer has "
                f"no {missing[0]}. Use that of a T5, or none, and one is trained on the text."
            )
        if tokenizer.eos_token_id is None:
            raise DataError("objective 'span' ends its texts with an end-of-text token, and this tokenizer has none.")
        self.sentinels = torch.tensor([known[name] for name in names])
        self.eos = torch.tensor([tokenizer.eos_token_id])

    def corrupt(self, ids: Tensor, source: np.random.Generator) -> dict[str, Tensor]:
        kept = parts(len(ids) - self.noise, self.spans, source)
        cut = parts(self.noise, self.spans, source)
        pieces = ids.split([length for pair in zip(kept, cut, strict=True) for length in pair])
        inputs, labels = [], []
        for sentinel, left, gone in zip(self.sentinels.split(1), pieces[::2], pieces[1::2], strict=True):
            inputs += [left, sentinel]
            labels += [sentinel, gone]
        whole: dict[str, Any] = {"input_ids": [*inputs, self.eos], "labels": [*labels, self.eos]}
        return {name: torch.cat(tensors) for name, tensors in whole.items()}


def spans_in(length: int) -> tuple[int, int]:
    """How many of T tokens are cut out, in how many spans."""
    noise = min(max(round(NOISE * length), 1), length - 1)
    return noise, min(max(round(noise / MEAN_SPAN), 1), noise, length - noise)


def sentinels(count: int) -> list[str]:
    """The names of T5's sentinels."""
    return [f"<extra_id_{index}>" for index in range(count)]


def parts(total: int, count: int, source: np.random.Generator) -> list[int]:
    """`total` as a sum of `count` positive numbers, each such sum as likely as any other."""
    ends = np.sort(source.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff([0, *ends, total]).tolist()
