"""Statistics of attention rows against the whole map in float64, for every kind of mask."""

import math

import pytest
import torch

from hf_lnfree.attention.fused import fused_attention_entropy
from hf_lnfree.attention.statistics import TOP_KEYS, top_sum
from hf_lnfree.errors import AttentionError
from tests.attention.test_fused import BIAS, MASKS, tensors


def definition(q, k, v, mask=None, is_causal=False, sinks=None, softcap=None):
    """By name, from the whole map."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, 1) for x in (k, v))
    logits = q.double() @ k.mT / math.sqrt(q.shape[-1])
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    shown = torch.ones_like(logits, dtype=torch.bool)
    if is_causal:
        shown = shown.tril()
    if mask is not None and mask.dtype == torch.bool:
        shown = shown & mask
    elif mask is not None:
        shown = shown & (mask > torch.finfo(mask.dtype).min / 2)
        logits = logits + mask.double()
    hidden = logits.masked_fill(~shown, -math.inf)
    column = None if sinks is None else sinks.double()[None, :, None, None].expand(*logits.shape[:3], 1)
    p = (hidden if column is None else torch.cat((hidden, column), -1)).softmax(-1)[..., : k.shape[2]]
    count = shown.sum(-1)
    mean = logits.where(shown, 0.0).sum(-1) / count
    alive = count > 0
    first = shown.any(1).any(1).int().argmax(-1)  # B
    found = {
        "largest_logit": hidden.amax(-1),
        "logit_variance": (logits - mean[..., None]).square().where(shown, 0.0).sum(-1) / count,
        "sink_mass": torch.stack([row[..., i] for row, i in zip(p, first, strict=True)]),
        "top_mass": p.sort(-1, descending=True).values[..., :TOP_KEYS].sum(-1),
        "output_norm": (p @ v).norm(dim=-1),
    }
    return {name: values.where(alive, math.nan) for name, values in found.items()}


OPTIONS = MASKS | {
    "bias": {"attention_mask": BIAS},
    "cap": {"softcap": 2.0, "is_causal": True},
    "sinks": {"sinks": torch.tensor([1.0, 0.0, -3.0, 8.0]), "is_causal": True},
    "padding and a bias": {"attention_mask": MASKS["additive"]["attention_mask"] + BIAS},
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("name", OPTIONS)
def test_equal_the_whole_map(name, scale, dtype, tolerance):
    q, k, v = (x.to(dtype) for x in tensors(kv_heads=2, scale=scale))
    k = k + 3  # a mean that is taken off the keys, and must come back in the largest logit
    options = dict(OPTIONS[name])
    expected = definition(q, k, v, options.pop("attention_mask", None), **options)
    found = fused_attention_entropy(q, k, v, statistics=True, **OPTIONS[name]).statistics._asdict()
    assert expected.keys() == found.keys()
    for key, values in found.items():
        torch.testing.assert_close(values.double(), expected[key], rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("length", [1, 3, 127, 300, 2500])
def test_long_rows_in_several_blocks(length):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, length, 4, generator=g, dtype=torch.float64) for _ in range(3))
    found = fused_attention_entropy(q[:, :, -3:], k, v, statistics=True).statistics._asdict()
    for key, values in definition(q[:, :, -3:], k, v).items():
        torch.testing.assert_close(found[key], values, rtol=1e-11, atol=1e-11)
    causal = fused_attention_entropy(q, k, v, statistics=True, is_causal=True).statistics
    expected = definition(q, k, v, is_causal=True)
    every = {1: 1, 3: 1, 127: 1, 300: 2, 2500: 10}[length]
    assert causal.top_mass.shape[-1] == -(-length // every) <= 256
    torch.testing.assert_close(causal.top_mass, expected["top_mass"][..., ::every], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(causal.sink_mass, expected["sink_mass"], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("size", [1, 7, 8, 128, 129, 255, 1000, 2048, 16384, 20001])
def test_largest_values_are_found_among_ties_too(size):
    values = torch.rand(2, 3, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    values[0] = (values[0] * 3).round()
    expected = values.sort(-1, descending=True).values[..., :TOP_KEYS].sum(-1)
    torch.testing.assert_close(top_sum(values, TOP_KEYS), expected)
    torch.testing.assert_close(top_sum(values.sort(-1).values, TOP_KEYS), expected)  # the last of a row, in no group


def test_nan_is_reported_as_nan():
    q, k, v = tensors()
    q[0, 1, 5] = math.nan
    found = fused_attention_entropy(q, k, v, statistics=True).statistics
    for values in found:
        assert values.isnan().sum() == 1
        assert values[0, 1, 5].isnan()


def test_the_entropies_are_the_same():
    q, k, v = (x.float() for x in tensors())
    found = fused_attention_entropy(q, k, v, statistics=True, is_causal=True)
    alone = fused_attention_entropy(q, k, v, is_causal=True)
    assert alone.statistics is None
    for name in ("entropy", "output", "support"):
        assert torch.equal(getattr(found, name), getattr(alone, name))


def test_another_back_end_is_refused():
    with pytest.raises(AttentionError, match=r"'cpu_flash' makes no statistics\. Use 'chunked'"):
        fused_attention_entropy(*tensors(), backend="cpu_flash", statistics=True)
