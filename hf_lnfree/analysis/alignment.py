r"""How alike two sets of features see the same rows: centred kernel alignment (CKA), without the bias of few rows.

With linear kernels $K = X X^\top$, $L = Y Y^\top$ whose diagonals are left out, HSIC is estimated by (Song et al. 2012)

$$\frac{1}{n(n-3)} \left[ \mathrm{tr}(K L) + \frac{1^\top K 1 \, 1^\top L 1}{(n-1)(n-2)}
- \frac{2}{n-2} 1^\top K L 1 \right]$$

and $CKA = HSIC(K, L) / \sqrt{HSIC(K, K) HSIC(L, L)}$. Every term follows from sums over rows. Shapes as in `moments`.
"""

import torch
from torch import Tensor

from .moments import CrossMoments, Moments


def as_cross(sums: Moments) -> CrossMoments:
    """The sums of a set of features with itself."""
    return CrossMoments(sums.gram, sums.cubic, sums.cubic, sums.fourth)


def hsic(one: Moments, other: Moments, cross: CrossMoments) -> Tensor:
    """
    The unbiased estimate, from sums of one group; it may be negative.

    Returns:
        A number; NaN for fewer than four rows.
    """
    n, s, t = float(one.count[0]), one.total[0], other.total[0]
    if n < 4:
        return torch.full((), torch.nan, dtype=torch.float64)
    product = cross.product[0]
    of_one, of_other = (part.total[0].square().sum() - part.gram[0].trace() for part in (one, other))
    traces = product.square().sum() - cross.both[0]
    rows = s @ product @ t - s @ cross.left[0] - t @ cross.right[0] + cross.both[0]
    return (traces + of_one * of_other / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)) / (n * (n - 3))


def alignment(one: Moments, other: Moments, cross: CrossMoments) -> Tensor:
    """Debiased CKA of two sets of features, at most about 1; near 0, and at times below it, for unrelated ones."""
    between = hsic(one, other, cross)
    return between / (hsic(one, one, as_cross(one)) * hsic(other, other, as_cross(other))).sqrt()
