"""Every head over training, as what the script of a page draws: maps at each probe, and the curve of a head."""

import math
import string
from collections.abc import Mapping, Sequence

from ..studies.cells import Cell
from ..tables import shorten
from ..training.recorder import HEADS
from .answer import look
from .report import Timeline

DIGITS = string.digits + string.ascii_lowercase
DASHES = {"-": "", "--": "6 3", ":": "2 3"}  # matplotlib's line styles in SVG


def head_timeline(cells: Mapping[str, Cell], seed: int) -> Timeline | None:
    """The heads of one seed's cells, by variant; None where fewer than two steps were probed."""
    recorded = {
        name: {entry["step"]: entry[HEADS] for entry in cell.log if HEADS in entry} for name, cell in cells.items()
    }
    probed = {name: probes for name, probes in recorded.items() if probes}
    steps = sorted({step for probes in probed.values() for step in probes})
    if len(steps) < 2:
        return None
    reports = [cell.entropy for name in probed if (cell := cells[name]).entropy is not None]
    bound = max((float(report.bound[report.heads].max()) for report in reports), default=None)
    variants = [
        {
            "name": shorten(name, 32),
            "colour": (style := look(name, index))["color"],
            "dash": DASHES[style["linestyle"]],
            "probes": [list(map(packed, probes[step])) if step in probes else None for step in steps],
        }
        for index, (name, probes) in enumerate(probed.items())
    ]
    caption = (
        f"Mean entropy of every head on held-out windows, seed {seed}, at each step that was probed. Choose a head "
        "with the pointer or the arrow keys to see its curve."
    )
    a_step = tokens_a_step(cells)
    names = next((r.layer_names for r in reports if len(r.parts) > 1), None)
    drawn = {"steps": steps, "tokensAStep": a_step, "bound": bound, "layers": names, "variants": variants}
    return Timeline(drawn, caption)


def packed(layer: Sequence[float]) -> str:
    """
    The entropies of a layer's heads in hundredths of a nat, two digits of base 36 each: a page has 100,000 of them.

    "--" stands for what is not finite. Two digits reach 12.95 nats, the logarithm of 420,000 keys.
    """
    return "".join(pair(round(100 * value)) if math.isfinite(value) else "--" for value in layer)


def pair(number: int) -> str:
    """0 to 1295 as two digits of base 36."""
    assert 0 <= number < len(DIGITS) ** 2
    return DIGITS[number // len(DIGITS)] + DIGITS[number % len(DIGITS)]


def tokens_a_step(cells: Mapping[str, Cell]) -> float | None:
    """What every cell was trained on in a step; None where they differ, or no step was taken."""
    found = {cell.results.tokens / cell.results.steps for cell in cells.values() if cell.results and cell.results.steps}
    return found.pop() if len(found) == 1 else None
