"""Laws, gaps and what is held out, on runs whose law is known."""

import json
import math
import re

import numpy
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from hf_lnfree.cli.main import main
from hf_lnfree.errors import SettingsError
from hf_lnfree.studies.planes import Plane, SharePlane
from hf_lnfree.studies.scaling import (
    Gap,
    Point,
    fit_law,
    hold_out,
    laws,
    overload,
    read_points,
    scaling_summary,
)
from hf_lnfree.studies.statistics import student_975
from hf_lnfree.training.run import outside_embeddings

LADDER = [(1e5, 2e6), (3e5, 6e6), (1e6, 5e6), (1e6, 2e7), (1e6, 8e7), (3e6, 6e7)]


def law(n, d, e=1.2):
    return e + 40 * n**-0.34 + 60 * d**-0.28


def overloaded(n):
    return 0.9 - 0.05 * math.log10(n)


def runs(row="SM+G", noise=0.0, e=1.2, seeds=3, ladder=LADDER):
    g = torch.Generator().manual_seed(0)
    return [
        Point(
            row,
            seed,
            n,
            d,
            law(n, d, e) * math.exp(noise * torch.randn((), generator=g).item()),
            0.9 - 0.05 * math.log10(n),
        )
        for n, d in ladder
        for seed in range(seeds)
    ]


def test_a_law_is_found_again():
    found = fit_law(runs())
    assert (found.E, found.A, found.alpha, found.B, found.beta) == pytest.approx((1.2, 40, 0.34, 60, 0.28), rel=1e-3)
    assert found.loss(124e6, 2.1e9) == pytest.approx(law(124e6, 2.1e9), rel=1e-5)


def test_no_other_law_is_nearer():
    points = runs(noise=5e-3)
    found = fit_law(points)

    def distance(e, a, b, alpha, beta):
        return sum(((e + a * p.parameters**-alpha + b * p.tokens**-beta) / p.loss - 1) ** 2 for p in points)

    best = distance(found.E, found.A, found.B, found.alpha, found.beta)
    assert best <= distance(1.2, 40, 60, 0.34, 0.28)
    for name in ("E", "A", "B", "alpha", "beta"):
        for factor in (0.999, 1.001):
            values = {**vars(found), name: getattr(found, name) * factor}
            assert distance(**{k.lower() if k in "EAB" else k: v for k, v in values.items()}) >= best


def test_the_largest_size_is_foretold_by_the_others():
    (held,) = hold_out(runs())
    assert (held.parameters, held.tokens) == (3e6, 6e7)
    assert held.foretold == pytest.approx(held.seen, rel=1e-5)
    assert held.seen == pytest.approx(law(3e6, 6e7))
    bent = [p._replace(loss=p.loss + 0.3 * (p.parameters == 3e6)) for p in runs()]
    assert hold_out(bent)[0].foretold == pytest.approx(law(3e6, 6e7), rel=1e-5)


def test_replicates_draw_seeds_at_each_size():
    noisy = runs(noise=1e-2)
    _, drawn = laws(noisy, replicates=20)["SM+G"]
    spread = [torch.tensor([each.loss(*at) for each in drawn]).std().item() for at in ((1e6, 2e7), (1e9, 1e11))]
    assert 0 < spread[0] < spread[1]
    assert all(vars(each) == vars(fit_law(runs())) for each in laws(runs(), replicates=2)["SM+G"][1])


def test_planes_and_their_intervals_are_those_of_least_squares():
    g = numpy.random.default_rng(0)
    n, d = numpy.array(LADDER * 3).T
    y = 0.1 - 0.02 * numpy.log(n) + 0.01 * numpy.log(d) + 0.01 * g.normal(size=len(n))
    x = numpy.stack((numpy.ones_like(n), numpy.log(n), numpy.log(d)), 1)
    expected, residuals, *_ = numpy.linalg.lstsq(x, y, rcond=None)
    plane = Plane.fit(n, d, y)
    assert plane.coefficients.tolist() == pytest.approx(expected.tolist())
    at = numpy.array([1, math.log(124e6), math.log(2.1e9)])
    width = 2.131 * math.sqrt(residuals[0] / 15 * (1 + at @ numpy.linalg.inv(x.T @ x) @ at))
    assert plane.predict(124e6, 2.1e9) == pytest.approx((at @ expected, width))
    assert plane.predict(1e6, 2e7)[1] < plane.predict(1e8, 2e9)[1] < plane.predict(1e10, 2e11)[1]


def test_prediction_intervals_cover_what_comes():
    g = numpy.random.default_rng(1)
    n, d = numpy.array(LADDER).T
    hit = 0
    for _ in range(400):
        y = 0.1 - 0.02 * numpy.log(n) + 0.01 * g.normal(size=len(n))
        mean, half = Plane.fit(n, d, y).predict(1e8, 2e9)
        hit += abs(0.1 - 0.02 * math.log(1e8) + 0.01 * g.normal() - mean) <= half
    assert 0.92 <= hit / 400 <= 0.98


