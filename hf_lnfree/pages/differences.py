"""Curves that lie on each other, and beside them how far each is from the first."""

from collections.abc import Mapping

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..training.log import Curve
from .plots import STYLE, panels, shorten


def curves_and_differences(lines: Mapping[str, Curve], xlabel: str, ylabel: str) -> Figure:
    """
    Named curves of (x, y); on the right each minus the first, where both have a point. Points that are not finite leave
    a gap. One curve has nothing on its right.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(2 if len(lines) > 1 else 1, 2, 4.6, 3.0)
        draw(axes[0], lines, xlabel, ylabel)
        axes[0].legend(frameon=False, fontsize=8)
        if len(lines) > 1:
            first = next(iter(lines))
            draw(axes[1], minus_first(lines), xlabel, f"{ylabel}, minus {shorten(first)}'s")
        return figure


def minus_first(lines: Mapping[str, Curve]) -> dict[str, Curve]:
    """Each curve minus the first at the x that both have."""
    base = dict(next(iter(lines.values())))
    return {name: [(x, y - base[x]) for x, y in points if x in base] for name, points in lines.items()}


def draw(ax: Axes, lines: Mapping[str, Curve], xlabel: str, ylabel: str) -> None:
    """Every curve; those that have no points keep the colours of the others in step."""
    for name, points in lines.items():
        xs, ys = zip(*points, strict=True) if points else ((), ())
        ax.plot(xs, ys, label=name, linewidth=1.4, marker="o" if len(points) == 1 else None)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(alpha=0.25, linewidth=0.5)
