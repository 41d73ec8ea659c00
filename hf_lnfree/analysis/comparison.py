"""Two entropy reports head by head: how far each head's mean moved, and which of them moved beyond chance.

Entropies under one bound are compared in nats; under different bounds, as shares of them.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ModelError
from ..tables import number
from .entropy_report import EntropyReport

LARGE = 500  # degrees of freedom, from which Student's distribution is the normal one


@dataclass
class EntropyComparison:
    """
    Args:
        baseline, other: the reports.
        difference: [L, H] mean entropy of `other` minus that of `baseline`, in nats; where the bounds of heads differ,
            as those of an encoder and a decoder do, in shares of the bound of each head.
        standard_error: [L, H] of `difference`; NaN where one of the reports has none.
        paired: whether both were measured on the same batches, so that what a sequence does to both cancels.
        moved: [L, H] whether the simultaneous 95 % interval (Bonferroni over heads) leaves out zero; nowhere from a
            single sequence.
        shares: whether the unit is the share of the bound.
    """

    baseline: EntropyReport
    other: EntropyReport
    difference: Tensor
    standard_error: Tensor
    paired: bool
    moved: Tensor
    shares: bool = False

    @property
    def sequences(self) -> int:
        """Of the report with fewer."""
        return min(self.baseline.sequences, self.other.sequences)

    def table(self, count: int = 10) -> str:
        """How many heads moved, and those that moved furthest."""
        heads = int(self.baseline.heads.sum())
        change = float(self.difference[self.baseline.heads].mean())
        how = "paired by sequence" if self.paired else "unpaired: other batches, or another bootstrap"
        unit = "of the bound" if self.shares else "nats"
        change_text = self.format(change, sign=True)
        first = f"{self.other.name} against {self.baseline.name}: {change_text} {unit} on average"
        if self.sequences < 2:
            return f"{first}; which heads moved cannot be told from a single sequence"
        lines = [f"{first}, {int(self.moved.sum())} of {heads} heads moved (simultaneous 95 % interval, {how})"]
        before, after = (r.entropy / scale_of(r, self.shares) for r in (self.baseline, self.other))
        width = simultaneous(heads, self.sequences) * self.standard_error
        order = self.difference.abs().where(self.moved, -1.0).flatten().argsort(descending=True)
        for index in order[: min(count, int(self.moved.sum()))].tolist():
            layer, head = divmod(index, self.difference.shape[1])
            lines.append(
                f"  layer {layer} head {head}: {self.format(before[layer, head])} to "
                f"{self.format(after[layer, head])}, {self.format(self.difference[layer, head], sign=True)} "
                f"± {self.format(width[layer, head])}"
            )
        return "\n".join(lines)

    def format(self, value: Tensor | float, sign: bool = False) -> str:
        """Nats, or per cent of the bound."""
        if self.shares:
            return number(100 * float(value), "+.1f" if sign else ".1f") + " %"
        return number(float(value), "+.2f" if sign else ".2f")

    def __str__(self) -> str:
        return self.table()


def simultaneous(heads: int, sequences: int) -> float:
    """Half width, in standard errors from so many sequences, of intervals that hold for all heads at once with 95 %."""
    low, high = 0.0, 1.0
    while inside(high, sequences - 1) < 1 - 0.05 / heads:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle, sequences - 1) < 1 - 0.05 / heads else (low, middle)
    return high


def inside(t: float, freedom: int) -> float:
    """Probability that Student's variable lies within ±t (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    if freedom > LARGE:
        return math.erf(t / math.sqrt(2))
    angle, odd = math.atan(t / math.sqrt(freedom)), freedom % 2
    term = total = (math.cos(angle) if odd else 1.0) if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def scale_of(report: EntropyReport, shares: bool) -> Tensor | float:
    """[L, H] what a report's entropies are divided by."""
    return report.bound if shares else 1.0


def compare_reports(baseline: EntropyReport, other: EntropyReport) -> EntropyComparison:
    """
    Compare head by head.

    Raises:
        ModelError: the models have other numbers of layers or heads.
    """
    if baseline.entropy.shape != other.entropy.shape:
        shapes = (" x ".join(map(str, r.entropy.shape)) for r in (baseline, other))
        raise ModelError(
            f"{baseline.name} and {other.name} cannot be compared head by head: they have {' and '.join(shapes)} "
            "layers x heads. Their summaries can be: see EntropyReport.buckets."
        )
    keys = ("data_sha256", "bootstrap")
    paired = baseline.metadata.get("data_sha256") is not None and all(
        baseline.metadata.get(key) == other.metadata.get(key) for key in keys
    )
    paired = paired and len(baseline.replicates) > 1 and len(baseline.replicates) == len(other.replicates)
    shares = not torch.allclose(baseline.bound, other.bound, rtol=1e-6, equal_nan=True)
    ours, theirs = (scale_of(report, shares) for report in (other, baseline))
    difference = other.entropy / ours - baseline.entropy / theirs
    sequences = min(baseline.sequences, other.sequences)
    if paired and sequences > 1:
        # Replicates with exponential weights spread as much less than the means of n sequences do.
        spread = (other.replicates / ours - baseline.replicates / theirs).std(0)
        error = spread * math.sqrt((sequences + 1) / (sequences - 1))
    else:
        error = ((baseline.standard_error / theirs).square() + (other.standard_error / ours).square()).sqrt()
    moved = error.isfinite() & (sequences > 1)
    if moved.any():
        moved &= difference.abs() > simultaneous(int(baseline.heads.sum()), sequences) * error
    return EntropyComparison(baseline, other, difference, error, paired, moved, shares)