def test_tokens_in_proportion_to_size_are_one_line():
    ladder = [(n, 20 * n) for n in (1e5, 3e5, 1e6)]
    points = runs(ladder=ladder, noise=1e-3)
    assert Plane.fit([p.parameters for p in points], [p.tokens for p in points], [p.loss for p in points]).freedom == 7
    with pytest.raises(SettingsError, match="3 different pairs of size and tokens"):
        fit_law(points)
    found = scaling_summary(points, [], (1e8, 2e9), replicates=2)
    assert found["laws"] == {}
    assert found["held_out"] == []


def test_gaps_are_paired_by_seed_size_and_tokens():
    one, other = runs("SM+R", e=1.1, noise=1e-2), runs("SM+G", noise=1e-2)
    gap = Gap.of([*one, *other[3:]], "SM+R", "SM+G")
    assert len(gap.points) == len(one) - 3
    assert gap.points[0][2] == pytest.approx(one[3].loss - other[3].loss)
    assert gap.plane.predict(124e6, 2.1e9)[0] == pytest.approx(-0.1, abs=0.05)
    assert Gap.of(one, "SM+R", "unknown").plane is None


def test_rows_of_one_size_are_paired_though_norms_have_weights():
    normed = [p._replace(row="SM+LN+G", parameters=p.parameters + 3000, size=str(p.parameters)) for p in runs()]
    bare = [p._replace(row="SM+R", size=str(p.parameters), loss=p.loss - 0.2) for p in runs()]
    gap = Gap.of([*normed, *bare], "SM+R", "SM+LN+G")
    assert [y for _, _, y in gap.points] == pytest.approx([-0.2] * len(bare))
    assert [n for n, _, _ in gap.points] == [p.parameters for p in bare]


def test_the_largest_gap_is_foretold_by_the_others():
    def gap(n, d):
        return -0.02 * math.log(n) + 0.01 * math.log(d)

    noise = {(n, d): torch.randn(3, generator=torch.Generator().manual_seed(int(n))) for n, d in LADDER}
    points = [(n, d, gap(n, d) + 0.003 * float(e)) for (n, d), drawn in noise.items() for e in drawn]
    found = Gap(("SM+R", "SM+G"), points, None).hold_out()
    ((n, d, seen, foretold, half_width),) = found
    assert (n, d) == (3e6, 6e7)
    assert seen == pytest.approx(sum(y for m, _, y in points if m == 3e6) / 3)
    smaller = [point for point in points if point[0] < 3e6]
    plane = Plane.fit(*zip(*smaller, strict=True))
    mean, of_one_run = plane.predict(3e6, 6e7)
    assert foretold == mean
    once = student_975(plane.freedom) * plane.spread  # a mean of three scatters less than a run, the plane as much
    assert half_width**2 == pytest.approx(of_one_run**2 - once**2 * (1 - 1 / 3))
    assert Gap(("SM+R", "SM+G"), [point for point in points if point[0] == 3e6], None).hold_out() == []
    assert Gap(("SM+R", "SM+G"), [], None).hold_out() == []


def test_shares_follow_a_logistic_function():
    """As scikit-learn's logistic regression has it, which takes a share as two weighted outcomes."""
    g = numpy.random.default_rng(2)
    n, d = numpy.array(LADDER * 3).T
    y = 1 / (1 + numpy.exp(-(8 - 0.3 * numpy.log(n) - 0.25 * numpy.log(d) + 0.3 * g.normal(size=len(n)))))
    y[y > 0.6] = 1
    x = numpy.stack((numpy.log(n), numpy.log(d)), 1)
    twice, outcomes = numpy.concatenate((x, x)), numpy.repeat((1, 0), len(y))
    peer = LogisticRegression(C=numpy.inf, tol=1e-10, max_iter=10_000, solver="newton-cholesky")
    peer.fit(twice, outcomes, sample_weight=numpy.concatenate((y, 1 - y)))
    plane = SharePlane.fit(n, d, y)
    assert plane.coefficients.tolist() == pytest.approx([*peer.intercept_, *peer.coef_[0]], rel=1e-5)
    near, far = plane.predict(1e6, 2e7), plane.predict(1e8, 2e9)
    for share, low, high in (near, far):
        assert 0 < low < share < high < 1
    assert near[0] == pytest.approx(peer.predict_proba(numpy.log([[1e6, 2e7]]))[0, 1], rel=1e-5)

    def width(ends):
        return logit(ends[2]) - logit(ends[1])

    assert width(near) < width(far)
    means = peer.predict_proba(x)[:, 1]
    design, variance = numpy.c_[numpy.ones(len(x)), x], means * (1 - means)
    covariance = numpy.linalg.inv(design.T @ (variance[:, None] * design)) * ((y - means) ** 2 / variance).sum() / 15
    at = numpy.array([1, *numpy.log((1e8, 2e9))])
    assert width(far) == pytest.approx(2 * 2.1314 * math.sqrt(at @ covariance @ at), rel=1e-3)


