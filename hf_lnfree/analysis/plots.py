"""Pictures of entropy reports and of training: every use of matplotlib is here."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .entropy_report import EntropyReport

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hf_lnfree",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
Curve = Sequence[tuple[float, float]]


def heatmap(report: EntropyReport, ax: Axes, vmax: float | None = None) -> Any:
    """Layers x heads, annotated in nats, on a scale from 0 to `vmax` (by default the causal bound)."""
    values = report.entropy.numpy()
    layers, heads = values.shape
    top = vmax or report.bound
    image = ax.imshow(values, cmap="viridis", vmin=0, vmax=top, aspect="auto")
    for layer in range(layers):
        for head in range(heads):
            value = values[layer, head]
            text = "nan" if math.isnan(value) else f"{value:.2f}"
            color = "black" if value > 0.6 * top else "white"
            ax.text(head, layer, text, ha="center", va="center", fontsize=6.5, color=color)
    ax.set(xlabel="head", ylabel="layer", xticks=range(heads), yticks=range(layers))
    ax.set_title(f"{report.name} ({report.source})", fontsize=10)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return image


def heatmaps(reports: Sequence[EntropyReport], columns: int = 2) -> Figure:
    """Heatmaps side by side on one colour scale."""
    with matplotlib.rc_context(STYLE):
        rows = math.ceil(len(reports) / columns)
        height = max(2.8, max(0.32 * len(r.entropy) for r in reports) + 0.9)  # room for the colour bar's label
        width = max(0.42 * r.entropy.shape[1] for r in reports) + 1.2
        figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        top = max(r.bound for r in reports)
        for ax in axes.flat[len(reports) :]:
            ax.axis("off")
        for report, ax in zip(reports, axes.flat, strict=False):
            image = heatmap(report, ax, top)
        figure.colorbar(image, ax=axes, label="mean attention entropy (nats)", shrink=0.8)
        return figure


def save_heatmap(report: EntropyReport, path: str | Path) -> None:
    """One annotated heatmap as a picture; the suffix (svg, png, pdf) chooses the format."""
    with matplotlib.rc_context(STYLE):
        heatmaps([report], columns=1).savefig(path, dpi=150)


def curves(lines: Mapping[str, Curve], xlabel: str, ylabel: str, log: bool = False) -> Figure:
    """Named curves of (x, y); points that are not finite leave a gap."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        ax = figure.subplots()
        for name, points in lines.items():
            ax.plot(*zip(*points, strict=True), label=name, linewidth=1.4) if points else None
        ax.set(xlabel=xlabel, ylabel=ylabel)
        if log:
            ax.set_yscale("log")
        ax.grid(alpha=0.25, linewidth=0.5)
        ax.legend(frameon=False, fontsize=8)
        return figure


def layer_dynamics(panels: Mapping[str, Sequence[Curve]], ylabel: str, bound: float | None = None) -> Figure:
    """For each panel one curve a layer over training steps, early layers dark and late layers light."""
    with matplotlib.rc_context(STYLE):
        columns = min(2, len(panels))
        rows = math.ceil(len(panels) / columns)
        figure = Figure(figsize=(4.6 * columns, 2.7 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for ax, (name, layers) in zip(axes.flat, panels.items(), strict=False):
            for layer, points in enumerate(layers):
                color = matplotlib.colormaps["viridis"](layer / max(1, len(layers) - 1) * 0.9)
                label = f"layer {layer}" if layer in (0, len(layers) - 1) else None
                ax.plot(*zip(*points, strict=True), color=color, label=label, linewidth=1.2)
            if bound is not None:
                ax.axhline(bound, color="grey", linewidth=0.8, linestyle=":", label="maximum")
            ax.set(title=name, xlabel="step", ylabel=ylabel)
            ax.legend(frameon=False, fontsize=7)
        return figure


def to_svg(figure: Figure) -> str:
    """The figure as an `<svg>` element to stand inside a page."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
