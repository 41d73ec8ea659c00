r"""How many directions features use: spectra of their covariance, and what is read from them.

$C = \frac{1}{N-1} \sum (x - \bar x)(x - \bar x)^\top$ has eigenvalues $\lambda_1 \ge ... \ge \lambda_D$ and
$p_i = \lambda_i / \sum \lambda$. Definitions as in NerVE (spectral entropy, participation ratio, early enrichment,
Jensen-Shannon divergence). Shapes: N rows, D features.
"""

import math

import torch
from torch import Tensor

from ..errors import DataError
from .moments import Moments

SMALLEST = 1e-12  # below, an eigenvalue is rounding


def covariance(sums: Moments) -> Tensor:
    """
    [D, D], from sums of one group.

    Raises:
        DataError: fewer than two rows.
    """
    count, total = sums.count[0], sums.total[0]
    if count < 2:
        raise DataError(f"A covariance needs two rows, got {int(count)}.")
    return (sums.gram[0] - total.outer(total) / count) / (count - 1)


def spectrum(sums: Moments) -> Tensor:
    """[D] eigenvalues of the covariance, largest first, none below 1e-12; NaN where a feature is not finite."""
    matrix = covariance(sums)
    if not matrix.isfinite().all():
        return torch.full((len(matrix),), math.nan, dtype=matrix.dtype)
    return torch.linalg.eigvalsh(matrix).flip(0).clamp_min(SMALLEST)


def spectral_entropy(eigenvalues: Tensor) -> Tensor:
    r"""$-\sum p_i \ln p_i$, nats, 0 to $\ln D$."""
    p = eigenvalues / eigenvalues.sum(-1, keepdim=True)
    return torch.special.entr(p).sum(-1)


def participation_ratio(eigenvalues: Tensor) -> Tensor:
    r"""$(\sum \lambda)^2 / \sum \lambda^2$, 1 to D. Of few rows it is too small: see `row_participation_ratio`."""
    return eigenvalues.sum(-1).square() / eigenvalues.square().sum(-1)


def early_enrichment(eigenvalues: Tensor) -> Tensor:
    r"""
    How far the cumulative spectrum lies above that of equal eigenvalues,
    $\frac{2}{D} \sum_k \left( \sum_{i \le k} p_i - \frac{k}{D} \right)$, held to 0 to 1 (EEE; arXiv 2212.08172).
    """
    width = eigenvalues.shape[-1]
    shares = eigenvalues.cumsum(-1) / eigenvalues.sum(-1, keepdim=True)
    equal = torch.arange(1, width + 1, dtype=eigenvalues.dtype, device=eigenvalues.device) / width
    return ((shares - equal).sum(-1) / (width / 2)).clamp(0, 1)


def jensen_shannon(one: Tensor, other: Tensor) -> Tensor:
    r"""
    $\frac12 KL(p \| m) + \frac12 KL(q \| m)$, $m = \frac12 (p + q)$, of two sorted spectra rank by rank, 0 to
    $\ln 2$ nats; the shorter spectrum is filled up with zeros.
    """
    width = max(one.shape[-1], other.shape[-1])
    p, q = (
        torch.nn.functional.pad(values / values.sum(-1, keepdim=True), (0, width - values.shape[-1]))
        for values in (one, other)
    )
    middle = (p + q) / 2
    return (torch.special.entr(middle) - (torch.special.entr(p) + torch.special.entr(q)) / 2).sum(-1)


def row_participation_ratio(sums: Moments) -> Tensor:
    r"""
    The participation ratio without the bias of few rows: a ratio of two unbiased sums over quadruples of different rows
    (the row estimator of arXiv 2509.26560, for rows that do not depend on each other).

    Args:
        sums: of one group.

    Returns:
        The ratio; NaN for fewer than four rows.
    """
    n, s, gram = float(sums.count[0]), sums.total[0], sums.gram[0]
    if n < 4:
        return torch.full((), math.nan, dtype=torch.float64)
    z = (n * len(s)) ** 2
    trace, norm = gram.trace(), s.square().sum()
    t1, t2, t3 = gram.square().sum() / z, sums.fourth[0] / z, (s @ sums.cubic[0]) / z
    t5, t6, t7, t9 = (s @ gram @ s) / z, trace.square() / z, trace * norm / z, norm.square() / z
    pairs = (n - 1) * (n - 2)
    above = t6 - 2 * t7 / (n - 1) + (4 * t3 - n * t2) / (n - 2) + (t9 - 4 * t5 + 2 * t1 - t6) / pairs
    below = t1 - n * t2 / (n - 2) + 2 * (2 * t3 - t5) / (n - 2) + (t6 - 2 * t7 + t9) / pairs
    return above / below