def logit(share):
    return math.log(share / (1 - share))


def test_shares_that_a_line_tells_apart_have_no_slope():
    n, d = zip(*LADDER * 2, strict=True)
    assert SharePlane.fit(n, d, [float(size < 5e5) for size in n]) is None
    assert SharePlane.fit(n, d, [1.0] * len(n)) is None
    few = [0.4 if (size, tokens) in LADDER[-2:] else 1.0 for size, tokens in zip(n, d, strict=True)]
    assert SharePlane.fit(n, d, few) is None
    assert SharePlane.fit([1e6], [1e7], [0.5]) is None


def test_overload_is_followed_over_size():
    plane = overload([p._replace(overloaded=1 / (1 + (p.parameters / 1e6) ** 0.5)) for p in runs()])["SM+G"]
    assert plane.predict(1e8, 2e9) == pytest.approx([1 / 11] * 3, abs=1e-6)


def test_summaries_of_studies_are_read(tmp_path):
    cell = {"row": "SM+G size=tiny", "seed": 1, "parameters_outside_embeddings": 1000, "tokens": 5, "eval_loss": 2.0}
    cells = [{**cell, "diverged_at": None, "overloaded_heads": 0.5}, {**cell, "diverged_at": 7}]
    (tmp_path / "summary.json").write_text(json.dumps({"cells": cells}))
    assert (
        read_points([tmp_path])
        == [Point("SM+G", 1, 1000, 5, 2.0, 0.5, "size=tiny")]
        == read_points([tmp_path / "summary.json"])
    )
    with pytest.raises(SettingsError, match="is no study"):
        read_points([tmp_path / "nowhere"])
    (tmp_path / "summary.json").write_text(json.dumps({"cells": [{"row": "SM+G"}]}))
    with pytest.raises(SettingsError, match="how large its models are"):
        read_points([tmp_path])
    (tmp_path / "summary.json").write_text(json.dumps({"cells": []}))
    with pytest.raises(SettingsError, match="no run is finished"):
        read_points([tmp_path])


def study(folder, *rows):
    cells = [
        {
            "row": f"{p.row} size={p.parameters:.0f}-{p.tokens:.0f}", "seed": p.seed, "tokens": p.tokens,
            "parameters_outside_embeddings": p.parameters, "eval_loss": p.loss, "overloaded_heads": p.overloaded,
            "diverged_at": None,
        }
        for row in rows
        for p in row
    ]  # fmt: skip
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({"cells": cells}))
    return str(folder)


def test_the_command_foretells_and_writes_a_page(tmp_path, capsys):
    folder = study(tmp_path / "ladder", runs("SM+R", e=1.1, noise=1e-3), runs("SM+G", noise=1e-3))
    command = ["scaling", folder, "--pair", "SM+R,SM+G", "--parameters", "124e6", "--replicates", "20"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "SM+R to SM+G" in printed
    assert "1.24e+08 parameters and 2.1e+09 tokens" in printed
    assert re.findall(r">(\d+M)</text>", picture := (tmp_path / "out" / "scaling.svg").read_text())
    assert "mathdefault" not in picture
    found = json.loads((tmp_path / "out" / "scaling.json").read_text())
    (gap,) = found["gaps"]
    low, high = (gap["foretold"]["log_ratio"] + sign * gap["foretold"]["half_width"] for sign in (-1, 1))
    assert low < -0.1 < high
    assert len(found["runs"]) == 36
    ends = found["laws"]["SM+G"]["interval_95"]
    assert ends[0] < law(124e6, 2.1e9) < ends[1]
    assert found["held_out"][0]["foretold"] == pytest.approx(found["held_out"][0]["seen"], rel=0.01)
    assert "Perplexity of SM+R to SM+G, foretold: -" in (tmp_path / "out" / "report.html").read_text()
    assert main([*command[:2], "--pair", "SM+R,SM+X"]) != 0
    assert "--pair takes two of the rows SM+R, SM+G" in capsys.readouterr().err


def test_parameters_are_those_outside_embeddings(family):
    model = family.model(tie_word_embeddings=False) if family.name == "gpt_neox" else family.model()
    blocks = sum(p.numel() for block in family.block_list(model) for p in block.parameters())
    assert 0 <= outside_embeddings(model) - blocks <= 3 * 32  # the last norm
    assert outside_embeddings(model) < model.num_parameters() - 99 * 32 + 1
