"""Pictures of entropy reports and of training, in the style that the pictures of single reports have.

`analysis.drawing` draws layers x heads; the rest is here.
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator
from torch import Tensor

from ..analysis import drawing
from ..analysis.comparison import EntropyComparison
from ..analysis.drawing import LARGEST_ANNOTATED, PALETTE, STYLE, panels
from ..analysis.entropy import MAXIMA, Maximum
from ..analysis.entropy_report import EntropyReport
from ..errors import DataError
from ..tables import shorten
from ..training.log import Curve, Entry, layer_panels
from .pointer import Says, change_texts, head_texts, with_titles

MAXIMUM_LABELS = {"observed": "largest observed", "causal": "bound on the data", "log_length": "ln(context length)"}
SHOWN_LAYERS = 3  # in a legend


class PlainNumbers(LogFormatter):
    """Labels those ticks of a logarithmic axis that matplotlib labels, with plain numbers."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def plain_ticks(axis: Axis) -> None:
    """Of an axis that was made logarithmic: matplotlib writes its labels in TeX, which `STYLE` does not read."""
    base = axis.get_transform().base  # type: ignore[attr-defined]
    if isinstance(axis.get_major_formatter(), LogFormatter):
        axis.set_major_formatter(PlainNumbers(base))
    if isinstance(axis.get_minor_formatter(), LogFormatter):
        axis.set_minor_formatter(PlainNumbers(base))


def heatmaps(reports: Sequence[EntropyReport], columns: int = 2, maximum: Maximum | float = "causal") -> Figure:
    """
    Mean entropy of every head in nats, side by side on one colour scale from 0 to the largest bound. Under the pointer
    each says its share of the maximum and what that makes it.
    """
    first, *others = reports
    figure = first.plot(*others, columns=columns)
    for ax, report in zip(figure.axes, reports, strict=False):  # the last is the scale's
        ax.add_artist(Says(head_texts(report, maximum)))
    return figure


def difference_heatmaps(comparisons: Sequence[EntropyComparison], columns: int = 2) -> Figure:
    """How far each head's mean entropy moved, in nats; what moved beyond chance is framed."""
    first, *others = comparisons
    figure = first.plot(*others, columns=columns)
    for ax, comparison in zip(figure.axes, comparisons, strict=False):
        ax.add_artist(Says(change_texts(comparison)))
    return figure


def attribution_grid(values: Tensor, columns: Sequence[str], name: str) -> Figure:
    """What every head, MLP and bias adds to a logit, layers from top to bottom; each says its own under the pointer."""
    figure = drawing.attribution_grid(values, columns, name)
    texts = {
        (layer, column): f"layer {layer}, {component(columns[column])}: {values[layer, column]:+.4f}"
        for layer, column in (~values.isnan()).nonzero().tolist()
    }
    figure.axes[0].add_artist(Says(texts))
    return figure


def component(column: str) -> str:
    """A column of an attribution grid in words: "head 3", "mlp", "biases"."""
    return f"head {column}" if column.isdigit() else column


def bucket_bars(reports: Sequence[EntropyReport], maxima: Sequence[Maximum | float] = MAXIMA) -> Figure:
    """Shares of heads by quarter of each maximum, with 95 % bootstrap intervals."""
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(len(maxima), 3, 3.3 if len(maxima) > 1 else 5.0, 2.9, sharey=True)
        width = 0.8 / len(reports)
        for ax, maximum in zip(axes, maxima, strict=True):
            for index, report in enumerate(reports):
                shares = 100 * report.buckets(maximum)
                intervals = 100 * report.bucket_intervals(maximum)
                errors = (intervals - shares[:, None]).abs().nan_to_num().T.numpy()
                places = [quarter + (index - (len(reports) - 1) / 2) * width for quarter in range(4)]
                ax.bar(
                    places,
                    shares.tolist(),
                    width * 0.92,
                    yerr=errors,
                    label=shorten(report.name),
                    error_kw={"linewidth": 0.8},
                )
            ax.set(xticks=range(4), xticklabels=["≤ ¼", "≤ ½", "≤ ¾", "> ¾"], ylim=(0, 105))
            nats = maximum if isinstance(maximum, str) else f"{maximum:g} nats"
            ax.set_xlabel(f"mean entropy / {MAXIMUM_LABELS.get(nats, nats)}")
        axes[0].set_ylabel("heads (%)")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
        return figure


