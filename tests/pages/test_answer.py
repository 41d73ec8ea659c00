"""The picture and the sentence that answer the paper's question."""

import json
import math
from importlib.resources import files
from statistics import fmean

import pytest

from hf_lnfree.pages.answer import Outcome, answer_picture, beside, published
from hf_lnfree.studies.statistics import Estimate, relative_difference

ROWS = ["SM+LN+G", "SM+LN+R", "SM+G", "SM+R"]
PUBLISHED = json.loads((files("hf_lnfree.analysis") / "data" / "paper_results.json").read_text())


def test_published_panels_hold_the_printed_figures():
    outcome = published("GPT-2 T=128", ROWS)
    bound = fmean(math.log(i) for i in range(1, 129))
    for row in ROWS:
        assert outcome.scores[row] == [PUBLISHED["eval_perplexity"]["GPT-2 T=128"][row]]
        expected = [fmean(heads) / bound for heads in PUBLISHED["heatmaps"][row]]
        assert outcome.shares[""][row] == pytest.approx(expected, rel=1e-12)
    assert published("Pythia-70M T=128", ROWS).shares == {}


def test_points_are_differences_to_the_first_row_of_the_same_seed():
    shares = {"SM+G": [0.9, 0.4], "SM+R": [0.8, 0.3]}
    outcome = Outcome("here", {"SM+G": [10.0, 20.0, 8.0], "SM+R": [9.0, 22.0, math.inf]}, shares={"": shares})
    left, right = answer_picture([outcome]).axes
    points = [list(line.get_xdata()) for line in left.lines[:2]]
    assert points == [[0.0, 0.0, 0.0], pytest.approx([-10.0, 10.0])]
    assert [text.get_text() for text in left.texts] == ["12.67", "diverged"]
    assert [list(line.get_ydata()) for line in right.lines[:2]] == list(shares.values())
    assert right.lines[2].get_ydata() == [0.75, 0.75]


@pytest.mark.parametrize(
    ("gap", "words"),
    [
        (relative_difference([2.936], [3.197]), "8.2 % below"),
        (Estimate(0.05, 0.01, 3), "5.0 ± 1.0 % above"),
        (Estimate(math.nan, math.nan, 3), "not finite beside"),
    ],
)
def test_a_difference_in_words(gap, words):
    assert beside(gap) == words
