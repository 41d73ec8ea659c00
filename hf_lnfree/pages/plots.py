"""Pictures of entropy reports and of training, in the style that the pictures of single reports have.

`analysis.drawing` draws layers x heads; the rest is here.
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator
from torch import Tensor

from ..analysis.comparison import EntropyComparison
from ..analysis.drawing import PALETTE, STYLE, panels
from ..analysis.drawing import attribution_grid as attribution_grid
from ..analysis.entropy import MAXIMA
from ..analysis.entropy_report import EntropyReport
from ..errors import DataError
from ..tables import shorten
from ..training.log import Curve, Entry, layer_curves

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


def heatmaps(reports: Sequence[EntropyReport], columns: int = 2) -> Figure:
    """Mean entropy of every head in nats, side by side on one colour scale from 0 to the largest bound."""
    first, *others = reports
    return first.plot(*others, columns=columns)


def difference_heatmaps(comparisons: Sequence[EntropyComparison], columns: int = 2) -> Figure:
    """How far each head's mean entropy moved, in nats; what moved beyond chance is framed."""
    first, *others = comparisons
    return first.plot(*others, columns=columns)


def bucket_bars(reports: Sequence[EntropyReport]) -> Figure:
    """Shares of heads by quarter of each of three maxima, with 95 % bootstrap intervals."""
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(len(MAXIMA), 3, 3.3, 2.9, sharey=True)
        width = 0.8 / len(reports)
        for ax, maximum in zip(axes, MAXIMA, strict=True):
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
            ax.set_xlabel(f"mean entropy / {MAXIMUM_LABELS[maximum]}")
        axes[0].set_ylabel("heads (%)")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
        return figure


def distributions(reports: Sequence[EntropyReport], columns: int = 2) -> Figure:
    """Row entropies of each layer: median, middle half, and 5 % to 95 %; dotted, ln(context length)."""
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
            ax.set(xlabel="entropy of a row (nats)", ylabel="layer")
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
        for report, ax in zip(reports, axes, strict=True):
            rows = report.strata_rows.sum((0, 1)) > 0
            middles = [(2 ** (s - 1) + 1 + 2**s) / 2 if s else 1.0 for s in rows.nonzero().flatten().tolist()]
            for layer, heads in enumerate(report.heads):
                values = report.strata_entropy[layer, heads][:, rows].mean(0).tolist()
                ax.plot(middles, values, "o-", markersize=2.5, **layer_style(layer, len(report.modules)))
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
    """Dark to light by depth; the first and the last have a label."""
    return {
        "color": matplotlib.colormaps["viridis"](layer / max(1, layers - 1) * 0.9),
        "label": f"layer {layer}" if layer in (0, layers - 1) else None,
        "linewidth": 1.2,
    }


def layer_dynamics(rows: Mapping[str, Sequence[Curve]], ylabel: str, bound: float | None = None) -> Figure:
    """For each panel one curve a layer over training steps, early layers dark and late layers light."""
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(len(rows), 2, 4.6, 2.7, sharex=True, sharey=True)
        for ax, (name, layers) in zip(axes, rows.items(), strict=True):
            for layer, points in enumerate(layers):
                ax.plot(*zip(*points, strict=True), **layer_style(layer, len(layers)))
            if bound is not None:
                ax.axhline(bound, color="grey", linewidth=0.8, linestyle=":", label="maximum")
            ax.set(title=name, xlabel="step", ylabel=ylabel)
            ax.legend(frameon=False, fontsize=7)
        return figure


def entropy_dynamics(histories: Mapping[str, Sequence[Entry]], bound: float | None = None) -> Figure:
    """
    Mean entropy of each layer over training, from the `log_history` (or log.jsonl) of runs with an attention probe.

    Raises:
        DataError: a history without `entropy/layer_00`.
    """
    rows = {name: layer_curves(history, "entropy") for name, history in histories.items()}
    for name, layers in rows.items():
        if not layers:
            raise DataError(f"The log of {name} holds no entropy/layer_00: it was trained without an attention probe.")
    return layer_dynamics(rows, "mean entropy (nats)", bound)


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
    with matplotlib.rc_context(STYLE):
        for suffix in suffixes:
            metadata = {"Date": None} if suffix == ".svg" else None
            figure.savefig(Path(path).with_suffix(suffix), dpi=150, metadata=metadata)


def to_svg(figure: Figure) -> str:
    """The figure as an `<svg>` element to stand inside a page."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
