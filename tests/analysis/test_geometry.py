"""Spectra, firing, selectivity and alignment from sums, against one-liners on whole matrices and brute force."""

import itertools
import math
from statistics import fmean

import pytest
import torch

from hf_lnfree.analysis.alignment import alignment, hsic
from hf_lnfree.analysis.moments import CrossMoments, Moments, jackknife
from hf_lnfree.analysis.selectivity import ClassSums, between_share, class_selectivity, within_selectivity
from hf_lnfree.analysis.specialisation import firing
from hf_lnfree.analysis.spectra import (
    covariance,
    early_enrichment,
    jensen_shannon,
    participation_ratio,
    row_participation_ratio,
    spectral_entropy,
    spectrum,
)
from hf_lnfree.errors import DataError


def features(rows, width, seed=0, mean=0.5):
    source = torch.Generator().manual_seed(seed)
    scales = 1 / torch.arange(1, width + 1, dtype=torch.float64)
    return mean + torch.randn(rows, width, generator=source, dtype=torch.float64) * scales


def moments(*batches, groups=None):
    sums = Moments.empty(batches[0].shape[1], 1 if groups is None else max(groups) + 1)
    for index, batch in enumerate(batches):
        sums.add(batch, 0 if groups is None else groups[index])
    return sums


def cross(x, y):
    sums = CrossMoments.empty(x.shape[1], y.shape[1])
    sums.add(x, y)
    return sums


