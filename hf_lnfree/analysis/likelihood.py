r"""The likelihood of documents under a causal language model: perplexity, bits per byte, and their intervals.

A document longer than the context is read in windows that overlap; every token but the first is scored exactly once,
with as much of its past as the windows allow. Sums are kept, never documents, so that streams of any length can be
scored and the sums of several processes added.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import SettingsError
from .modes import evaluation, execution_device

BLOCK = 16  # batches of windows that are sorted by length at a time
NORMAL_975 = 1.96

Window = tuple[int, Tensor, int]
"""Number of its document, token ids [T], and how many of these only give context."""


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that overflows, NaN for NaN."""
    return torch.tensor(loss).double().exp().item()


@dataclass
class Likelihood:
    r"""
    Sums over documents $d$ with the negative log-likelihood $\ell_d$ (nats) of $n_d$ predicted tokens, which are $b_d$
    bytes of UTF-8.
    """

    documents: float = 0.0
    nats: float = 0.0
    tokens: float = 0.0
    bytes: float = 0.0
    nats_nats: float = 0.0
    nats_tokens: float = 0.0
    tokens_tokens: float = 0.0
    nats_bytes: float = 0.0
    bytes_bytes: float = 0.0

    def add(self, nats: float, tokens: int, size: int) -> None:
        products = (nats * nats, nats * tokens, tokens * tokens, nats * size, size * size)
        for name, value in zip(vars(self), (1, nats, tokens, size, *products), strict=True):
            setattr(self, name, getattr(self, name) + value)

    def __add__(self, other: "Likelihood") -> "Likelihood":
        return Likelihood(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def loss(self) -> float:
        r"""$\sum \ell_d / \sum n_d$: nats a token."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        r"""$\sum \ell_d / (\ln 2 \sum b_d)$: comparable between tokenizers."""
        return self.nats / self.bytes / math.log(2) if self.bytes else math.nan

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    @property
    def loss_half_width(self) -> float:
        """Of the 95 % interval of `loss` over documents."""
        return self._half_width(self.loss, self.tokens, self.nats_tokens, self.tokens_tokens)

    @property
    def bits_half_width(self) -> float:
        """Of the 95 % interval of `bits_per_byte` over documents."""
        ratio = self.bits_per_byte * math.log(2)
        return self._half_width(ratio, self.bytes, self.nats_bytes, self.bytes_bytes) / math.log(2)

    def _half_width(self, ratio: float, size: float, cross: float, square: float) -> float:
        r"""Of a ratio of sums, by the delta method: residuals $\ell_d - r n_d$ are independent between documents."""
        if self.documents < 2 or not size:
            return math.nan
        squares = max(0.0, self.nats_nats - 2 * ratio * cross + ratio * ratio * square)
        return NORMAL_975 * math.sqrt(squares * self.documents / (self.documents - 1)) / size


def windows(documents: Iterable[Tensor], context_length: int, stride: int) -> Iterator[Window]:
    """Every document in pieces of `context_length`, each `stride` after the one before."""
    for number, ids in enumerate(documents):
        scored = 0
        for start in range(0, max(1, len(ids)), stride):
            end = min(start + context_length, len(ids))
            if end - max(scored, start + 1) > 0:
                yield number, ids[start:end], max(scored, start + 1) - start
            scored = end
            if end == len(ids):
                break


@torch.no_grad()
def document_likelihoods(
    model: PreTrainedModel,
    documents: Iterable[Tensor],
    context_length: int,
    stride: int | None = None,
    batch_size: int = 8,
) -> Iterator[tuple[int, float, int]]:
    """
    The negative log-likelihood of every document, in their order.

    Args:
        model: causal language model, in eval mode for the time of this.
        documents: token ids [N] each; the first of a document is given, not predicted.
        context_length: tokens a window.
        stride: from one window to the next; half a window by default. Every token has at least
            `context_length - stride` tokens of context where the document has them.
        batch_size: windows a forward pass.

    Yields:
        (number, nats, predicted tokens) of each document with at least two tokens.

    Raises:
        SettingsError: a window of less than two tokens, or a stride that would skip tokens.
    """
    stride = context_length // 2 if stride is None else stride
    if context_length < 2 or not 1 <= stride < context_length:
        raise SettingsError(
            f"context_length must be at least 2 and stride at least 1 and smaller, got {context_length} and {stride}."
        )
    stream = windows(documents, context_length, stride)
    totals: dict[int, tuple[float, int]] = {}
    with evaluation(model):
        while block := list(itertools.islice(stream, BLOCK * batch_size)):
            block.sort(key=lambda window: len(window[1]))
            for start in range(0, len(block), batch_size):
                batch = block[start : start + batch_size]
                for (number, ids, given), nats in zip(batch, window_nats(model, batch), strict=True):
                    before = totals.get(number, (0.0, 0))
                    totals[number] = (before[0] + nats, before[1] + len(ids) - given)
            unfinished = max(number for number, _, _ in block)  # its next window may come in the next block
            for number in sorted(totals):
                if number < unfinished:
                    yield number, *totals.pop(number)
        for number in sorted(totals):
            yield number, *totals[number]


def window_nats(model: PreTrainedModel, batch: list[Window]) -> list[float]:
    """The negative log-likelihood of what a window predicts, for each of them, padded on the right."""
    longest, device = max(len(ids) for _, ids, _ in batch), execution_device(model)
    padded = torch.stack([F.pad(ids, (0, longest - len(ids))) for _, ids, _ in batch]).to(device)
    lengths = torch.tensor([len(ids) for _, ids, _ in batch], device=device)
    given = torch.tensor([count for _, _, count in batch], device=device)
    places = torch.arange(longest, device=device)
    mask = (places < lengths[:, None]).long()
    logits = model(input_ids=padded, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    nats = F.cross_entropy(logits.transpose(1, 2), padded[:, 1:], reduction="none")  # B T-1
    predicted = (places[1:] >= given[:, None]) & mask[:, 1:].bool()
    return nats.double().where(predicted, 0.0).sum(1).tolist()
