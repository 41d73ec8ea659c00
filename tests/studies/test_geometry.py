"""Geometry beside entropy in a study, on curves whose outcome is known."""

import math
from types import SimpleNamespace

import numpy
import pytest
import torch

from hf_lnfree.pages.study_geometry import geometry_section
from hf_lnfree.studies.cells import Cell
from hf_lnfree.studies.geometry import (
    Probes,
    correlation,
    differences,
    geometry_summary,
    leaving_overload,
    onset,
    onsets,
    over_training,
    probes_of,
)
from hf_lnfree.studies.statistics import estimate

BOUND = 4.0
STEPS = list(range(0, 1050, 50))
KIND = "between_share/next_token"


def cell(row, seed, entropy, metric, norm="none", diverged=False):
    """Entropy (share of the bound) and two metrics of two layers, each a function of step and layer."""
    log = [{"step": 10, "loss": 1.0}]
    for step in STEPS:
        values = {"step": step}
        for layer in range(2):
            values[f"entropy/layer_{layer:02d}"] = BOUND * entropy(step, layer)
            values[f"specialisation/layer_{layer:02d}"] = metric(step, layer)
            values[f"{KIND}/layer_{layer:02d}"] = metric(step, layer) / 2
        log.append(values)
    results = SimpleNamespace(model={"norm": norm}, diverged=diverged)
    return Cell(row, seed, None, results=results, entropy=SimpleNamespace(part_bounds={"": BOUND}), log=log)


def after(step, when):
    return float(step >= when)


def row(name, height=0.0, lag=200, **options):
    """Entropy falls to 0.5 - height at step 300, the metric rises to 0.1 + height `lag` steps later."""
    return [
        cell(
            name,
            seed,
            lambda s, i, seed=seed: 0.9 - (0.4 + height) * after(s, 300) - 0.01 * seed * i,
            lambda s, i, seed=seed: (0.1 + height + 0.02 * seed) * after(s, 300 + lag),
            **options,
        )
        for seed in range(3)
    ]


@pytest.fixture
def rows():
    return {"R": row("R", 0.3), "G": row("G", 0.0), "LN": row("LN", 0.1, norm="layernorm")}


def test_where_curves_arrive_and_how_rows_differ(rows):
    probed = probes_of(rows)
    assert probed["R"][2].values["entropy"][0].tolist() == pytest.approx([0.9, 0.88])
    assert probed["R"][2].end["entropy"].tolist() == pytest.approx([0.2, 0.18])
    found = differences(probed["R"], probed["G"], "specialisation")
    assert [f.mean for f in found] == pytest.approx([0.3, 0.3])
    assert differences(probed["R"], probed["G"], KIND)[0].mean == pytest.approx(0.15)


def test_the_onset_is_the_step_from_which_a_difference_stays():
    steps = torch.arange(0, 100, 10)
    rises = torch.tensor([0, 1, 0, 0, 0.4, 0.6, 0.9, 1, 1, 1])
    falls = -torch.tensor([0, 0, 0, 0.6, 0.4, 0.6, 0.9, 1, 1, 1])
    never = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 0.1])
    assert onset(torch.stack((rises, falls), 1), steps).tolist() == [50, 50]
    assert math.isnan(onset(never[:, None], steps).item())


def test_the_onsets_of_each_layer_are_told_where_rows_differ(rows):
    probed = probes_of(rows)
    assert [found.mean for found in onsets(probed["R"], probed["G"], "entropy")] == pytest.approx([300, 300])
    assert [found.mean for found in onsets(probed["R"], probed["G"], "specialisation")] == pytest.approx([500, 500])
    assert onsets(probed["R"], probed["R"], "specialisation") == [None, None]


def test_heads_leave_overload_once_and_for_all():
    shares = torch.tensor([[0.9, 0.9], [0.7, 0.8], [0.8, 0.9], [0.75, 0.8], [0.5, 0.76]])
    row = {seed: Probes(torch.arange(0, 250, 50), {"entropy": shares}) for seed in range(2)}
    assert leaving_overload(row) == [[150, 150], [None, None]]


def test_correlations_are_those_of_numpy(rows):
    probed = probes_of(rows)
    bare = [probed["R"], probed["G"]]
    each, within = [], []
    for seed in range(3):
        x, y = (numpy.stack([r[seed].end[key].numpy() for r in bare]) for key in ("entropy", "specialisation"))
        each.append(numpy.corrcoef(x.ravel(), y.ravel())[0, 1])
        x, y = x - x.mean(0), y - y.mean(0)
        within.append(numpy.corrcoef(x.ravel(), y.ravel())[0, 1])
    found = correlation(bare, "specialisation")
    assert (found.mean, found.half_width) == pytest.approx((estimate(each).mean, estimate(each).half_width))
    found = correlation(bare, "specialisation", within_layers=True)
    assert found.mean == pytest.approx(estimate(within).mean)
    assert found.mean == pytest.approx(-1)


def test_the_summary_and_the_page_say_it(rows):
    found = geometry_summary(rows, [["R", "G"], ["R", "unknown"]])
    (pair,) = found["pairs"]
    assert pair["rows"] == ["R", "G"]
    assert pair["difference"]["entropy"][0]["mean"] == pytest.approx(-0.3)
    assert pair["onset"][KIND][0]["mean"] == pytest.approx(500)
    assert found["leaves_overload"]["R"] == [[300] * 3, [300] * 3]
    assert set(found["correlation"]) == {"specialisation", KIND}
    kept = over_training(rows["R"][0])["geometry"]
    assert kept["steps"] == STEPS
    assert len(kept["specialisation"]) == len(STEPS)
    section = geometry_section(rows, [["R", "G"]])
    picture, _, differ, leaving, together = section.blocks
    assert picture.figure.axes[0].get_ylabel() == "specialisation"
    assert differ.rows[1][1:] == ["+0.300 ± 0.000 (500)"] * 2
    assert leaving.rows[0] == ["R", "300, 300, 300", "300, 300, 300"]
    assert together.rows[0][2].startswith("-1.00")


def test_cells_that_diverged_or_were_not_sampled_are_left_out(rows):
    rows["R"][1].results.diverged = True
    assert list(probes_of(rows)["R"]) == [0, 2]
    bare = Cell(
        "R", 0, None, results=rows["R"][0].results, entropy=rows["R"][0].entropy, log=[{"step": 1, "loss": 1.0}]
    )
    assert Probes.of(bare) is None
    assert geometry_summary({"R": [bare]}, []) == {}
    assert over_training(bare) == {}
    assert geometry_section({"R": [bare]}, []).blocks == []
