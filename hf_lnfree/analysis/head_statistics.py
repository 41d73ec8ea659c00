"""What heads are like besides their entropy: sums over rows, sequence by sequence, and what is judged of them.

Shapes: S statistics, those of `RowStatistics` in their order, L attention modules, B batch, H heads, Q queries.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..attention.fused import RowEntropies
from ..attention.statistics import TOP_KEYS, RowStatistics
from .ratios import cluster_sums, ratio

STATISTICS = RowStatistics._fields
LARGEST = STATISTICS.index("largest_logit")  # of all rows, and no mean
TITLES = ("largest logit", "logit variance", "sink mass", f"top {TOP_KEYS} mass", "output norm")
SINK = 0.3  # Gu et al., arXiv 2410.10781, section 3: a head with a larger mean sink mass has an attention sink
DORMANT = 0.25  # of the mean output norm of a layer's heads, below which one is dormant: the ratio of arXiv 2504.03889


class StatisticsTotals:
    """The sums of every head over all batches; of a module that offers no logits, NaN."""

    def __init__(self) -> None:
        self.sums: list[dict[str, Tensor]] = []  # of modules

    def add(self, rows: dict[str, RowEntropies], tokens: Sequence[Tensor]) -> None:
        """
        Args:
            rows: by attention module, of one batch.
            tokens: for each of them, [B, Q] bool: which queries count.
        """
        found = [statistic_sums(*each) for each in zip(rows.values(), tokens, strict=True)]
        if not self.sums:
            self.sums = found
            return
        for before, sums in zip(self.sums, found, strict=True):
            for key, value in sums.items():
                before[key] = torch.maximum(before[key], value) if key == "largest" else before[key] + value

    def fields(self) -> dict[str, Tensor]:
        """[S, L, H] the statistics, means but for the largest logit, and their standard errors."""
        heads = max(sums["n"].shape[-1] for sums in self.sums)
        shape = (len(STATISTICS), len(self.sums), heads)
        mean, error = torch.full((2, *shape), math.nan, dtype=torch.float64)
        for layer, sums in enumerate(self.sums):
            t = {key: value.cpu() for key, value in sums.items()}
            found, spread = ratio(t)
            found[LARGEST], spread[LARGEST] = t["largest"], math.nan
            mean[:, layer, : found.shape[-1]], error[:, layer, : found.shape[-1]] = found, spread
        return {"statistics": mean, "statistics_error": error}


def statistic_sums(rows: RowEntropies, tokens: Tensor) -> dict[str, Tensor]:
    """Over sequences: [S, H] of their sums s over n rows and of squares and products of these; [H] largest logit."""
    dtype = torch.float32 if rows.entropy.device.type == "mps" else torch.float64
    counted = (tokens[:, None] & (rows.support > 0)).expand_as(rows.entropy)  # B H Q
    unknown = torch.full_like(rows.entropy, math.nan)
    values = (unknown,) * len(STATISTICS) if rows.statistics is None else rows.statistics
    sums, counts = [], []
    for each in values:
        chosen = counted[..., :: -(-counted.shape[-1] // each.shape[-1])]  # of every n-th query
        sums.append(each.to(dtype).where(chosen, 0.0).sum(-1))
        counts.append(chosen.sum(-1, dtype=dtype))
    s, n = torch.stack(sums), torch.stack(counts)  # S B H
    return {
        **cluster_sums(s, n),
        "sequences": (n > 0).sum(1),
        "largest": values[LARGEST].to(dtype).where(counted, -math.inf).amax((0, 2)),
    }
