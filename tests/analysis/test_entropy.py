"""Entropy as a function of tensors, against closed forms, float64 and the published percentages."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lnfree.analysis import (
    attention_entropy,
    bucket_shares,
    causal_bound,
    entropy_maximum,
    normalized_entropy,
    overloaded_share,
    published_reports,
    row_support,
)
from hf_lnfree.analysis.entropy_report import PAPER_RESULTS


def test_uniform_causal_rows_have_the_logarithm_of_their_position():
    length = 16
    uniform = torch.ones(length, length, dtype=torch.float64).tril()
    uniform /= uniform.sum(-1, keepdim=True)
    expected = torch.arange(1, length + 1, dtype=torch.float64).log()
    torch.testing.assert_close(attention_entropy(uniform), expected, rtol=0, atol=1e-12)
    assert attention_entropy(uniform).mean().item() == pytest.approx(causal_bound(length), abs=1e-12)


def test_one_hot_rows_have_none_and_nan_stays_nan():
    rows = torch.eye(4)
    assert attention_entropy(rows).tolist() == [0.0] * 4
    rows[1, 2] = math.nan
    assert attention_entropy(rows).isnan().tolist() == [False, True, False, False]


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=40))
@settings(max_examples=60, deadline=None)
def test_float32_and_bfloat16_agree_with_a_sum_in_python(scores):
    p = torch.tensor(scores, dtype=torch.float64).softmax(-1)
    expected = -math.fsum(x * math.log(x) for x in p.tolist() if x > 0)
    assert attention_entropy(p).item() == pytest.approx(expected, abs=1e-12)
    assert attention_entropy(p.float()).item() == pytest.approx(expected, abs=1e-5)
    assert attention_entropy(p.bfloat16()).dtype == torch.float32
    assert -1e-12 <= expected <= math.log(len(scores)) + 1e-12


def test_row_support_counts_visible_keys_on_either_side_of_padding():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert row_support(mask, causal=True).tolist() == [[0, 0, 1, 2, 3], [1, 2, 3, 0, 0]]
    assert row_support(mask, causal=False).tolist() == [[0, 0, 3, 3, 3], [3, 3, 3, 0, 0]]


def test_normalized_entropy_is_a_share_of_each_rows_own_maximum():
    support = torch.tensor([1, 2, 8])
    entropy = torch.tensor([0.0, math.log(2), math.log(4)], dtype=torch.float64)
    share = normalized_entropy(entropy, support)
    assert share[0].isnan()
    torch.testing.assert_close(share[1:], torch.tensor([1.0, 2 / 3], dtype=torch.float64))


def test_maxima():
    heads = torch.tensor([[1.0, math.nan], [2.5, 0.0]])
    assert entropy_maximum(heads, "observed", 128) == 2.5
    assert entropy_maximum(heads, "causal", 128) == pytest.approx(sum(map(math.log, range(1, 129))) / 128)
    assert entropy_maximum(heads, "log_length", 128) == pytest.approx(math.log(128))
    assert entropy_maximum(heads, 3.0, 128) == 3.0
    with pytest.raises(ValueError, match="'observed', 'causal', 'log_length'"):
        entropy_maximum(heads, "biggest", 128)


def test_buckets_are_closed_above_and_leave_nan_out():
    heads = torch.tensor([0.0, 1.0, 1.0001, 2.0, 3.0, 3.0001, 4.0, 4.5])
    assert (bucket_shares(heads, 4.0) * 8).tolist() == [2, 2, 1, 3]
    with_nan = torch.tensor([1.0, math.nan, 4.0, math.nan])
    assert bucket_shares(with_nan, 4.0).tolist() == [0.25, 0, 0, 0.25]
    assert overloaded_share(with_nan, 4.0) == 0.25


def on_the_edge(report, edge):
    """Heads that print on a bucket's edge may have been counted on either side of it before rounding."""
    return int(((report.entropy - edge).abs() <= 0.005).sum()) / report.entropy.numel()


@pytest.mark.parametrize("row", PAPER_RESULTS["heatmaps"])
def test_published_heatmaps_give_the_published_percentages(row):
    report = published_reports()[row]
    maximum = PAPER_RESULTS["bucket_maximum"]["value"]
    printed = [p / 100 for p in PAPER_RESULTS["printed_bucket_percent"][row]]
    for k, (share, expected) in enumerate(zip(report.buckets(maximum).tolist(), printed, strict=True)):
        slack = on_the_edge(report, maximum * k / 4) + on_the_edge(report, maximum * (k + 1) / 4) if k > 0 else 0
        assert abs(share - expected) <= 0.0051 + slack, (k, share, expected)
    assert report.source == "published"


def test_headline_shares_of_overloaded_heads():
    reports = published_reports()
    assert round(100 * reports["SM+G"].overloaded(3.87)) == 58
    assert round(100 * reports["SM+R"].overloaded(3.87)) == 22  # 23 printed; three heads lie on the edge
