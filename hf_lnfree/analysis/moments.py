r"""Sums over rows of features, added up batch by batch, from which every metric of `spectra` and `alignment` follows.

The rows of a text depend on each other, so intervals come from texts: each is dealt to one of K groups, the sums are
kept by group, and a metric is computed with all groups, then with each left out in turn (delete-a-group jackknife).
Shapes: N rows (tokens), D features, E other features, K groups.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from ..errors import DataError


@dataclass
class Moments:
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

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def whole(self) -> "Moments":
        """All groups as one."""
        return Moments(*(getattr(self, f.name).sum(0, keepdim=True) for f in fields(self)))

    def without(self, group: int) -> "Moments":
        """All groups but one, as one."""
        return Moments(*(value.sum(0, keepdim=True) - value[group : group + 1] for value in vars(self).values()))


@dataclass
class CrossMoments:
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

    def __add__(self, other: "CrossMoments") -> "CrossMoments":
        return CrossMoments(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def whole(self) -> "CrossMoments":
        """All groups as one."""
        return CrossMoments(*(value.sum(0, keepdim=True) for value in vars(self).values()))

    def without(self, group: int) -> "CrossMoments":
        """All groups but one, as one."""
        return CrossMoments(*(value.sum(0, keepdim=True) - value[group : group + 1] for value in vars(self).values()))


def jackknife(metric: Callable[..., Tensor], *sums: Moments | CrossMoments) -> tuple[Tensor, Tensor]:
    r"""
    A metric of all rows, and its standard error over groups:
    $\sqrt{\frac{K-1}{K} \sum_k (\theta_{(k)} - \bar\theta)^2}$ with $\theta_{(k)}$ that without group $k$.

    Args:
        metric: of sums that are one group each.
        sums: with the same K groups; groups without rows are left out.

    Returns:
        The value and the standard error; the error of fewer than two groups is NaN.
    """
    value = metric(*(part.whole() for part in sums))
    first = sums[0]
    filled = first.count.nonzero().flatten().tolist() if isinstance(first, Moments) else []
    if len(filled) < 2:
        return value, torch.full_like(value, torch.nan)
    left = torch.stack([metric(*(part.without(group) for part in sums)) for group in filled])
    share = (len(filled) - 1) / len(filled)
    return value, (share * (left - left.mean(0)).square().sum(0)).sqrt()
