"""Means over rows whose sequences, and not rows, are independent: ratios of sums over sequences."""

import math

from torch import Tensor


def cluster_sums(s: Tensor, n: Tensor) -> dict[str, Tensor]:
    """
    What `ratio` needs of each batch, and can be added up over batches.

    Args:
        s, n: [X, B, H] of each sequence the sum over its rows, and how many they are.
    """
    return {
        "s": s.sum(1),
        "n": n.sum(1),
        "ss": s.square().sum(1),
        "sn": (s * n).sum(1),
        "nn": n.square().sum(1),
    }


def ratio(t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """
    The mean over rows and its standard error, sequences being independent.

    Var of a ratio of sums over clusters: sum_b (s_b - mean n_b)^2 / n^2, with the small-sample factor B / (B - 1).

    Args:
        t: sums over sequences of s, n, and of ss, sn and nn; how many sequences there were.
    """
    mean = t["s"] / t["n"]
    residual = (t["ss"] - 2 * mean * t["sn"] + mean.square() * t["nn"]).clamp_min(0)
    sequences = t["sequences"].to(mean.dtype)
    factor = (sequences / (sequences - 1)).where(sequences > 1, math.nan)
    return mean, (factor * residual).sqrt() / t["n"]
