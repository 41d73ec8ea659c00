"""What a cell of a picture says when the pointer rests on it: a `<title>` in the SVG, nothing in a PNG."""

import math
import re
from collections.abc import Mapping
from typing import Any

from matplotlib.artist import Artist
from matplotlib.path import Path
from matplotlib.transforms import Affine2D

from ..analysis.comparison import EntropyComparison, simultaneous
from ..analysis.entropy import Maximum
from ..analysis.entropy_report import EntropyReport
from ..tables import number

MARK = "says: "
CELL = re.compile(rf'<g id="{MARK}([^"]*)">\s*<path d="([^"]*)"[^>]*/>\s*</g>')
Texts = Mapping[tuple[int, int], str]
"""(row, column) of an image -> what its cell says."""


class Says(Artist):
    """Invisible squares over the cells of an image, each with its text."""

    def __init__(self, texts: Texts):
        super().__init__()
        self.texts = texts
        self.set_in_layout(False)
        self.set_zorder(10)  # above the numbers

    def draw(self, renderer: Any) -> None:
        context = renderer.new_gc()
        context.set_linewidth(0)
        square = Path.unit_rectangle()
        renderer.open_group("cells", gid=MARK)
        for (row, column), text in self.texts.items():
            place = Affine2D().translate(column - 0.5, row - 0.5) + self.axes.transData  # type: ignore[union-attr]
            renderer.open_group("cell", gid=MARK + text)
            renderer.draw_path(context, square, place)
            renderer.close_group("cell")
        renderer.close_group("cells")
        context.restore()


def with_titles(svg: str) -> str:
    """The SVG with a titled rectangle for each `Says` cell: matplotlib can write ids, but no titles."""

    def rectangle(found: re.Match[str]) -> str:
        text, path = found.groups()
        x, y, _, _, right, bottom, *_ = (float(value) for value in re.findall(r"-?[\d.]+", path))
        (x, right), (y, bottom) = sorted((x, right)), sorted((y, bottom))
        size = f'x="{x:.1f}" y="{y:.1f}" width="{right - x:.1f}" height="{bottom - y:.1f}"'
        return f"<rect {size}><title>{text}</title></rect>"

    return CELL.sub(rectangle, svg).replace(f'<g id="{MARK}">', '<g fill="none" pointer-events="all">')


def verdicts(report: EntropyReport, maximum: Maximum | float = "causal") -> dict[tuple[int, int], str]:
    """(layer, head) -> "overloaded", "collapsed", "not finite" or "too short", of the heads that are flagged."""
    return {(flag.layer, flag.head): flag.kind for flag in report.flags(maximum)}


def head_texts(report: EntropyReport, maximum: Maximum | float = "causal") -> Texts:
    """Of every head: "layer 2, head 5: 3.61 of 3.88 nats, 93 %, overloaded"."""
    top, kinds = report.maximum(maximum), verdicts(report, maximum)
    texts = {}
    for layer, head in report.heads.nonzero().tolist():
        mean, limit = float(report.entropy[layer, head]), float(top[layer, head])
        share = number(100 * mean / limit, ".0f") + " %" if limit > 0 and math.isfinite(mean) else ""
        parts = [f"{number(mean, '.2f')} of {limit:.2f} nats", share, kinds.get((layer, head), "")]
        texts[layer, head] = f"layer {layer}, head {head}: {', '.join(filter(None, parts))}"
    return texts


def change_texts(comparison: EntropyComparison) -> Texts:
    """Of every head: "layer 2, head 5: +0.31 ± 0.12 nats, moved"."""
    unit = "" if comparison.shares else " nats"
    heads = int(comparison.baseline.heads.sum())
    width = comparison.standard_error
    if comparison.sequences > 1:
        width = simultaneous(heads, comparison.sequences) * width
    texts = {}
    for layer, head in comparison.baseline.heads.nonzero().tolist():
        said = comparison.format(comparison.difference[layer, head], sign=True)
        if comparison.sequences > 1 and width[layer, head].isfinite():
            said += f" ± {comparison.format(width[layer, head])}"
        moved = ", moved" if comparison.moved[layer, head] else ""
        texts[layer, head] = f"layer {layer}, head {head}: {said}{unit}{moved}"
    return texts
