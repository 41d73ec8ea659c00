"""Two geometry reports MLP by MLP: how far each metric moved, and what moved beyond chance."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ModelError
from ..tables import Table, html, number
from .comparison import simultaneous
from .geometry_report import GeometryReport, title
from .moments import standard_error


@dataclass
class GeometryComparison:
    """
    Args:
        baseline, other: the reports.
        difference: metric -> [L], `other` minus `baseline`.
        standard_errors: metric -> [L] of the difference; NaN where there is none.
        paired: whether both read the same documents in the same groups, so that what a document does to both cancels.
        moved: metric -> [L] whether the simultaneous 95 % interval over all MLPs, for this metric, leaves out zero.
    """

    baseline: GeometryReport
    other: GeometryReport
    difference: dict[str, Tensor]
    standard_errors: dict[str, Tensor]
    paired: bool
    moved: dict[str, Tensor]

    def verdict(self) -> str:
        """In a sentence: how many MLPs moved in how many metrics."""
        count = sum(int(moved.sum()) for moved in self.moved.values())
        of = sum(int(difference.isfinite().sum()) for difference in self.difference.values())
        how = "paired by document" if self.paired else "unpaired: other documents, or other groups"
        return (
            f"{self.other.name} against {self.baseline.name}: {count} of {of} metrics of MLPs moved (95 %, for each "
            f"metric simultaneously over MLPs; {how})"
        )

    def furthest(self) -> Table:
        """Of each metric that moved anywhere: its mean in both, how many MLPs moved, and the largest move."""
        rows = []
        for metric, moved in self.moved.items():
            if not moved.any():
                continue
            largest = int(self.difference[metric].abs().where(moved, -1.0).argmax())
            means = (number(float(r.values[metric].nanmean()), ".3f") for r in (self.baseline, self.other))
            change, error = (float(x[metric][largest]) for x in (self.difference, self.standard_errors))
            where = f"{self.baseline.places[largest]}: {change:+.3f} ± {error:.3f}"
            rows.append([title(metric), *means, f"{int(moved.sum())} of {len(moved)}", where])
        return Table(["metric", "mean before", "mean after", "MLPs moved", "largest move ± standard error"], rows)

    def table(self) -> str:
        """What moved, as plain text."""
        return f"{self.verdict()}\n{self.furthest()!r}" if any(map(torch.any, self.moved.values())) else self.verdict()

    def __repr__(self) -> str:
        return f"<GeometryComparison {self.verdict()}>"

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        return html(self.furthest(), self.verdict())


def compare_geometry(baseline: GeometryReport, other: GeometryReport) -> GeometryComparison:
    """
    Compare MLP by MLP, in order, in the metrics that both have.

    Raises:
        ModelError: the models have other numbers of MLPs.
    """
    if len(baseline.modules) != len(other.modules):
        raise ModelError(
            f"{baseline.name} and {other.name} cannot be compared MLP by MLP: they have {len(baseline.modules)} and "
            f"{len(other.modules)}."
        )
    same = all(baseline.metadata.get(key) == other.metadata.get(key) for key in ("data_sha256", "groups"))
    paired = same and baseline.metadata.get("data_sha256") is not None and baseline.documents == other.documents
    groups = min(min(int(report.metadata["groups"]), report.documents) for report in (baseline, other))
    difference, errors, moved = {}, {}, {}
    for metric in (key for key in baseline.values if key in other.values):
        change = other.values[metric] - baseline.values[metric]
        if paired:
            error = standard_error(other.left_out[metric] - baseline.left_out[metric])
        else:
            error = (baseline.standard_errors[metric].square() + other.standard_errors[metric].square()).sqrt()
        known = error.isfinite() & change.isfinite()
        if known.any() and groups > 1:
            known &= change.abs() > simultaneous(int(known.sum()), groups) * error
        difference[metric], errors[metric], moved[metric] = change, error, known & (groups > 1)
    return GeometryComparison(baseline, other, difference, errors, paired, moved)