def distributions(reports: Sequence[EntropyReport], columns: int = 2) -> Figure:
    """Entropies of single queries in each layer: median, middle half, and 5 % to 95 %; dotted, ln(context length)."""
    with matplotlib.rc_context(STYLE):
        height = max(2.2, 0.2 * max(len(r.modules) for r in reports) + 0.9)
        figure, axes = panels(len(reports), columns, 3.6, height, sharex=True)
        for report, ax in zip(reports, axes, strict=True):
            if report.histogram.shape[-1]:
                low, quarter, middle, three, high = report.quantiles(
                    [0.05, 0.25, 0.5, 0.75, 0.95], by_layer=True
                ).tolist()
                layers = range(len(report.modules))
                ax.hlines(layers, low, high, color=PALETTE[0], linewidth=1)
                ax.hlines(layers, quarter, three, color=PALETTE[0], linewidth=4.5)
                ax.plot(middle, layers, "o", color="white", markeredgecolor="black", markersize=4)
            ax.axvline(math.log(report.context_length), color="grey", linewidth=0.8, linestyle=":")
            ax.set(xlabel="entropy of a query (nats)", ylabel="layer")
            ax.set_title(report.title, fontsize=10)
            ax.invert_yaxis()
            ax.set_xlim(left=0)
            ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        return figure


def position_curves(reports: Sequence[EntropyReport], columns: int = 2) -> Figure:
    """Mean entropy of each layer by position in the sequence, early layers dark, late ones light; dotted, the bound of
    each kind of layer: one with a window has a lower one."""
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(len(reports), columns, 3.6, 2.7, sharex=True, sharey=True)
        most = max(len(report.modules) for report in reports)
        for report, ax in zip(reports, axes, strict=True):
            rows = report.strata_rows.sum((0, 1)) > 0
            middles = [(2 ** (s - 1) + 1 + 2**s) / 2 if s else 1.0 for s in rows.nonzero().flatten().tolist()]
            for layer, heads in enumerate(report.heads):
                values = report.strata_entropy[layer, heads][:, rows].mean(0).tolist()
                ax.plot(middles, values, "o-", markersize=2.5, **layer_style(layer, most))
            if middles:
                kinds = bounds_by_position(report, rows)
                for bound, layers in kinds.items():
                    label = "maximum" if len(kinds) == 1 else f"maximum, {listed(layers)}"
                    ax.plot(middles, bound, color="grey", linewidth=0.9, linestyle=":", label=label)
                ax.set_xscale("log", base=2)
                plain_ticks(ax.xaxis)
                ax.legend(frameon=False, fontsize=7)
            ax.set(xlabel="position (tokens)", ylabel="mean entropy (nats)")
            ax.set_title(report.title, fontsize=10)
        layer_bar(figure, axes, most)
        return figure


def bounds_by_position(report: EntropyReport, rows: Tensor) -> dict[tuple[float, ...], list[int]]:
    """The largest mean entropies at the positions that have `rows`, with the layers that have them."""
    kinds: dict[tuple[float, ...], list[int]] = {}
    for layer, heads in enumerate(report.heads):
        if heads.any():
            bound = report.strata_bound[layer, heads][:, rows].nanmean(0)
            kinds.setdefault(tuple(round(value, 4) for value in bound.tolist()), []).append(layer)
    return kinds


def listed(layers: Sequence[int]) -> str:
    """ "layer 2", "layers 0, 3" or "layers 1, 2, 4, ..."."""
    shown = ", ".join(map(str, layers[:SHOWN_LAYERS])) + (", ..." if len(layers) > SHOWN_LAYERS else "")
    return f"layer{'s' * (len(layers) > 1)} {shown}"


def layer_style(layer: int, layers: int) -> dict[str, Any]:
    """Dark to light by depth, as `layer_bar` tells."""
    return {"color": matplotlib.colormaps["viridis"](layer / max(1, layers - 1) * 0.9), "linewidth": 1.2}


