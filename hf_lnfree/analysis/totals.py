r"""Streaming sums over rows and sequences, from which an `EntropyReport` follows; they stay on the model's device.

A row is that of a query in an attention map. Sequences, not rows, are independent. Standard errors are those of a ratio
of sums over sequences; for everything that is no mean (shares of heads over a threshold) there are bootstrap
replicates, in which each sequence has a weight drawn from an exponential distribution instead of 1 (Rubin, The Bayesian
Bootstrap, 1981): nothing but their sums is kept, and unlike counts, which may all be 0, such weights leave no replicate
of a few sequences empty. Modules that see another batch than the rest, such as pictures or windows beside texts, count
what they see as sequences of their own.

Shapes: L attention modules, B batch, H heads, Q queries, N bins, S strata, R replicates.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attention.fused import RowEntropies
from ..errors import DataError
from .entropy import normalized_entropy
from .ratios import cluster_sums, ratio

BINS_PER_NAT, BINS = 64, 1024  # up to 16 nats: 8.9 million keys
FIRST_SEQUENCES = 6  # whose own means are kept
STRATA = 24  # position p (from 1) stands in stratum ceil(log2 p): 1, 2, 3-4, 5-8, ...


@dataclass(frozen=True)
class Rows:
    """
    Rows of layers of one shape, each [L, B, H, Q].

    Args:
        entropy: nats, in float64 where the device has that.
        support: how many keys each query may attend to.
        tokens: which queries are tokens.
        counted: which of these see a key.
    """

    entropy: Tensor
    support: Tensor
    tokens: Tensor
    counted: Tensor

    @classmethod
    def of(cls, entropy: Tensor, support: Tensor, tokens: Tensor) -> "Rows":
        """From entropy and support [L, B, H, Q] and tokens [L, B, Q]."""
        dtype = torch.float32 if entropy.device.type == "mps" else torch.float64
        tokens = tokens[:, :, None].expand_as(support)
        return cls(entropy.to(dtype), support, tokens, tokens & (support > 0))

    @property
    def finite(self) -> Tensor:
        return self.entropy.isfinite() & self.counted

    @property
    def kept(self) -> Tensor:
        """The entropies, 0 where a row does not count."""
        return self.entropy.where(self.counted, 0.0)

    @property
    def log_support(self) -> Tensor:
        """The largest entropy that each row could have, 0 where it does not count."""
        return self.support.to(self.entropy.dtype).log().where(self.counted, 0.0)


def row_sums(rows: Rows) -> dict[str, Tensor]:
    """[L, H] sums over rows."""
    choice = rows.counted & (rows.support > 1)
    share = normalized_entropy(rows.entropy, rows.support).where(choice, 0.0)
    sums = {
        "rows": rows.counted,
        "masked_rows": rows.tokens & ~rows.counted,
        "nonfinite_rows": rows.counted & ~rows.finite,
        "squares": rows.kept.square(),
        "bound": rows.log_support,
        "share": share,
        "choice": choice,
    }
    return {key: value.sum((1, 3)) for key, value in sums.items()}


def sequence_sums(rows: Rows, weights: Tensor) -> dict[str, Tensor]:
    """What standard errors and replicates are made of: sums over sequences of their sums s over n rows."""
    s, n = rows.kept.sum(-1), rows.counted.sum(-1, dtype=rows.entropy.dtype)  # L B H
    weights = weights.to(s)
    return {
        **cluster_sums(s, n),
        "replicates_s": torch.einsum("br,lbh->lhr", weights, s),
        "replicates_n": torch.einsum("br,lbh->lhr", weights, n),
    }


def sequence_means(rows: Rows) -> dict[str, Tensor]:
    """[L, B, H] of each sequence: mean entropy, and the largest that it could be; NaN where no row counts."""
    counted = rows.counted.sum(-1)
    return {"sequence_entropy": rows.kept.sum(-1) / counted, "sequence_bound": rows.log_support.sum(-1) / counted}


def distributions(rows: Rows) -> dict[str, Tensor]:
    """[L, H, N] how many rows by entropy, and [L, H, S] their sums by position."""
    bins = (rows.entropy.nan_to_num() * BINS_PER_NAT).clamp(0, BINS - 1).long()
    positions = rows.tokens.cumsum(-1).clamp_min(1).to(rows.entropy.dtype)
    strata = positions.log2().ceil().long().clamp_max(STRATA - 1)
    return {
        "histogram": by_index(rows.finite.long(), bins, BINS),
        "strata_s": by_index(rows.kept, strata, STRATA),
        "strata_bound": by_index(rows.log_support, strata, STRATA),
        "strata_rows": by_index(rows.counted.long(), strata, STRATA),
    }


def by_index(values: Tensor, index: Tensor, size: int) -> Tensor:
    """[L, H, size]: values [L, B, H, Q] added up by their index."""
    layers, _, heads, _ = values.shape
    flat = (x.transpose(1, 2).flatten(2) for x in (index, values))
    return values.new_zeros(layers, heads, size).scatter_add_(2, *flat)


def extremes(rows: Rows) -> dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor, float]]:
    """[L, H] smallest and largest entropy and largest support: how two batches join, the value, and that of no row."""
    return {
        "minimum": (torch.minimum, rows.entropy.where(rows.counted, math.inf).amin((1, 3)), math.inf),
        "maximum": (torch.maximum, rows.entropy.where(rows.counted, -math.inf).amax((1, 3)), -math.inf),
        "length": (torch.maximum, rows.support.where(rows.counted, 0).amax((1, 3)), 0),
    }


class EntropyTotals:
    """
    The sums of every head over all batches.

    Args:
        replicates: how many bootstrap replicates R; 0 for none.
        seed: of the bootstrap. Reports on the same batches with the same seed and R can be compared pairwise.
    """

    def __init__(self, replicates: int = 200, seed: int = 0):
        self.replicates, self.generator = replicates, torch.Generator().manual_seed(seed)
        self.modules: list[str] = []
        self.sums: dict[str, Tensor] = {}
        self.sequences: Tensor | None = None  # L
        self.first: dict[str, list[Tensor]] = {"sequence_entropy": [], "sequence_bound": []}  # of batches, [B, L, H]

    def add(self, rows: dict[str, RowEntropies], tokens: Sequence[Tensor]) -> None:
        """
        Args:
            rows: by attention module, entropy [B, H, Q] and support [B or 1, H or 1, Q].
            tokens: for each of them, [B, Q] bool: which queries count.

        Raises:
            DataError: another batch called other attention modules, or one of them more or less often.
        """
        if self.modules and list(rows) != self.modules:
            raise DataError(
                f"Batches differ in the attention modules that they call, or in how often: "
                f"{_difference(self.modules, list(rows))}. Batches must be alike: as many pictures or windows in each."
            )
        self.modules = list(rows)
        entropies = [r.entropy for r in rows.values()]
        if self.sequences is None:
            self.sequences = torch.zeros(len(rows), dtype=torch.int64, device=entropies[0].device)
        weights: dict[int, Tensor] = {}  # by batch size: what modules of one size see are the same sequences
        for size in dict.fromkeys(map(len, entropies)):
            weights[size] = torch.empty(size, self.replicates).exponential_(generator=self.generator)
            alike = [layer for layer, entropy in enumerate(entropies) if len(entropy) == size]
            self.sequences[alike] += torch.stack([tokens[layer].any(-1) for layer in alike]).any(0).sum()
        groups: dict[tuple[int, ...], list[int]] = {}
        for layer, entropy in enumerate(entropies):
            groups.setdefault(tuple(entropy.shape), []).append(layer)
        heads = max(entropy.shape[1] for entropy in entropies)
        # Sequences are told apart where all modules see the same ones.
        missing = FIRST_SEQUENCES - sum(map(len, self.first["sequence_entropy"])) if len(weights) == 1 else 0
        first = {key: torch.full((missing, len(rows), heads), math.nan, dtype=torch.float64) for key in self.first}
        supports = [r.support.expand_as(r.entropy) for r in rows.values()]
        for (size, *_), layers in groups.items():
            entropy, support, counts = (torch.stack([x[i] for i in layers]) for x in (entropies, supports, tokens))
            group = Rows.of(entropy, support, counts)
            self._add_group(layers, heads, group, weights[size])
            for key, values in sequence_means(group).items() if missing > 0 else ():
                found = values[:, :missing].transpose(0, 1).cpu()
                first[key][: len(found), layers, : found.shape[2]] = found.double()
        for key, found in first.items():
            self.first[key].append(found[: min(missing, len(entropies[0]))])

    def _add_group(self, layers: list[int], heads: int, rows: "Rows", weights: Tensor) -> None:
        """Rows of layers of one shape; weights [B, R]."""
        for key, value in (row_sums(rows) | sequence_sums(rows, weights) | distributions(rows)).items():
            self._total(key, heads, value, 0)[layers, : value.shape[1]] += value
        for key, (combine, value, empty) in extremes(rows).items():
            total = self._total(key, heads, value, empty)
            total[layers, : value.shape[1]] = combine(total[layers, : value.shape[1]], value)

    def _total(self, key: str, heads: int, like: Tensor, start: float) -> Tensor:
        if key not in self.sums:
            shape = (len(self.modules), heads, *like.shape[2:])
            self.sums[key] = torch.full(shape, start, dtype=like.dtype, device=like.device)
        return self.sums[key]

    def fields(self) -> dict[str, Any]:
        """The measured fields of an `EntropyReport`, on the CPU; a head that a layer lacks is NaN with 0 rows."""
        t = {key: value.cpu() for key, value in self.sums.items()}
        n = t["n"]
        assert self.sequences is not None
        sequences = self.sequences.cpu()
        mean, error = ratio(t | {"sequences": sequences[:, None]})
        filled, reached = _last(t["histogram"]), _last(t["strata_rows"])
        strata_rows = t["strata_rows"][..., :reached]
        return {
            "modules": self.modules,
            "entropy": mean,
            "standard_error": error,
            "normalized": t["share"] / t["choice"],
            "bound": t["bound"] / n,
            "row_variance": (t["squares"] / n - mean.square()).clamp_min(0),
            "row_minimum": t["minimum"],
            "row_maximum": t["maximum"],
            "rows": t["rows"],
            "masked_rows": t["masked_rows"],
            "nonfinite_rows": t["nonfinite_rows"],
            "histogram": t["histogram"][..., :filled],
            "strata_entropy": t["strata_s"][..., :reached] / strata_rows,
            "strata_bound": t["strata_bound"][..., :reached] / strata_rows,
            "strata_rows": strata_rows,
            "replicates": (t["replicates_s"] / t["replicates_n"]).permute(2, 0, 1).contiguous(),
            **{key: torch.cat(parts) for key, parts in self.first.items()},
            "sequences": int(sequences.max()),
            "context_length": int(t["length"].max()),
        }


def _last(counts: Tensor) -> int:
    """How many bins up to the last one that holds anything."""
    filled = counts.sum((0, 1)).nonzero()
    return int(filled.max()) + 1 if len(filled) else 0


def _difference(before: Sequence[str], now: Sequence[str]) -> str:
    """Which modules two batches called differently often; `name#0` and `name#1` are calls of one module."""
    often, again = (Counter(name.split("#")[0] for name in names) for names in (before, now))
    names = [name for name in often | again if often[name] != again[name]] or list(now)
    first = names[0]
    more = f", {len(names) - 1} more" if names[1:] else ""
    return f"{first} ({often[first]} times, then {again[first]}){more}"
