"""Attention entropy as pure tensor functions: entropies, their maxima, quarter buckets, overload and collapse.

Shapes: B batch, H heads, Q queries, K keys, L layers. Entropies are in nats.
"""

import math

import torch
from torch import Tensor

from ..choices import MAXIMA, Maximum
from ..errors import SettingsError


def attention_entropy(probabilities: Tensor) -> Tensor:
    r"""
    Shannon entropy of each query's row of an attention map, $H_i = -\sum_j p_{ij} \ln p_{ij}$ with $0 \ln 0 = 0$
    (arXiv 2410.09637, eq. 3).

    A row that holds a NaN has entropy NaN: a diverged head must not look like a collapsed one.

    Args:
        probabilities: [..., K], each row a distribution over keys. Half precision is summed in float32.

    Returns:
        [...], nats.
    """
    if probabilities.dtype in (torch.float16, torch.bfloat16):
        probabilities = probabilities.float()
    return torch.special.entr(probabilities).sum(dim=-1)


def row_support(attention_mask: Tensor, causal: bool) -> Tensor:
    """
    How many keys each query may attend to; 0 for queries that are padding.

    Args:
        attention_mask: [B, T], 1 for tokens and 0 for padding, on either side.
        causal: whether query i sees only keys 0..i.

    Returns:
        [B, T], int64.
    """
    tokens = attention_mask.long()
    keys = tokens.cumsum(dim=-1) if causal else tokens.sum(dim=-1, keepdim=True).expand_as(tokens)
    return keys * tokens


def normalized_entropy(entropy: Tensor, support: Tensor) -> Tensor:
    r"""
    $H_i / \ln n_i$: each row's entropy as a share of the maximum over its own `support` $n_i$.

    A row with one key has no choice and no share: it gives NaN, to be left out of means.

    Args:
        entropy: [..., Q], nats.
        support: [..., Q], broadcastable, number of keys of each row.
    """
    return entropy / support.to(entropy.dtype).log()


def causal_bound(length: int) -> float:
    r"""Largest mean entropy of a causal head at context length T: $\frac{1}{T}\sum_{i=1}^{T} \ln i = \ln(T!)/T$."""
    if length < 1:
        raise SettingsError(f"length must be at least 1, got {length}.")
    return math.lgamma(length + 1) / length


def entropy_maximum(head_entropy: Tensor, maximum: Maximum | float, length: int) -> float:
    """
    The entropy that counts as 100 %.

    Args:
        head_entropy: [L, H], mean entropy of each head.
        maximum: "observed" (the largest finite entry, as the paper does), "causal" (`causal_bound(length)`),
            "log_length" (ln `length`), or a number of nats.
        length: context length T.
    """
    if isinstance(maximum, (int, float)):
        return float(maximum)
    if maximum == "observed":
        finite = head_entropy[head_entropy.isfinite()]
        return float(finite.max()) if finite.numel() else math.nan
    if maximum == "causal":
        return causal_bound(length)
    if maximum == "log_length":
        return math.log(length)
    raise SettingsError(
        f"maximum={maximum!r} is not known. Allowed: {', '.join(map(repr, MAXIMA))}, or a number of nats."
    )


def bucket_shares(head_entropy: Tensor, maximum: float | Tensor) -> Tensor:
    r"""
    Shares of heads whose mean entropy lies in each quarter of (0, `maximum`] (arXiv 2410.09637, table 2).

    Quarter k is $(k\,max/4, (k+1)\,max/4]$; the first takes 0 and the last everything above. Shares are of all heads:
    they add up to less than 1 when some heads are NaN.

    Args:
        head_entropy: [L, H], nats.
        maximum: nats, see `entropy_maximum`; or [L, H], one for each head.

    Returns:
        [4], float64.
    """
    quarter = (head_entropy.double() * 4 / maximum).ceil().sub(1).clamp(0, 3)
    return torch.stack([(quarter == k).double().mean() for k in range(4)])


def overloaded_share(head_entropy: Tensor, maximum: float | Tensor) -> float:
    """Share of heads in entropic overload: mean entropy above 3/4 of `maximum`."""
    return float(bucket_shares(head_entropy, maximum)[3])


def collapsed_share(head_entropy: Tensor, maximum: float | Tensor) -> float:
    """Share of heads in entropic collapse: mean entropy of at most 1/4 of `maximum`."""
    return float(bucket_shares(head_entropy, maximum)[0])
