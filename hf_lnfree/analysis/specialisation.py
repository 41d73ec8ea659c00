"""Which units fire together. One fires where its pre-activation is above 0, under ReLU and GELU alike.

The names are ours: arXiv 2410.09637 speaks of specialisation in input space and gives no formula. Shapes: N rows, D
units.
"""

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ..errors import DataError
from .moments import Sums
from .spectra import spectral_entropy

EXACT = 2**24
"""Up to here float32 counts."""


@dataclass
class SignSums(Sums):
    """
    Counts by group, in float32 to take half the memory; NaN for units that have a pre-activation which is NaN.

    Args:
        count: [K] rows.
        together: [K, D, D] in how many rows two units fire both.
    """

    count: Tensor
    together: Tensor

    @classmethod
    def empty(cls, width: int, groups: int = 1, device: torch.device | str = "cpu") -> Self:
        """Of no rows."""
        return cls(torch.zeros(groups, device=device), torch.zeros(groups, width, width, device=device))

    def add(self, pre: Tensor, group: int = 0) -> None:
        """
        Args:
            pre: [N, D] pre-activations of one group.

        Raises:
            DataError: more rows in a group than float32 can count.
        """
        if self.count[group] + len(pre) > EXACT:
            raise DataError(f"A group holds more than {EXACT} rows, which cannot be counted: take more groups.")
        fires = (pre > 0).to(self.together).masked_fill_(pre.isnan(), torch.nan)
        self.count[group] += len(pre)
        self.together[group].addmm_(fires.mT, fires)


class Firing(NamedTuple):
    r"""
    Args:
        frequency: [D] share of rows in which a unit fires.
        dead, always_on: shares of units that fire in no row, and in all.
        overlap: mean over pairs of units that fire of $|A_n \cap A_m| / |A_n \cup A_m|$, A the rows in which one fires.
        independent_overlap: the same if units fired independently, each as often as it does.
        patterns: effective number of firing patterns, 1 to min(N, D): see `effective_patterns`.
    """

    frequency: Tensor
    dead: Tensor
    always_on: Tensor
    overlap: Tensor
    independent_overlap: Tensor
    patterns: Tensor

    @property
    def specialisation(self) -> Tensor:
        """
        1 - overlap / independent_overlap: 0 where units fire independently, 1 where no two share a row, below 0 where
        they fire together more often than chance would have it.
        """
        return 1 - self.overlap / self.independent_overlap


def firing(together: Tensor, count: Tensor | float) -> Firing:
    r"""
    Args:
        together: [D, D] in how many rows two units fire both, $M^\top M$ of the binary matrix M [N, D].
        count: rows, N.
    """
    together, n = together.double(), float(count)
    if not n:
        return Firing(together.diagonal() / n, *torch.full((5,), torch.nan, dtype=torch.float64))
    each = together.diagonal()  # D
    frequency = each / n
    union = each[:, None] + each - together
    independent = frequency.outer(frequency)
    pairs = (each > 0).outer(each > 0).fill_diagonal_(False)
    none = torch.full((), torch.nan, dtype=torch.float64)
    jaccard = (together / union)[pairs].mean() if pairs.any() else none
    chance = (independent / (frequency[:, None] + frequency - independent))[pairs].mean() if pairs.any() else none
    dead, always_on = ((each == value).double().mean() for value in (0, n))
    return Firing(frequency, dead, always_on, jaccard, chance, effective_patterns(together, n))


def effective_patterns(together: Tensor, count: float) -> Tensor:
    r"""
    $\exp(-\sum_i \mu_i \ln \mu_i)$ with $\mu$ the eigenvalues of $S^\top S / (N D)$, S [N, D] being 1 where a unit
    fires and -1 where it does not: the Vendi score (arXiv 2210.02410) of the N patterns, two of which are as similar as
    their share of equal signs minus that of different ones.
    """
    each = together.diagonal()
    signs = 4 * together - 2 * (each[:, None] + each) + count  # S^T S
    if signs.isnan().any():
        return torch.full((), torch.nan, dtype=signs.dtype)
    spectrum = torch.linalg.eigvalsh(signs / (count * len(each))).clamp_min(0)
    return spectral_entropy(spectrum).exp()
