"""Which attention modules of a model belong together, and what bounds their entropies."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

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


def part_names(modules: Sequence[str]) -> list[str]:
    """
    Of each module, the part that it belongs to: "encoder", "decoder" or "cross", else what its part shares; "" where
    there is one part only.
    """
    parts = parts_of(modules)
    short = {part: short_name(part) for part in parts}
    if len(set(short.values())) < len(parts):
        short = {part: part for part in parts}
    names = [""] * len(modules)
    for part, indices in parts.items():
        for index in indices:
            names[index] = short[part] if len(parts) > 1 else ""
    return names


def short_name(part: str) -> str:
    """Of an encoder, a decoder or the attentions of the one to the other."""
    if CROSS.search(part):
        return "cross"
    return next((side for side in ("encoder", "decoder") if part.startswith(side) or f".{side}." in part), part)


def places(modules: Sequence[str]) -> list[str]:
    """What logs call the modules: "layer_00", "layer_01", ..., and "encoder/layer_00" where there are several parts."""
    return [f"{part}{'/' if part else ''}layer_{number:02d}" for part, number in numbered(modules)]


def layer_names(modules: Sequence[str]) -> list[str]:
    """What people read: "0", "1", ..., and "encoder 0" where there are several parts."""
    return [f"{part}{' ' if part else ''}{number}" for part, number in numbered(modules)]


def numbered(modules: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Of each module its part and its number in it."""
    counts = Counter[str]()
    for part in part_names(modules):
        yield part, counts[part]
        counts[part] += 1


def name_of_maximum(maximum: Maximum | float, kinds: Sequence[str]) -> str:
    """Of the bound of the data, which kinds of attention it is one for; every other maximum names itself."""
    return " and ".join(dict.fromkeys(kinds)) if maximum == "causal" and kinds else str(maximum)
