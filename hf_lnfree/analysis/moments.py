r"""Sums over rows of features, added up batch by batch, from which every metric of `spectra` and `alignment` follows.

The rows of a text depend on each other, so intervals come from texts: each is dealt to one of K groups, the sums are
kept by group, and a metric is computed with all groups, then with each left out in turn (delete-a-group jackknife).
Shapes: N rows (tokens), D features, E other features, K groups.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import DataError


@dataclass
class Sums:
    """Tensors of sums by group, which stands first: K groups in each."""

    def __add__(self, other: Self) -> Self:
        return type(self)(*(one + two for one, two in zip(vars(self).values(), vars(other).values(), strict=True)))

    def whole(self) -> Self:
        """All groups as one."""
        return type(self)(*(value.sum(0, keepdim=True, dtype=torch.float64) for value in vars(self).values()))

    def without(self, group: int) -> Self:
        """All groups but one, as one."""
        parts = vars(self).values()
        return type(self)(*(part.sum(0, keepdim=True, dtype=torch.float64) - part[group] for part in parts))


@dataclass
class Moments(Sums):
    r"""
    Sums over the rows $x$ of a matrix, float64, by group. They take $O(K D^2)$ whatever the number of rows.

    Args:
        count: [K] rows.
        total: [K, D] $\sum x$.
        gram: [K, D, D] $\sum x x^\top$.
        fourth: [K] $\sum \|x\|^4$.
        cubic: [K, D] $\sum x \|x\|^2$.
    """

    count: Tensor
    total: Tensor
    gram: Tensor
    fourth: Tensor
    cubic: Tensor

    @classmethod
    def empty(cls, width: int, groups: int = 1, device: torch.device | str = "cpu") -> Self:
        """Of no rows."""
        shapes = ((), (width,), (width, width), (), (width,))
        sums = (torch.zeros(groups, *shape, dtype=torch.float64, device=device) for shape in shapes)
        return cls(*sums)

    @property
    def groups(self) -> int:
        return len(self.count)

    def add(self, rows: Tensor, group: int = 0) -> None:
        """
        Args:
            rows: [N, D] of one group.

        Raises:
            DataError: rows of another width.
        """
        if rows.shape[-1] != self.total.shape[-1]:
            raise DataError(f"Rows of width {rows.shape[-1]} cannot be added to sums of width {self.total.shape[-1]}.")
        x = rows.detach().to(self.total)
        squares = x.square().sum(-1)
        self.count[group] += len(x)
        self.total[group] += x.sum(0)
        self.gram[group].addmm_(x.mT, x)
        self.fourth[group] += squares.square().sum()
        self.cubic[group] += x.mT @ squares


@dataclass
class CrossMoments(Sums):
    r"""
    Sums over pairs of rows $x$, $y$ of the same tokens, float64, by group.

    Args:
        product: [K, D, E] $\sum x y^\top$.
        left: [K, D] $\sum x \|y\|^2$.
        right: [K, E] $\sum \|x\|^2 y$.
        both: [K] $\sum \|x\|^2 \|y\|^2$.
    """

    product: Tensor
    left: Tensor
    right: Tensor
    both: Tensor

    @classmethod
    def empty(cls, width: int, other: int, groups: int = 1, device: torch.device | str = "cpu") -> Self:
        """Of no rows."""
        shapes = ((width, other), (width,), (other,), ())
        return cls(*(torch.zeros(groups, *shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, rows: Tensor, others: Tensor, group: int = 0) -> None:
        """
        Args:
            rows, others: [N, D] and [N, E] of one group.
        """
        x, y = rows.detach().to(self.product), others.detach().to(self.product)
        x2, y2 = x.square().sum(-1), y.square().sum(-1)
        self.product[group].addmm_(x.mT, y)
        self.left[group] += x.mT @ y2
        self.right[group] += y.mT @ x2
        self.both[group] += x2 @ y2


def jackknife(metric: Callable[..., Tensor], *sums: Any) -> tuple[Tensor, Tensor]:
    r"""
    A metric of all rows, and its standard error over groups:
    $\sqrt{\frac{K-1}{K} \sum_k (\theta_{(k)} - \bar\theta)^2}$ with $\theta_{(k)}$ that without group $k$.

    Args:
        metric: of sums that are one group each.
        sums: with the same K groups, the first of which counts rows; groups without any are left out.

    Returns:
        The value and the standard error; the error of fewer than two groups is NaN.
    """
    value = metric(*(part.whole() for part in sums))
    return value, standard_error(left_out(metric, sums[0].count, *sums))


def left_out(metric: Callable[..., Tensor], count: Tensor, *sums: Any) -> Tensor:
    """[K, ...] a metric without each group in turn; NaN for groups without rows, by `count` [K, ...]."""
    filled = count.flatten(1).sum(1) > 0 if count.dim() > 1 else count > 0
    found = {group: metric(*(part.without(group) for part in sums)) for group in filled.nonzero().flatten().tolist()}
    if not found:
        return torch.full((len(filled),), torch.nan)
    nothing = torch.full_like(next(iter(found.values())), torch.nan)
    return torch.stack([found.get(group, nothing) for group in range(len(filled))])


def standard_error(left: Tensor) -> Tensor:
    """Of a metric [K, ...] without each group in turn; groups where it is NaN are left out, and two are needed."""
    known = ~left.isnan()
    groups = known.sum(0)
    mean = left.nan_to_num().sum(0) / groups
    squares = (left - mean).square().where(known, 0.0).sum(0)
    return ((groups - 1) / groups * squares).sqrt().where(groups > 1, torch.nan)
