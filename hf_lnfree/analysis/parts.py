"""Which attention modules of a model belong together, and what bounds their entropies."""

import re
from collections.abc import Sequence

from torch import Tensor

from ..attention.fused import RowEntropies
from ..choices import Maximum

CROSS = re.compile("cross|enc(oder)?_?(attn|attention|dec)|multihead_attn", re.IGNORECASE)  # names of cross-attentions


def kind_of(name: str, rows: RowEntropies, tokens: Tensor) -> str:
    """
    "causal", "bidirectional" or "cross": which keys the queries of an attention may attend to.

    Causal is a self-attention whose first token sees only itself, or, after a prefix, whose tokens each see one key
    more than the one before.

    Args:
        tokens: [B, Q] which queries are tokens.
    """
    if CROSS.search(name):
        return "cross"
    support = rows.support.amax(1).expand_as(tokens)  # B Q
    several = tokens.sum(-1) > 1
    if not several.any():
        return "causal"
    support, tokens = support[several], tokens[several]
    first = support.gather(1, tokens.int().argmax(1, keepdim=True))[:, 0]
    last = support.where(tokens, 0).amax(1)
    grows = (first == 1) & (last > 1) | (last - first == tokens.sum(-1) - 1)
    return "causal" if grows.all() else "bidirectional"


def parts_of(modules: Sequence[str]) -> dict[str, list[int]]:
    """Modules that differ in nothing but numbers, by what they share: "encoder.layers.*.self_attn"."""
    parts: dict[str, list[int]] = {}
    for index, name in enumerate(modules):
        parts.setdefault(re.sub(r"\d+", "*", name), []).append(index)
    return parts


def name_of_maximum(maximum: Maximum | float, kinds: Sequence[str]) -> str:
    """Of the bound of the data, which kinds of attention it is one for; every other maximum names itself."""
    return " and ".join(dict.fromkeys(kinds)) if maximum == "causal" and kinds else str(maximum)