def layer_bar(figure: Figure, axes: Sequence[Axes], layers: int) -> None:
    """Which colour is which layer, the first on top as in heat maps; nothing for a single line."""
    if layers < 2:
        return
    colours = ListedColormap([layer_style(layer, layers)["color"] for layer in range(layers)])
    norm = BoundaryNorm([layer - 0.5 for layer in range(layers + 1)], layers)
    ticks: Any = range(layers) if layers <= LARGEST_ANNOTATED else MaxNLocator(integer=True)
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, label="layer", ticks=ticks, aspect=30)
    bar.ax.tick_params(length=0, which="both")
    bar.ax.invert_yaxis()


def layer_dynamics(
    rows: Mapping[str, Sequence[Curve]], ylabel: str, bounds: Mapping[str, float] | None = None
) -> Figure:
    """
    For each panel one curve a layer over training steps, early layers dark and late layers light.

    Args:
        bounds: of a panel, what is drawn as its largest possible value.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(len(rows), 2, 4.6, 2.7, sharex=True, sharey=True)
        most = max(map(len, rows.values()))
        for ax, (name, layers) in zip(axes, rows.items(), strict=True):
            for layer, points in enumerate(layers):
                ax.plot(*zip(*points, strict=True), **layer_style(layer, most))
            if (bound := (bounds or {}).get(name)) is not None:
                ax.axhline(bound, color="grey", linewidth=0.8, linestyle=":", label="maximum")
                ax.legend(frameon=False, fontsize=7)
            ax.set(title=name, xlabel="step", ylabel=ylabel)
        layer_bar(figure, axes, most)
        return figure


def entropy_dynamics(
    histories: Mapping[str, Sequence[Entry]], bounds: Mapping[str, Mapping[str, float]] | None = None
) -> Figure:
    """
    Mean entropy of each layer over training, from the `log_history` (or log.jsonl) of runs with an attention probe.

    Args:
        bounds: of a history, by part of the model, the largest possible entropy.

    Raises:
        DataError: a history without `entropy/layer_00`.
    """
    tops: dict[str, float] = {}
    rows: dict[str, Sequence[Curve]] = {}
    for name, history in histories.items():
        if not (found := layer_panels(name, history, "entropy")):
            raise DataError(f"The log of {name} holds no entropy/layer_00: it was trained without an attention probe.")
        rows |= found
        of_parts = (bounds or {}).get(name, {})
        tops |= {f"{name}, {part}" if part else name: bound for part, bound in of_parts.items()}
    return layer_dynamics(rows, "mean entropy (nats)", tops)


def curves(lines: Mapping[str, Curve], xlabel: str, ylabel: str, log: bool = False) -> Figure:
    """Named curves of (x, y); points that are not finite leave a gap."""
    with matplotlib.rc_context(STYLE):
        figure, (ax,) = panels(1, 1, 6.4, 3.4)
        for name, points in lines.items():
            ax.plot(*zip(*points, strict=True), label=name, linewidth=1.4) if points else None
        ax.set(xlabel=xlabel, ylabel=ylabel)
        if log:
            ax.set_yscale("log")
            plain_ticks(ax.yaxis)
        ax.grid(alpha=0.25, linewidth=0.5)
        ax.legend(frameon=False, fontsize=8)
        return figure


def save(figure: Figure, path: str | Path, suffixes: Sequence[str] = (".svg", ".png")) -> None:
    """The figure as `path` with each suffix; a picture of the same numbers is the same file."""
    for suffix in suffixes:
        file = Path(path).with_suffix(suffix)
        if suffix == ".svg":
            file.write_text(svg_document(figure), encoding="utf-8")
        else:
            with matplotlib.rc_context(STYLE):
                figure.savefig(file, dpi=150)


def svg_document(figure: Figure) -> str:
    """The figure as an SVG file, with what its cells say under the pointer."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return with_titles(buffer.getvalue())


def to_svg(figure: Figure) -> str:
    """The figure as an `<svg>` element to stand inside a page."""
    svg = svg_document(figure)
    return svg[svg.index("<svg") :]
