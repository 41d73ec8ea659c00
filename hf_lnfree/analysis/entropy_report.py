"""`EntropyReport`: the entropies of a model's heads as one object that saves, loads, compares and prints itself."""

import json
import math
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .entropy import Maximum, bucket_shares, collapsed_share, entropy_maximum, overloaded_share


def _encode(value: Any) -> Any:
    """Strict JSON has no NaN: it becomes null, and `nonfinite_rows` says how much was lost."""
    if isinstance(value, Tensor):
        return _encode(value.tolist())
    if isinstance(value, list):
        return [_encode(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _decode(value: Any) -> Tensor:
    return torch.tensor([[math.nan if v is None else v for v in row] for row in value], dtype=torch.float64)


@dataclass
class EntropyReport:
    """
    Args:
        name: model or row.
        entropy: [L, H] mean entropy of each head, nats.
        standard_error: [L, H] of `entropy`, nats; NaN from a single sequence.
        normalized: [L, H] mean share of each row's own maximum, 0 to 1.
        nonfinite_rows: [L, H] rows whose entropy was NaN or infinite.
        rows, sequences: how many queries and sequences were averaged.
        context_length: the largest number of keys a query had.
        bound: largest mean entropy possible on this data, the mean of ln(number of keys); nats.
        source: "measured", or "published" for figures of the paper.
        metadata: anything that says where the numbers are from.
    """

    name: str
    entropy: Tensor
    standard_error: Tensor
    normalized: Tensor
    nonfinite_rows: Tensor
    rows: int
    sequences: int
    context_length: int
    bound: float
    source: str = "measured"
    metadata: dict[str, Any] = field(default_factory=dict)

    def maximum(self, maximum: Maximum | float = "observed") -> float:
        """The entropy that counts as 100 %; "causal" is the bound on this very data (padding included)."""
        if maximum == "causal":
            return self.bound
        return entropy_maximum(self.entropy, maximum, self.context_length)

    def buckets(self, maximum: Maximum | float = "observed") -> Tensor:
        """Shares of heads in the four quarters of the maximum, see `bucket_shares`."""
        return bucket_shares(self.entropy, self.maximum(maximum))

    def overloaded(self, maximum: Maximum | float = "observed") -> float:
        """Share of heads above 3/4 of the maximum."""
        return overloaded_share(self.entropy, self.maximum(maximum))

    def collapsed(self, maximum: Maximum | float = "observed") -> float:
        """Share of heads at or below 1/4 of the maximum."""
        return collapsed_share(self.entropy, self.maximum(maximum))

    def layer_means(self) -> list[float]:
        """Mean entropy over the heads of each layer, nats."""
        return self.entropy.mean(dim=1).tolist()

    def to_dict(self) -> dict[str, Any]:
        return {key: _encode(value) for key, value in self._items()}

    def _items(self) -> list[tuple[str, Any]]:
        return [(f.name, getattr(self, f.name)) for f in fields(self)]

    def save(self, path: str | Path) -> None:
        """Write strict JSON; NaN is null."""
        Path(path).write_text(json.dumps(self.to_dict(), allow_nan=False))

    @classmethod
    def load(cls, path: str | Path) -> "EntropyReport":
        data = json.loads(Path(path).read_text())
        for key in ("entropy", "standard_error", "normalized", "nonfinite_rows"):
            data[key] = _decode(data[key])
        data["bound"] = math.nan if data["bound"] is None else data["bound"]
        return cls(**data)

    def table(self, maximum: Maximum | float = "observed") -> str:
        """Layers x heads in nats, then buckets, overload and collapse, as plain text."""
        heads = self.entropy.shape[1]
        lines = [f"{self.name}: mean attention entropy in nats ({self.source})"]
        lines.append("layer " + "".join(f"{f'h{h}':>7}" for h in range(heads)) + "    mean")
        for layer, row in enumerate(self.entropy.tolist()):
            cells = "".join(f"{value:7.2f}" for value in row)
            lines.append(f"{layer:>5} {cells} {sum(row) / heads:7.2f}")
        top = self.maximum(maximum)
        shares = " / ".join(f"{100 * share:.0f}" for share in self.buckets(maximum).tolist())
        lines.append(f"heads by quarter of {top:.2f} nats ({maximum}): {shares} %")
        lines.append(
            f"overloaded {100 * self.overloaded(maximum):.1f} %, collapsed {100 * self.collapsed(maximum):.1f} %; "
            f"{self.rows} rows of {self.sequences} sequences, up to {self.context_length} keys"
        )
        if lost := int(self.nonfinite_rows.sum()):
            lines.append(f"{lost} rows are not finite: the model has diverged there")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


PAPER_RESULTS: dict[str, Any] = json.loads((files(__package__) / "data" / "paper_results.json").read_text())


def published_reports() -> dict[str, EntropyReport]:
    """The head-entropy heatmaps printed for GPT-2 small at T=128 (arXiv 2410.09637, 2501.03489), by row name."""
    length = PAPER_RESULTS["setting"]["context_length"]
    reports = {}
    for row, heatmap in PAPER_RESULTS["heatmaps"].items():
        entropy = torch.tensor(heatmap, dtype=torch.float64)
        unknown = torch.full_like(entropy, math.nan)
        reports[row] = EntropyReport(
            name=row,
            entropy=entropy,
            standard_error=unknown,
            normalized=unknown,
            nonfinite_rows=torch.zeros_like(entropy),
            rows=0,
            sequences=0,
            context_length=length,
            bound=entropy_maximum(entropy, "causal", length),
            source="published",
            metadata={"citation": PAPER_RESULTS["source"], **PAPER_RESULTS["setting"]},
        )
    return reports
