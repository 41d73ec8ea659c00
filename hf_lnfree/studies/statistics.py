"""Means and 95 % intervals over seeds."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import SettingsError
from ..tables import number

# Student's t, 97.5 % quantile, by degrees of freedom; from 30 on the normal value is used.
T_975 = [
    math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
    2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045,
]  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds with the half width of its 95 % interval (Student's t); the width of one seed is NaN."""

    mean: float
    half_width: float
    seeds: int

    def format(self, digits: int = 2, percent: bool = False, sign: bool = False) -> str:
        """Mean ± half width; without the width for one seed, "not finite" for a NaN among the values."""
        scale, unit = (100.0, " %") if percent else (1.0, "")
        text = number(self.mean * scale, f"{'+' if sign else ''}.{digits}f")
        if not math.isfinite(self.mean):
            return text
        return text + (f" ± {self.half_width * scale:.{digits}f}" if self.seeds > 1 else "") + unit


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % interval; a NaN among the values (a diverged run) makes both NaN."""
    count = len(values)
    if not count:
        raise SettingsError("There are no values to average.")
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, math.nan, 1)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (count - 1))
    return Estimate(mean, student_975(count - 1) * deviation / math.sqrt(count), count)


def student_975(freedom: int) -> float:
    """97.5 % quantile of Student's t with so many degrees of freedom; NaN with none."""
    return T_975[freedom] if freedom < len(T_975) else 1.96


@dataclass(frozen=True)
class Measure:
    """
    What variants are compared by.

    Args:
        name: as results have it: "perplexity" or "accuracy".
        best: the best of several values.
        gap: the difference of one variant to another, paired by seed.
        digits: after the point.
        percent: whether a value is a share, shown in per cent.
        unit: of a difference.
        superlative: of the best value.
    """

    name: str
    best: Callable[..., Any]
    gap: Callable[[Sequence[float], Sequence[float]], Estimate]
    digits: int
    percent: bool
    unit: str
    superlative: str

    def format(self, found: Estimate) -> str:
        """A value with its interval."""
        return found.format(self.digits, percent=self.percent)

    def format_gap(self, found: Estimate, sign: bool = True) -> str:
        """A difference with its interval, in per cent or in points."""
        return found.format(1, percent=True, sign=sign).replace("%", self.unit)


def relative_difference(values: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Of `values` to `baseline`, paired by seed: the estimate of v/b - 1."""
    return estimate([v / b - 1 for v, b in zip(values, baseline, strict=True)])


def difference(values: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Of `values` to `baseline`, paired by seed: the estimate of v - b."""
    return estimate([v - b for v, b in zip(values, baseline, strict=True)])


MEASURES = {
    measure.name: measure
    for measure in (
        Measure("perplexity", min, relative_difference, 2, False, "%", "lowest"),
        Measure("accuracy", max, difference, 1, True, "points", "highest"),
    )
}
"""Name -> measure."""
