"""Two entropy reports head by head: how far each head's mean moved, and which of them moved beyond chance.

Entropies under one bound are compared in nats; under different bounds, as shares of them.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ModelError
from ..tables import Table, html, number, shorten
from .entropy_report import EntropyReport

if TYPE_CHECKING:
    from .drawing import NotebookFigure

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

    def verdict(self) -> str:
        """In a sentence: how far heads moved on average, and how many of them beyond chance."""
        heads = int(self.baseline.heads.sum())
        change = self.format(float(self.difference[self.baseline.heads].mean()), sign=True)
        how = "paired by sequence" if self.paired else "unpaired: other batches, or another bootstrap"
        unit = "of the bound" if self.shares else "nats"
        first = f"{self.other.name} against {self.baseline.name}: {change} {unit} on average"
        if self.sequences < 2:
            return f"{first}; which heads moved cannot be told from a single sequence"
        return f"{first}, {int(self.moved.sum())} of {heads} heads moved (simultaneous 95 % interval, {how})"

    def furthest(self, count: int = 10) -> Table:
        """The heads that moved furthest, with the half widths of their simultaneous 95 % intervals."""
        before, after = (r.entropy / scale_of(r, self.shares) for r in (self.baseline, self.other))
        width = simultaneous(int(self.baseline.heads.sum()), self.sequences) * self.standard_error
        order = self.difference.abs().where(self.moved, -1.0).flatten().argsort(descending=True)
        rows = []
        for index in order[: min(count, int(self.moved.sum()))].tolist():
            place = divmod(index, self.difference.shape[1])
            texts = (self.format(x[place]) for x in (before, after))
            change, half = self.format(self.difference[place], sign=True), self.format(width[place])
            rows.append([*map(str, place), *texts, f"{change} ± {half}"])
        unit = "" if self.shares else " (nats)"
        return Table(["layer", "head", f"before{unit}", f"after{unit}", f"difference{unit}"], rows)

    def table(self, count: int = 10) -> str:
        """How many heads moved, and those that moved furthest."""
        lines = [self.verdict()]
        for layer, head, before, after, change in self.furthest(count).rows if self.moved.any() else ():
            lines.append(f"  layer {layer} head {head}: {before} to {after}, {change}")
        return "\n".join(lines)

    def plot(self, *others: "EntropyComparison", columns: int = 2) -> "NotebookFigure":
        """
        Heat map of how far each head's mean entropy moved, what moved beyond chance framed; a matplotlib `Figure`.

        Args:
            others: comparisons that are drawn beside this one, all on one colour scale.
            columns: how many of them stand side by side.
        """
        from .drawing import Grid, heatmaps

        comparisons = (self, *others)
        largest = max(float(c.difference.abs().nan_to_num().max()) for c in comparisons) or 1.0
        grids = [Grid(c.title, c.difference, c.baseline.heads, c.moved) for c in comparisons]
        unit = "shares of the bound" if any(c.shares for c in comparisons) else "nats"
        return heatmaps(grids, "PuOr", -largest, largest, "+.2f", f"difference ({unit}); framed: moved", columns)

    @property
    def title(self) -> str:
        """Of its panel in a picture."""
        return f"{shorten(self.other.name)}\nminus {shorten(self.baseline.name)}"

    def format(self, value: Tensor | float, sign: bool = False) -> str:
        """Nats, or per cent of the bound."""
        if self.shares:
            return number(100 * float(value), "+.1f" if sign else ".1f") + " %"
        return number(float(value), "+.2f" if sign else ".2f")

    def __repr__(self) -> str:
        return f"<EntropyComparison {self.verdict()}>"

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        return html(self.furthest() if self.moved.any() else Table([], []), self.verdict())


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
