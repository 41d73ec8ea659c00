"""Intervals over seeds, against values from a table of Student's t."""

import math

import pytest

from hf_lnfree.studies.statistics import MEASURES, estimate, relative_difference


def test_interval_of_three_values():
    e = estimate([1.0, 2.0, 3.0])
    assert e.mean == 2.0
    assert e.half_width == pytest.approx(4.303 * 1.0 / math.sqrt(3), rel=1e-3)
    assert e.format(2) == "2.00 ± 2.48"


def test_one_value_has_no_interval_and_nan_stays_nan():
    assert estimate([2.5]).format(1) == "2.5"
    assert math.isnan(estimate([2.5]).half_width)
    assert math.isnan(estimate([1.0, math.nan]).mean)
    with pytest.raises(ValueError, match="no values"):
        estimate([])


def test_relative_difference_is_paired():
    e = relative_difference([1.1, 2.2], [1.0, 2.0])
    assert e.mean == pytest.approx(0.1)
    assert e.half_width == pytest.approx(0.0, abs=1e-12)
    assert e.format(1, percent=True, sign=True) == "+10.0 ± 0.0 %"


def test_accuracies_differ_in_points_and_perplexities_in_per_cent():
    accuracy, perplexity = MEASURES["accuracy"], MEASURES["perplexity"]
    gap = accuracy.gap([0.9, 0.8], [0.85, 0.75])
    assert (accuracy.format(estimate([0.9, 0.8])), accuracy.format_gap(gap)) == ("85.0 ± 63.5 %", "+5.0 ± 0.0 points")
    assert perplexity.format_gap(perplexity.gap([9.0], [10.0])) == "-10.0 %"
    assert (accuracy.best([0.2, 0.9]), perplexity.best([10.0, 9.0])) == (0.9, 9.0)
