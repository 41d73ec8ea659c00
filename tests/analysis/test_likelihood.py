"""Likelihood of documents: every token once, with the context it is promised, against one forward pass a token."""

import math

import pytest
import torch

from hf_lnfree.analysis.likelihood import Likelihood, document_likelihoods

from ..conversion.conftest import trained


def documents(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 99, (length,), generator=generator) for length in lengths]


def naive(model, ids, context, stride):
    """One forward pass for each predicted token, in float64."""
    total = 0.0
    for i in range(1, len(ids)):
        # the window that scores i is the first that reaches it
        start = 0 if i < context else math.ceil((i - context + 1) / stride) * stride
        with torch.no_grad():
            logits = model(ids[None, start:i]).logits[0, -1].double()
        total -= logits.log_softmax(-1)[ids[i]].item()
    return total


@pytest.mark.parametrize(("context", "stride"), [(16, 1), (16, 8), (16, 15), (64, 32)])
def test_every_token_is_scored_once_with_its_context(family, context, stride):
    model = trained(family.model(norm="layernorm"))
    texts = documents(40, 2, 17, 1, 16, 0, 33)
    found = list(document_likelihoods(model, iter(texts), context, stride, batch_size=2))
    assert [number for number, _, _ in found] == [0, 1, 2, 4, 6]  # one token alone predicts nothing
    for number, nats, tokens in found:
        assert tokens == len(texts[number]) - 1
        assert nats == pytest.approx(naive(model, texts[number], context, stride), rel=1e-5)


def test_batches_do_not_matter_and_documents_come_in_order(family):
    model = trained(family.model())
    texts = documents(*(3 + 7 * i % 50 for i in range(60)))
    one = list(document_likelihoods(model, iter(texts), 20, batch_size=1))
    many = list(document_likelihoods(model, iter(texts), 20, batch_size=7))
    assert [n for n, _, _ in one] == [n for n, _, _ in many] == list(range(60))
    assert [v for _, v, _ in one] == pytest.approx([v for _, v, _ in many], rel=1e-5)


def test_a_stream_is_read_as_it_is_needed(family):
    model = trained(family.model())
    read = []

    def stream():
        for ids in documents(*[20] * 400):
            read.append(len(ids))
            yield ids

    results = document_likelihoods(model, stream(), 32, batch_size=2)
    next(results)
    assert len(read) < 100


def test_intervals_are_those_of_a_ratio():
    pairs = [(10.0, 4, 20), (30.0, 9, 31), (5.0, 3, 11), (44.0, 12, 60)]
    total = Likelihood()
    for pair in pairs:
        total.add(*pair)
    nats, tokens, size = map(sum, zip(*pairs, strict=True))
    assert total.loss == nats / tokens
    assert total.perplexity == pytest.approx(math.exp(nats / tokens))
    assert total.bits_per_byte == pytest.approx(nats / size / math.log(2))
    residuals = [a - total.loss * b for a, b, _ in pairs]
    assert total.loss_half_width == pytest.approx(1.96 * math.sqrt(sum(r * r for r in residuals) * 4 / 3) / tokens)
    halves = Likelihood(), Likelihood()
    for index, pair in enumerate(pairs):
        halves[index % 2].add(*pair)
    assert vars(halves[0] + halves[1]) == pytest.approx(vars(total))


def test_nothing_and_nan_are_nan():
    empty = Likelihood()
    assert math.isnan(empty.loss)
    assert math.isnan(empty.perplexity)
    assert math.isnan(empty.bits_per_byte)
    one = Likelihood()
    one.add(math.nan, 3, 9)
    assert math.isnan(one.perplexity)
    assert math.isnan(one.loss_half_width)
    many = Likelihood()
    many.add(5000.0, 3, 9)
    assert many.perplexity == math.inf


@pytest.mark.parametrize(("context", "stride"), [(1, None), (16, 0), (16, 16)])
def test_windows_that_skip_tokens_are_refused(family, context, stride):
    with pytest.raises(ValueError, match="context_length must be at least 2 and stride"):
        next(document_likelihoods(family.model(), iter(documents(5)), context, stride))
