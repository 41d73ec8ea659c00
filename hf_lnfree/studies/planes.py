"""Values over the logarithms of parameters and tokens: a plane, or, for shares, the logistic function of one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .statistics import student_975

STEPS, CLOSE = 50, 1e-9  # of Newton's method


@dataclass(frozen=True)
class Plane:
    r"""
    Least squares $y = c_0 + c_1 \ln N + c_2 \ln D$, with what is needed for intervals.

    Args:
        coefficients: $c_0, c_1, c_2$; $c_2$ is 0 where tokens follow from size.
        spread: residual standard deviation.
        inverse: $(X^\top X)^{-1}$.
        freedom: degrees of freedom.
    """

    coefficients: Tensor
    spread: float
    inverse: Tensor
    freedom: int

    @classmethod
    def fit(cls, n: Sequence[float], d: Sequence[float], y: Sequence[float]) -> "Plane | None":
        """None with too few values to say how far they scatter."""
        x, values, freedom = samples(n, d, y)
        if not freedom:
            return None
        coefficients = torch.linalg.pinv(x) @ values
        residual = values - x @ coefficients
        spread = float((residual.square().sum() / freedom).sqrt())
        return cls(coefficients, spread, torch.linalg.pinv(x.mT @ x), freedom)

    def predict(self, parameters: float, tokens: float, runs: int = 1) -> tuple[float, float]:
        """The value there and the half width of the 95 % prediction interval of a mean of `runs`; it grows with the
        distance."""
        x = design([parameters], [tokens])[0]
        width = self.spread * math.sqrt(1 / runs + float(x @ self.inverse @ x))
        return float(x @ self.coefficients), student_975(self.freedom) * width


def design(n: Sequence[float], d: Sequence[float]) -> Tensor:
    """[points, 3] 1, ln N, ln D."""
    parameters, tokens = (torch.tensor(column, dtype=torch.float64) for column in (n, d))
    return torch.stack((torch.ones_like(parameters), parameters.log(), tokens.log()), 1)


def plane_of(points: Sequence[tuple[float, float, float]]) -> Plane | None:
    """Through (parameters, tokens, value)."""
    return Plane.fit(*zip(*points, strict=True)) if points else None


def samples(n: Sequence[float], d: Sequence[float], y: Sequence[float]) -> tuple[Tensor, Tensor, int]:
    """[points, 3] as of `design`, [points] values, and degrees of freedom: 0 where all are at one place, or are too
    few to say how far they scatter."""
    x, values = design(n, d), torch.tensor(y, dtype=torch.float64)
    rank = int(torch.linalg.matrix_rank(x))
    return x, values, max(0, len(values) - rank) if rank > 1 else 0


@dataclass(frozen=True)
class SharePlane:
    r"""
    Shares $y = \sigma(c_0 + c_1 \ln N + c_2 \ln D)$, which stay between 0 and 1, by quasi-likelihood
    ([Papke and Wooldridge 1996](https://doi.org/10.1002/(SICI)1099-1255(199611)11:6%3C619::AID-JAE418%3E3.0.CO;2-1)).

    Args:
        coefficients: $c_0, c_1, c_2$.
        covariance: of these, with the dispersion that the shares have.
        freedom: degrees of freedom.
    """

    coefficients: Tensor
    covariance: Tensor
    freedom: int

    @classmethod
    def fit(cls, n: Sequence[float], d: Sequence[float], y: Sequence[float]) -> "SharePlane | None":
        """None with too few shares, or too few between 0 and 1: the steeper the slope, the better it fits those."""
        x, shares, freedom = samples(n, d, y)
        if not freedom:
            return None
        coefficients = torch.linalg.pinv(x) @ ((shares + 0.5) / 2).logit()  # shares drawn to one half
        for _ in range(STEPS):
            means = (x @ coefficients).sigmoid()
            variances = means * (1 - means)
            inverse = torch.linalg.pinv(x.mT @ (variances[:, None] * x), hermitian=True)
            step = inverse @ x.mT @ (shares - means)
            coefficients = coefficients + step
            if not float(step.abs().max()) >= CLOSE:  # or NaN
                covariance = ((shares - means).square() / variances).sum() / freedom * inverse
                return cls(coefficients, covariance, freedom) if covariance.isfinite().all() else None
        return None

    def predict(self, parameters: float, tokens: float) -> tuple[float, float, float]:
        """The mean share there, and the ends of its 95 % interval, by the delta method on the line."""
        x = design([parameters], [tokens])[0]
        line, half = x @ self.coefficients, student_975(self.freedom) * (x @ self.covariance @ x).sqrt()
        return float(line.sigmoid()), float((line - half).sigmoid()), float((line + half).sigmoid())
