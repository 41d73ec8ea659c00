"""The entropies of a model's heads as tensors, and what is judged of them: shares, flags, quantiles."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import SettingsError
from .entropy import MAXIMA, Maximum, bucket_shares, collapsed_share, entropy_maximum, overloaded_share
from .head_statistics import DORMANT, SINK, STATISTICS
from .parts import layer_names, name_of_maximum, part_names, parts_of
from .totals import BINS_PER_NAT

Z_95 = NormalDist().inv_cdf(0.975)
OVERLOADED, COLLAPSED = 0.75, 0.25  # above, and at most, of the maximum: the outer quarters of `bucket_shares`
FEWEST_SEQUENCES = 10  # below, a bootstrap over sequences says too little of how they differ
FEWEST_KEYS = 32  # below, random heads are near their maximum


class HeadFlag(NamedTuple):
    """One head that stands out, and why."""

    layer: int
    head: int
    kind: str
    """"overloaded", "collapsed", "not finite" or "too short"."""
    reason: str


@dataclass
class HeadEntropies:
    r"""
    A row is that of one query in an attention map: its distribution over keys. Means are over the rows of all queries
    that are tokens and may attend to at least one key. Entropies are in nats.

    Shapes: L attention modules, H heads (of the module with most; what another lacks is NaN), S strata, N bins, R
    bootstrap replicates.

    Args:
        name: of the model, or of a variant of the paper.
        modules: names of the L attention modules.
        entropy: [L, H] mean entropy of each head.
        standard_error: [L, H] of `entropy`, sequences being independent; NaN from a single sequence.
        normalized: [L, H] mean of $H_i / \ln n_i$ over rows with $n_i > 1$ keys, 0 to 1.
        bound: [L, H] largest mean entropy possible on this data, the mean of $\ln n_i$.
        row_variance, row_minimum, row_maximum: [L, H] of the entropies of rows.
        rows: [L, H] how many were averaged.
        masked_rows: [L, H] queries that are tokens and may attend to nothing; left out.
        nonfinite_rows: [L, H] rows whose entropy was NaN or infinite; not left out.
        histogram: [L, H, N] counts of rows, in bins of 1/64 nat from 0.
        strata_entropy, strata_bound, strata_rows: [L, H, S] mean entropy, its bound, and rows, of the tokens at
            positions 2^(s-1) + 1 to 2^s, counted from 1.
        replicates: [R, L, H] bootstrap replicates of `entropy`.
        sequence_entropy, sequence_bound: [K, L, H] mean entropy and largest possible one of the first K sequences, at
            most 6; none where modules see different ones, and in files that lack them.
        statistics, statistics_error: [S, L, H] what `RowStatistics` has of rows, in its order, over the same rows: the
            largest logit of all, the means of the others, and standard errors of these; none where not asked for.
        sequences: how many were averaged.
        context_length: the largest number of keys that a query had.
        kinds: of the L modules: "causal", "bidirectional" or "cross", see `kind_of`; none in files that lack them.
        source: "measured", or "published" for figures of the paper.
        metadata: data hash, versions, and anything else that says where the numbers are from.
    """

    name: str
    modules: list[str]
    entropy: Tensor
    standard_error: Tensor
    normalized: Tensor
    bound: Tensor
    row_variance: Tensor
    row_minimum: Tensor
    row_maximum: Tensor
    rows: Tensor
    masked_rows: Tensor
    nonfinite_rows: Tensor
    histogram: Tensor
    strata_entropy: Tensor
    strata_bound: Tensor
    strata_rows: Tensor
    replicates: Tensor
    sequences: int
    context_length: int
    kinds: list[str]
    source: str = "measured"
    metadata: dict[str, Any] = field(default_factory=dict)
    sequence_entropy: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 0, dtype=torch.float64))
    sequence_bound: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 0, dtype=torch.float64))
    statistics: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 0, dtype=torch.float64))
    statistics_error: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 0, dtype=torch.float64))

    @property
    def heads(self) -> Tensor:
        """[L, H] which heads there are."""
        return self.bound.isfinite()

    @property
    def share(self) -> Tensor:
        """[L, H] mean entropy divided by its bound, which thresholds are shares of."""
        return self.entropy / self.bound

    @property
    def parts(self) -> dict[str, list[int]]:
        """Which of the L modules are an encoder's, a decoder's, cross-attentions: see `parts_of`."""
        return parts_of(self.modules)

    @property
    def part_names(self) -> list[str]:
        """Of each of the L modules the short name of its part, "" where there is one part only: see `part_names`."""
        return part_names(self.modules)

    @property
    def layer_names(self) -> list[str]:
        """Of each of the L modules its number in its part: "3", or "encoder 3" where there are several parts."""
        return layer_names(self.modules)

    def heads_of(self, part: str = "") -> Tensor:
        """[L, H] which heads a part has, by its short name; all heads for ""."""
        if not part:
            return self.heads
        return self._heads_in([layer for layer, name in enumerate(self.part_names) if name == part])

    def _heads_in(self, layers: Sequence[int]) -> Tensor:
        """[L, H] which heads these layers have."""
        inside = torch.zeros(len(self.modules), 1, dtype=torch.bool)
        inside[list(layers)] = True
        return self.heads & inside

    @property
    def part_bounds(self) -> dict[str, float]:
        """The largest bound of the heads of each part, by its short name."""
        return {part: float(self.bound[self.heads_of(part)].max()) for part in dict.fromkeys(self.part_names)}

    def maximum(self, maximum: Maximum | float = "causal") -> Tensor:
        """
        [L, H] the entropy that counts as 100 %.

        "causal" is the bound on this very data (padding, windows), whatever the attention: `name_of` tells for which
        kinds it is one. "observed" is the largest of each part of the model.
        """
        return self._maximum(self.entropy, maximum)

    def _maximum(self, entropy: Tensor, maximum: Maximum | float) -> Tensor:
        if maximum == "causal":
            return self.bound
        top = torch.empty_like(self.bound)
        for layers in self.parts.values():
            top[layers] = entropy_maximum(entropy[layers], maximum, self.context_length)
        return top

    def name_of(self, maximum: Maximum | float = "causal", part: str | None = None) -> str:
        """What a maximum is for all of the model or one part: the bound of "causal" or "bidirectional" attention ..."""
        layers = range(len(self.kinds)) if part is None else self.parts[part]
        return name_of_maximum(maximum, [self.kinds[layer] for layer in layers] if self.kinds else [])

    def buckets(self, maximum: Maximum | float = "causal") -> Tensor:
        """[4] shares of heads in the quarters of the maximum, see `bucket_shares`."""
        return bucket_shares(self.entropy[self.heads], self.maximum(maximum)[self.heads])

    def bucket_intervals(self, maximum: Maximum | float = "causal") -> Tensor:
        """
        [4, 2] 95 % interval of each share: percentiles of the bootstrap over sequences.

        NaN without replicates, and from fewer than 10 sequences.
        """
        if not len(self.replicates) or self.sequences < FEWEST_SEQUENCES:
            return torch.full((4, 2), math.nan, dtype=torch.float64)
        heads = self.heads
        shares = [bucket_shares(e[heads], self._maximum(e, maximum)[heads]) for e in self.replicates]
        return torch.stack(shares).nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0).T

    def overloaded(self, maximum: Maximum | float = "causal", part: str = "") -> float:
        """Share of heads, or of a part's, in entropic overload: above 3/4 of the maximum."""
        heads = self.heads_of(part)
        return overloaded_share(self.entropy[heads], self.maximum(maximum)[heads])

    def collapsed(self, maximum: Maximum | float = "causal", part: str = "") -> float:
        """Share of heads, or of a part's, in entropic collapse: at or below 1/4 of the maximum."""
        heads = self.heads_of(part)
        return collapsed_share(self.entropy[heads], self.maximum(maximum)[heads])

    @property
    def first_token(self) -> tuple[Tensor, Tensor]:
        """[L, H] mean entropies of the first queries, which are those of a class token, and of all others."""
        rows, first = self.rows, self.strata_rows[..., 0]
        alone = self.strata_entropy[..., 0]
        others = (self.entropy * rows - (alone * first).nan_to_num(0.0)) / (rows - first)
        return alone, others

    def statistic(self, name: str) -> Tensor:
        """
        [L, H] one of the fields of `RowStatistics` of every head: "sink_mass", "logit_variance" ...

        Raises:
            SettingsError: there is none of that name, or statistics were not asked for.
        """
        if name not in STATISTICS or not len(self.statistics):
            raise SettingsError(
                f"{self.name} has no statistic {name!r}. "
                + ("" if len(self.statistics) else "Measure with statistics=True (--statistics). ")
                + f"There are {', '.join(STATISTICS)}."
            )
        return self.statistics[STATISTICS.index(name)]

    def sink_heads(self, eps: float = SINK) -> float:
        """Share of heads with an attention sink: their mean sink mass is above `eps`; NaN where none was measured."""
        mass = self.statistic("sink_mass")
        return share_of(mass > eps, mass)

    def dormant_heads(self, below: float = DORMANT) -> float:
        """Share of heads whose mean output norm is below `below` of that of their layer's heads."""
        norm = self.statistic("output_norm")
        return share_of(norm < below * norm.nanmean(-1, keepdim=True), norm)

    def flags(self, maximum: Maximum | float = "causal") -> list[HeadFlag]:
        """
        Heads that are overloaded, collapsed or not finite, each with its reason.

        Where no query has 32 keys, heads beyond a threshold are "too short" for either verdict: the entropies of
        random heads are near their maximum there.
        """
        found = []
        top = self.maximum(maximum)
        for layer, head in self.heads.nonzero().tolist():
            mean, limit, error = (float(x[layer, head]) for x in (self.entropy, top, self.standard_error))
            if lost := int(self.nonfinite_rows[layer, head]):
                reason = f"{lost} of {int(self.rows[layer, head])} rows are NaN or infinite"
                found.append(HeadFlag(layer, head, "not finite", reason))
            elif limit > 0 and (mean > OVERLOADED * limit or mean <= COLLAPSED * limit):  # one key leaves no choice
                kind, word, threshold = (
                    ("overloaded", "above", OVERLOADED) if mean > limit / 2 else ("collapsed", "at most", COLLAPSED)
                )
                reason = (
                    f"{mean:.2f} nats is {100 * mean / limit:.0f} % of {limit:.2f} ({word} {100 * threshold:.0f} %)"
                )
                if math.isfinite(error):
                    reason += f", ± {Z_95 * error:.2f}"
                    reason += ", which reaches the threshold" if abs(mean - threshold * limit) < Z_95 * error else ""
                if self.too_short:
                    kind, reason = "too short", f"{reason}; {self.context_length} keys are too few for a verdict"
                found.append(HeadFlag(layer, head, kind, reason))
        return found

    @property
    def too_short(self) -> bool:
        """Whether no query had as many keys as a verdict on heads needs."""
        return self.context_length < FEWEST_KEYS

    def layer_means(self) -> list[float]:
        """Mean entropy over the heads of each layer, nats; NaN if one of them is."""
        return [float(row[heads].mean()) for row, heads in zip(self.entropy, self.heads, strict=True)]

    def quantiles(self, q: list[float], by_layer: bool = False) -> Tensor:
        """[len(q), L, H], or [len(q), L] over all heads: quantiles of entropies of rows, right to a bin of 1/64 nat."""
        counts = (self.histogram.sum(1) if by_layer else self.histogram).double()
        cumulative = counts.cumsum(-1)
        found = []
        for level in q:
            target = level * cumulative[..., -1:]
            index = (cumulative < target).sum(-1, keepdim=True).clamp_max(counts.shape[-1] - 1)
            inside = counts.gather(-1, index)
            before = cumulative.gather(-1, index) - inside
            found.append(((index + (target - before) / inside) / BINS_PER_NAT).squeeze(-1))
        return torch.stack(found)

    def summary(self) -> dict[str, Any]:
        """Mean entropy, and under each maximum the shares of heads by quarter with their intervals."""
        return {
            "mean_entropy": float(self.entropy[self.heads].mean()),
            "mean_normalized": float(self.normalized[self.heads].mean()),
            "heads": int(self.heads.sum()),
            "parts": {part: self.part_summary(part) for part in self.parts},
            "buckets": {m: {"shares": self.buckets(m), "interval_95": self.bucket_intervals(m)} for m in MAXIMA},
            "flags": [flag._asdict() for flag in self.flags()],
            **self.statistics_summary(),
        }

    def statistics_summary(self) -> dict[str, Any]:
        """The statistics of every head by name, and the shares of heads with a sink and of dormant ones; {} without."""
        if not len(self.statistics):
            return {}
        return {
            "statistics": dict(zip(STATISTICS, self.statistics, strict=True)),
            "sink_heads": self.sink_heads(),
            "dormant_heads": self.dormant_heads(),
        }

    def part_summary(self, part: str) -> dict[str, Any]:
        """Of one part, against the bound that holds for it: mean entropy, and shares of heads by quarter."""
        heads = self._heads_in(self.parts[part])
        return {
            "bound": self.name_of("causal", part),
            "heads": int(heads.sum()),
            "mean_entropy": float(self.entropy[heads].mean()),
            "mean_normalized": float(self.normalized[heads].mean()),
            "shares": bucket_shares(self.entropy[heads], self.bound[heads]),
        }


def share_of(chosen: Tensor, values: Tensor) -> float:
    """Share of the heads with a value that are chosen."""
    known = ~values.isnan()
    return float(chosen[known].double().mean())
