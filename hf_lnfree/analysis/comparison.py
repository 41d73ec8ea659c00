"""Two entropy reports head by head: how far each head's mean moved, and which of them moved beyond chance."""

from dataclasses import dataclass
from statistics import NormalDist

from torch import Tensor

from ..errors import ModelError
from ..tables import number
from .entropy_report import EntropyReport


@dataclass
class EntropyComparison:
    """
    Args:
        baseline, other: the reports.
        difference: [L, H] mean entropy of `other` minus that of `baseline`, nats.
        standard_error: [L, H] of `difference`; NaN where one of the reports has none.
        paired: whether both were measured on the same batches, so that what a sequence does to both cancels.
        moved: [L, H] whether the simultaneous 95 % interval (Bonferroni over heads) leaves out zero.
    """

    baseline: EntropyReport
    other: EntropyReport
    difference: Tensor
    standard_error: Tensor
    paired: bool
    moved: Tensor

    def table(self, count: int = 10) -> str:
        """How many heads moved, and those that moved furthest."""
        heads = int(self.baseline.heads.sum())
        change = float(self.difference[self.baseline.heads].mean())
        how = "paired by sequence" if self.paired else "unpaired: other batches, or another bootstrap"
        lines = [
            f"{self.other.name} against {self.baseline.name}: {number(change, '+.2f')} nats on average, "
            f"{int(self.moved.sum())} of {heads} heads moved (simultaneous 95 % interval, {how})"
        ]
        order = self.difference.abs().where(self.moved, -1.0).flatten().argsort(descending=True)
        for index in order[: min(count, int(self.moved.sum()))].tolist():
            layer, head = divmod(index, self.difference.shape[1])
            lines.append(
                f"  layer {layer} head {head}: {self.baseline.entropy[layer, head]:.2f} to "
                f"{self.other.entropy[layer, head]:.2f}, {self.difference[layer, head]:+.2f} "
                f"± {simultaneous(heads) * self.standard_error[layer, head]:.2f}"
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def simultaneous(heads: int) -> float:
    """Half width, in standard errors, of intervals that hold for all heads at once with 95 %."""
    return NormalDist().inv_cdf(1 - 0.025 / heads)


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
    difference = other.entropy - baseline.entropy
    if paired and min(baseline.sequences, other.sequences) > 1:
        error = (other.replicates - baseline.replicates).std(0)
    else:
        error = (baseline.standard_error.square() + other.standard_error.square()).sqrt()
    moved = difference.abs() > simultaneous(max(1, int(baseline.heads.sum()))) * error
    moved = moved & error.isfinite()
    return EntropyComparison(baseline, other, difference, error, paired, moved)