@pytest.mark.parametrize("batches", [1, 7, 100])
def test_batches_do_not_matter(batches):
    x = features(1000, 20)
    sums = moments(*x.tensor_split(batches))
    torch.testing.assert_close(covariance(sums), torch.cov(x.T), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(row_participation_ratio(sums), row_participation_ratio(moments(x)), rtol=1e-10, atol=0)
    two = moments(*x.tensor_split(2)[:1]) + moments(x.tensor_split(2)[1])  # as two processes would
    torch.testing.assert_close(spectrum(two), spectrum(moments(x)), rtol=1e-10, atol=1e-13)


def test_spectra_are_those_of_the_covariance():
    x, y = features(300, 12), features(300, 12, seed=1) ** 2
    sums = moments(x)
    values = torch.linalg.eigvalsh(torch.cov(x.T)).flip(0)
    p = values / values.sum()
    torch.testing.assert_close(spectrum(sums), values, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(spectral_entropy(values), -(p * p.log()).sum())
    torch.testing.assert_close(participation_ratio(values), values.sum() ** 2 / (values**2).sum())
    eee = sum(float(p[:k].sum()) - k / 12 for k in range(1, 13)) / 6
    assert float(early_enrichment(values)) == pytest.approx(eee)
    q = spectrum(moments(y)) / spectrum(moments(y)).sum()
    m = (p + q) / 2
    expected = 0.5 * (p * (p / m).log()).sum() + 0.5 * (q * (q / m).log()).sum()
    torch.testing.assert_close(jensen_shannon(values, spectrum(moments(y))), expected)
    one = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert float(jensen_shannon(one, torch.tensor([0.0, 1.0]).double())) == pytest.approx(math.log(2))
    assert float(jensen_shannon(one[:1], one)) == 0  # filled up with zeros
    equal = torch.full((8,), 0.125, dtype=torch.float64)
    assert float(participation_ratio(equal)) == pytest.approx(8)
    assert float(spectral_entropy(equal)) == pytest.approx(math.log(8))
    assert float(early_enrichment(equal)) == pytest.approx(0)


def test_the_row_corrected_ratio_is_one_of_means_over_different_rows():
    x = features(9, 5)
    n, d = x.shape
    k = (x @ x.T / d).double()
    # <k_ii k_jj> - 2 <k_ii k_jl> + <k_ij k_lm> over different rows; <k_ij k_ij> - 2 <k_ij k_jl> + <k_ij k_lm> below.
    pairs, triples, quads = (list(itertools.permutations(range(n), size)) for size in (2, 3, 4))
    last = fmean([float(k[i, j] * k[u, m]) for i, j, u, m in quads])
    above = fmean([float(k[i, i] * k[j, j]) for i, j in pairs])
    above += -2 * fmean([float(k[i, i] * k[j, u]) for i, j, u in triples]) + last
    below = fmean([float(k[i, j] ** 2) for i, j in pairs])
    below += -2 * fmean([float(k[i, j] * k[j, u]) for i, j, u in triples]) + last
    assert float(row_participation_ratio(moments(x))) == pytest.approx(above / below, rel=1e-9)
    assert row_participation_ratio(moments(x[:3])).isnan()


def test_few_rows_bias_the_plain_ratio_and_not_the_corrected_one():
    width = 100
    scales = 1 / torch.arange(1, width + 1, dtype=torch.float64)  # variances
    true = float(participation_ratio(scales))
    source = torch.Generator().manual_seed(0)
    plain, corrected = [], []
    for _ in range(60):
        sums = moments(torch.randn(64, width, generator=source, dtype=torch.float64) * scales.sqrt())
        plain.append(float(participation_ratio(spectrum(sums))))
        corrected.append(float(row_participation_ratio(sums)))
    assert sum(plain) / 60 < 0.85 * true
    assert sum(corrected) / 60 == pytest.approx(true, rel=0.06)


def test_the_jackknife_over_groups_covers_the_truth():
    covered, runs = 0, 60
    true = float(participation_ratio(1 / torch.arange(1, 9, dtype=torch.float64) ** 2))
    for seed in range(runs):
        batches = features(800, 8, seed=seed).tensor_split(10)
        value, error = jackknife(row_participation_ratio, moments(*batches, groups=list(range(10))))
        covered += abs(float(value) - true) < 2.26 * float(error)
    assert 0.85 * runs <= covered <= runs
    value, error = jackknife(row_participation_ratio, moments(features(50, 8)))
    assert value.isfinite()
    assert error.isnan()


def test_firing_is_told_by_the_signs():
    rows, width = 400, 6
    x = features(rows, width, mean=0.0)
    x[:, 1] = x[:, 0]  # fires with the first
    x[:, 2] = -x[:, 0]  # fires with neither
    x[:, 3], x[:, 4] = -1.0, 1.0  # dead, always on
    fires = x > 0
    found = firing(fires.double().T @ fires.double(), rows)
    torch.testing.assert_close(found.frequency, fires.double().mean(0))
    assert (float(found.dead), float(found.always_on)) == (1 / 6, 1 / 6)
    overlaps, chances = [], []
    for a, b in itertools.combinations([0, 1, 2, 4, 5], 2):
        overlaps.append(float((fires[:, a] & fires[:, b]).sum() / (fires[:, a] | fires[:, b]).sum()))
        f, g = float(fires[:, a].double().mean()), float(fires[:, b].double().mean())
        chances.append(f * g / (f + g - f * g))
    assert float(found.overlap) == pytest.approx(sum(overlaps) / 10)
    assert float(found.independent_overlap) == pytest.approx(sum(chances) / 10)
    signs = torch.where(fires, 1.0, -1.0).double()
    mu = torch.linalg.eigvalsh(signs @ signs.T / (rows * width)).clamp_min(1e-300)
    assert float(found.patterns) == pytest.approx(math.exp(-float((mu * mu.log()).sum())), rel=1e-8)


def test_units_that_fire_independently_are_not_specialised():
    fires = (torch.rand(20000, 30, generator=torch.Generator().manual_seed(0)) < 0.3).double()
    assert float(firing(fires.T @ fires, 20000).specialisation) == pytest.approx(0, abs=0.01)
    apart = torch.eye(10).repeat(100, 1).double()
    assert float(firing(apart.T @ apart, 1000).specialisation) == 1


def test_selectivity_is_that_of_the_classes():
    r, labels = features(200, 7).relu(), torch.arange(200) % 5
    labels[-10:] = -1
    sums = ClassSums.empty(6, 7)  # the last class is never seen
    for part, its in zip(r.split(33), labels.split(33), strict=True):
        sums.add(part, its)
    kept, classes = r[:-10], [r[:-10][labels[:-10] == c] for c in range(5)]
    means = torch.stack([rows.mean(0) for rows in classes])
    weights = torch.tensor([len(rows) for rows in classes]).double()[:, None] / 190
    between = (weights * (means - kept.mean(0)).square()).sum(0) / kept.var(0, correction=0)
    torch.testing.assert_close(between_share(sums), between)
    top, index = means.max(0)
    rest = torch.stack([means[[c for c in range(5) if c != i], d].mean() for d, i in enumerate(index)])
    torch.testing.assert_close(class_selectivity(sums), (top - rest) / (top + rest))
    sparse = [(1 - x.mean(0) ** 2 / (x**2).mean(0)) / (1 - 1 / len(x)) for x in classes]
    torch.testing.assert_close(within_selectivity(sums), (weights * torch.stack(sparse)).sum(0))
    silent = ClassSums.empty(2, 1)
    silent.add(torch.zeros(6, 1), torch.arange(6) % 2)
    assert within_selectivity(silent).isnan()
    assert class_selectivity(silent).isnan()
    assert float(between_share(silent)) == 0


def test_alignment_is_that_of_kernels_without_their_diagonals():
    x, y = features(40, 6), features(40, 9, seed=1)
    y[:, :3] += x[:, :3]
    k, m = (z @ z.T for z in (x, y))
    k, m = k.fill_diagonal_(0), m.fill_diagonal_(0)
    n = 40

    def reference(a, b):
        ones = torch.ones(n, dtype=torch.float64)
        terms = (a @ b).trace() + (ones @ a @ ones) * (ones @ b @ ones) / ((n - 1) * (n - 2))
        return (terms - 2 / (n - 2) * (ones @ a @ b @ ones)) / (n * (n - 3))

    torch.testing.assert_close(hsic(moments(x), moments(y), cross(x, y)), reference(k, m), rtol=1e-9, atol=0)
    expected = reference(k, m) / (reference(k, k) * reference(m, m)).sqrt()
    torch.testing.assert_close(alignment(moments(x), moments(y), cross(x, y)), expected, rtol=1e-9, atol=0)
    rotated = x @ torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q * 3
    assert float(alignment(moments(x), moments(rotated), cross(x, rotated))) == pytest.approx(1, rel=1e-9)


def test_what_is_not_finite_or_does_not_fit_is_told():
    sums = moments(features(10, 3))
    with pytest.raises(DataError, match="width 4 cannot be added to sums of width 3"):
        sums.add(features(10, 4))
    with pytest.raises(DataError, match="needs two rows, got 1"):
        spectrum(moments(features(1, 3)))
    spoilt = features(10, 3)
    spoilt[2, 1] = math.nan
    assert spectrum(moments(spoilt)).isnan().all()
    assert row_participation_ratio(moments(spoilt)).isnan()
