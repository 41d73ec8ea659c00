"""How much a unit tells classes of rows apart, from sums over the rows of each.

Shapes: N rows, D units, C classes.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass
class ClassSums:
    r"""
    Args:
        count: [C] rows of each class.
        total: [C, D] $\sum r$.
        squares: [C, D] $\sum r^2$.
    """

    count: Tensor
    total: Tensor
    squares: Tensor

    @classmethod
    def empty(cls, classes: int, width: int, device: torch.device | str = "cpu") -> Self:
        """Of no rows."""
        shapes = ((classes,), (classes, width), (classes, width))
        return cls(*(torch.zeros(*shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, rows: Tensor, labels: Tensor) -> None:
        """
        Args:
            rows: [N, D] activations.
            labels: [N] classes, 0 to C - 1; rows with a negative one are left out.
        """
        kept = labels >= 0
        r, labels = rows.detach()[kept].to(self.total), labels[kept]
        self.count.index_add_(0, labels, torch.ones_like(labels, dtype=self.count.dtype))
        self.total.index_add_(0, labels, r)
        self.squares.index_add_(0, labels, r.square())

    def __add__(self, other: "ClassSums") -> "ClassSums":
        return ClassSums(self.count + other.count, self.total + other.total, self.squares + other.squares)


def between_share(sums: ClassSums) -> Tensor:
    r"""
    [D] share of a unit's variance that lies between classes, $\eta^2 = Var_c(E[r \mid c]) / Var(r)$, 0 to 1 (0 for a
    unit that does not vary). Of $n$ rows that know nothing of $C$ classes it is about $(C - 1) / (n - 1)$.
    """
    n, seen = sums.count.sum(), sums.count > 0
    means = sums.total[seen] / sums.count[seen, None]
    mean = sums.total.sum(0) / n
    between = (sums.count[seen, None] * (means - mean).square()).sum(0)
    total = sums.squares.sum(0) - n * mean.square()
    return torch.where(total > 0, between / total, 0.0)


def class_selectivity(sums: ClassSums) -> Tensor:
    r"""
    [D] $(m_{max} - m_{rest}) / (m_{max} + m_{rest})$: the largest of the class means against the mean of the others
    (Morcos et al., ICLR 2018), 0 to 1. For activations that are never negative; NaN for a unit that is 0 everywhere.
    """
    seen = sums.count > 0
    means = sums.total[seen] / sums.count[seen, None]  # C D
    largest = means.amax(0)
    rest = (means.sum(0) - largest) / (len(means) - 1)
    return (largest - rest) / (largest + rest)


def within_selectivity(sums: ClassSums) -> Tensor:
    r"""
    [D] how selective a unit is within a class: the mean over classes, weighted by their rows, of the sparseness
    $[1 - (\sum r / n)^2 / (\sum r^2 / n)] / (1 - 1/n)$ (Rolls and Tovee 1995) of its activations there, 0 to 1. The
    name is ours. Classes of one row, and those in which the unit is 0 everywhere, are left out; NaN where none is left.
    """
    n = sums.count[:, None]
    sparseness = (1 - (sums.total / n).square() / (sums.squares / n)) / (1 - 1 / n)
    weights = n.expand_as(sparseness).where((n > 1) & (sums.squares > 0), 0.0)
    return (sparseness.where(weights > 0, 0.0) * weights).sum(0) / weights.sum(0)
