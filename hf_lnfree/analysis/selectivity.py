"""How much a unit tells classes of rows apart, from sums over the rows of each.

Every metric is of sums that are one group. Shapes: N rows, D units, C classes, K groups.
"""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from .moments import CrossMoments, Moments, Sums


@dataclass
class ClassSums(Sums):
    r"""
    Args:
        count: [K, C] rows of each class, by group.
        total: [K, C, D] $\sum r$.
        squares: [K, C, D] $\sum r^2$.
    """

    count: Tensor
    total: Tensor
    squares: Tensor

    @classmethod
    def empty(cls, classes: int, width: int, groups: int = 1, device: torch.device | str = "cpu") -> Self:
        """Of no rows."""
        shapes = ((classes,), (classes, width), (classes, width))
        return cls(*(torch.zeros(groups, *shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, rows: Tensor, labels: Tensor, group: int = 0) -> None:
        """
        Args:
            rows: [N, D] activations of one group.
            labels: [N] classes, 0 to C - 1; rows with a negative one are left out.
        """
        kept = labels >= 0
        r, labels = rows.detach()[kept].to(self.total), labels[kept]
        self.count[group].index_add_(0, labels, torch.ones_like(labels, dtype=self.count.dtype))
        self.total[group].index_add_(0, labels, r)
        self.squares[group].index_add_(0, labels, r.square())

    def wider(self, classes: int) -> "ClassSums":
        """The same with places for at least so many classes."""
        more = max(0, classes - self.count.shape[1])
        return ClassSums(
            F.pad(self.count, (0, more)), *(F.pad(value, (0, 0, 0, more)) for value in (self.total, self.squares))
        )

    def __add__(self, other: "ClassSums") -> "ClassSums":
        classes = max(self.count.shape[1], other.count.shape[1])
        one, two = self.wider(classes), other.wider(classes)
        return ClassSums(one.count + two.count, one.total + two.total, one.squares + two.squares)

    def one_hot(self, rows: Moments) -> tuple[Moments, CrossMoments]:
        """
        The sums of classes as features, 1 for the class of a row and 0 for the others, and those with `rows`, which are
        the rows of these classes and those of none. A row of no class is like no other row.
        """
        labelled = self.count.sum(-1)
        product = self.total.mT
        squares = self.squares.sum(-1)
        classes = Moments(rows.count, self.count, self.count.diag_embed(), labelled, self.count)
        return classes, CrossMoments(product, product.sum(-1), squares, squares.sum(-1))


def between_share(sums: ClassSums) -> Tensor:
    r"""
    [D] share of a unit's variance that lies between classes, $\eta^2 = Var_c(E[r \mid c]) / Var(r)$, 0 to 1 (0 for a
    unit that does not vary). Of $n$ rows that know nothing of $C$ classes it is about $(C - 1) / (n - 1)$.
    """
    count, seen = sums.count[0], sums.count[0] > 0
    n = count.sum()
    means = sums.total[0][seen] / count[seen, None]
    mean = sums.total[0].sum(0) / n
    between = (count[seen, None] * (means - mean).square()).sum(0)
    total = sums.squares[0].sum(0) - n * mean.square()
    return torch.where(total > 0, between / total, 0.0)


def class_selectivity(sums: ClassSums) -> Tensor:
    r"""
    [D] $(m_{max} - m_{rest}) / (m_{max} + m_{rest})$: the largest of the class means against the mean of the others
    (Morcos et al., ICLR 2018), 0 to 1. For activations that are never negative; NaN for a unit that is 0 everywhere.
    """
    seen = sums.count[0] > 0
    means = sums.total[0][seen] / sums.count[0][seen, None]  # C D
    if not len(means):
        return torch.full_like(sums.total[0, 0], torch.nan)
    largest = means.amax(0)
    rest = (means.sum(0) - largest) / (len(means) - 1)
    return (largest - rest) / (largest + rest)


def within_selectivity(sums: ClassSums) -> Tensor:
    r"""
    [D] how selective a unit is within a class: the mean over classes, weighted by their rows, of the sparseness
    $[1 - (\sum r / n)^2 / (\sum r^2 / n)] / (1 - 1/n)$ (Rolls and Tovee 1995) of its activations there, 0 to 1. The
    name is ours. Classes of one row, and those in which the unit is 0 everywhere, are left out; NaN where none is left.
    """
    n, total, squares = sums.count[0][:, None], sums.total[0], sums.squares[0]
    sparseness = (1 - (total / n).square() / (squares / n)) / (1 - 1 / n)
    weights = n.expand_as(sparseness).where((n > 1) & ~(squares <= 0), 0.0)
    return (sparseness.where(weights > 0, 0.0) * weights).sum(0) / weights.sum(0)
