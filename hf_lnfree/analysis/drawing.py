"""Layers x heads as pictures, and what every picture of the package shares: style, panels, short names.

Tensors and texts in, a figure out: reports, comparisons and attributions draw themselves with this. It imports
matplotlib, so whatever draws imports it where it draws.
"""

import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ..tables import number

# Colours are told apart by the colour-blind: viridis and PuOr for values, Okabe and Ito's palette, its yellow darker,
# for names.
PALETTE = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999933", "#000000"]
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hf_lnfree",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # an SVG names all of them at every text
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=PALETTE),
    "text.parse_math": False,  # names of models and tokens may hold a dollar
}
LARGEST_ANNOTATED = 16  # heads in a row
NOTEBOOK_DPI = 100


class NotebookFigure(Figure):
    """A figure that a notebook shows as it is: without pyplot, IPython has no picture of a plain one."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            self.savefig(buffer, format="png", dpi=NOTEBOOK_DPI)
        return buffer.getvalue()


class Grid(NamedTuple):
    """One panel of layers x heads."""

    title: str
    values: Tensor
    """[L, H]"""
    shown: Tensor
    """[L, H] bool; the others stay white."""
    framed: Tensor | None = None
    """[L, H] bool"""
    rows: Sequence[str] | None = None
    """What the layers are called; their numbers by default."""


def panels(count: int, columns: int, width: float, height: float, **options: Any) -> tuple[NotebookFigure, list[Axes]]:
    """A figure with `count` axes, `width` x `height` inches each; what the last row does not need is left blank."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = NotebookFigure(figsize=(columns * width, rows * height), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for ax in axes[count:]:
        ax.axis("off")
    for ax in axes[:count]:
        ax.tick_params(labelbottom=True)  # also where axes are shared and no panel stands below
    return figure, axes[:count]


def heatmaps(
    grids: Sequence[Grid], cmap: str, low: float, high: float, form: str, label: str, columns: int = 2
) -> NotebookFigure:
    """Grids side by side on one colour scale from `low` to `high`, numbers in `form`; `label` is the scale's."""
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(len(grids), columns, *grid_size(grids))
        for grid, ax in zip(grids, axes, strict=True):
            image = cells(ax, grid.values, grid.shown, cmap, low, high, form)
            if grid.rows is not None:
                ax.set(ylabel="", yticks=range(len(grid.rows)), yticklabels=grid.rows)
            for layer, head in [] if grid.framed is None else grid.framed.nonzero().tolist():
                frame = Rectangle((head - 0.46, layer - 0.44), 0.92, 0.88, fill=False, linewidth=0.8)
                ax.add_patch(frame)
            ax.set_title(grid.title, fontsize=10)
        figure.colorbar(image, ax=axes, label=label, shrink=0.8)
        return figure


def attribution_grid(values: Tensor, columns: Sequence[str], name: str) -> NotebookFigure:
    """What every head, MLP and bias adds to a logit, layers from top to bottom."""
    with matplotlib.rc_context(STYLE):
        figure, (ax,) = panels(1, 1, max(3.6, 0.5 * len(columns) + 1.4), max(2.6, 0.34 * len(values) + 1.0))
        largest = float(values.abs().nan_to_num().max()) or 1.0
        image = cells(ax, values, ~values.isnan(), "PuOr", -largest, largest, "+.2f")
        ax.set(xlabel="head, and the rest of the layer", xticks=range(len(columns)), xticklabels=columns, title=name)
        figure.colorbar(image, ax=ax, label="added to the logit", shrink=0.8)
        return figure


def cells(ax: Axes, values: Tensor, shown: Tensor, cmap: str, low: float, high: float, form: str) -> Any:
    """Layers x heads as an annotated image; heads that are not `shown` stay white."""
    layers, heads = values.shape
    colours = matplotlib.colormaps[cmap].with_extremes(bad="white")
    image = ax.imshow(values.where(shown, math.nan).numpy(), cmap=colours, vmin=low, vmax=high, aspect="auto")
    for layer, head in shown.nonzero().tolist() if heads <= LARGEST_ANNOTATED else ():
        value = float(values[layer, head])
        r, g, b = to_rgb(colours((value - low) / (high - low))) if math.isfinite(value) else (1, 1, 1)
        color = "black" if 0.3 * r + 0.6 * g + 0.1 * b > 0.45 else "white"
        text = number(value, form).replace(" ", "\n")  # two words that are not finite fit on two lines
        ax.text(head, layer, text, ha="center", va="center", fontsize=6.5, color=color)
    every = 1 if max(layers, heads) <= LARGEST_ANNOTATED else 4
    ax.set(xlabel="head", ylabel="layer", xticks=range(0, heads, every), yticks=range(0, layers, every))
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return image


def grid_size(grids: Sequence[Grid]) -> tuple[float, float]:
    """Width and height of a panel that keeps its numbers and its title legible."""
    layers, heads = (max(grid.values.shape[i] for grid in grids) for i in (0, 1))
    width, height = (0.42 * heads, 0.32 * layers) if heads <= LARGEST_ANNOTATED else (0.18 * heads, 0.18 * layers)
    longest = 0.085 * max(len(line) for grid in grids for line in grid.title.split("\n"))  # at font size 10
    return max(2.6, longest, width + 1.2), max(2.8, height + 0.9)  # room for the label of the colour bar
