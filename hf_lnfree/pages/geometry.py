"""Geometry reports of one or several models -> a folder: JSON and safetensors, pictures, and one page with it all."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..analysis.drawing import PALETTE, STYLE, panels
from ..analysis.geometry_comparison import GeometryComparison, compare_geometry
from ..analysis.geometry_report import FIRING, NAMES, SPECTRA, GeometryReport
from ..files import json_text
from ..tables import shorten
from .entropy import file_names
from .plots import layer_bar, layer_style, plain_ticks, save
from .report import Block, Fold, Listing, Picture, Section, Verdict, write_report

LIMITS = (
    "Standard errors are over groups of the documents that were read, and say nothing about other text. "
    "Specialisation, selectivity within classes and firing patterns are names of this package; a unit fires where its "
    "pre-activation is above 0."
)


SMALLEST_SHARE = 1e-7  # below, there is nothing but rounding


class Line(NamedTuple):
    """A panel: a metric by layer, and one that is drawn dashed beside it."""

    metric: str
    label: str
    dashed: str = ""


SPECTRA_LINES = (
    Line("row_participation_ratio_post", "participation ratio", "row_participation_ratio_pre"),
    Line("spectral_entropy_post", "spectral entropy (nats)", "spectral_entropy_pre"),
    Line("participation_gain", "participation gain"),
    Line("jensen_shannon", "Jensen-Shannon divergence (nats)"),
)
FIRING_LINES = (
    Line("specialisation", "specialisation"),
    Line("overlap", "overlap", "independent_overlap"),
    Line("patterns", "effective firing patterns"),
    Line("dead", "dead units"),
)
CLASS_METRICS = ("between_share", "class_selectivity", "within_selectivity", "alignment")


def class_lines(kind: str) -> list[Line]:
    """Of one kind of classes."""
    return [Line(f"{metric}/{kind}", NAMES[metric]) for metric in CLASS_METRICS]


def by_layer(reports: Sequence[GeometryReport], lines: Sequence[Line]) -> Figure:
    """Metrics by layer with their standard errors, a colour for each model."""
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(len(lines), 2, 4.2, 2.5)
        for line, ax in zip(lines, axes, strict=True):
            for report, color in zip(reports, PALETTE * len(reports), strict=False):
                for metric, style in ((line.metric, "o-"), (line.dashed, "o--")):
                    if metric in report.values:
                        draw(ax, report, metric, style, color)
            ax.set(xlabel="MLP", ylabel=line.label)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            ax.grid(alpha=0.25, linewidth=0.5)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
        return figure


def draw(ax: Axes, report: GeometryReport, metric: str, style: str, color: str) -> None:
    """One metric of one model, solid lines named."""
    values, errors = report.values[metric], report.standard_errors[metric].nan_to_num()
    name = "_" if style.endswith("--") else shorten(report.name)
    ax.errorbar(
        range(len(values)),
        values.tolist(),
        errors.tolist(),
        fmt=style,
        color=color,
        label=name,
        markersize=3,
        linewidth=1.2,
        elinewidth=0.8,
    )


def spectra(reports: Sequence[GeometryReport], columns: int = 2) -> Figure:
    """Shares of variance by rank, after the activation, and dotted before it; early layers dark, late ones light."""
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(len(reports), columns, 4.2, 3.0, sharex=True, sharey=True)
        most = max(len(report.modules) for report in reports)
        for report, ax in zip(reports, axes, strict=True):
            for key, style in (("spectrum_pre", ":"), ("spectrum_post", "-")):
                for layer, values in enumerate(report.units[key]):
                    shares = values / values.nansum()
                    shares = shares.where(shares > SMALLEST_SHARE, torch.nan).tolist()
                    ax.plot(range(1, len(shares) + 1), shares, style, **layer_style(layer, most))
            ax.set(xlabel="rank", ylabel="share of variance", title=shorten(report.name), xscale="log")
            plain_ticks(ax.xaxis)
            if report.units["spectrum_post"].isfinite().any():
                ax.set(yscale="log", ylim=(SMALLEST_SHARE, 1.2))
                plain_ticks(ax.yaxis)
        layer_bar(figure, axes, most)
        return figure


def frequencies(reports: Sequence[GeometryReport], columns: int = 2) -> Figure:
    """How often units fire in each layer: median, middle half, and 5 % to 95 % of the units."""
    with matplotlib.rc_context(STYLE):
        height = max(2.2, 0.2 * max(len(r.modules) for r in reports) + 0.9)
        figure, axes = panels(len(reports), columns, 3.6, height, sharex=True)
        shares = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
        for report, ax in zip(reports, axes, strict=True):
            low, quarter, middle, three, high = report.units["frequency"].nanquantile(shares, dim=1).tolist()
            layers = range(len(report.modules))
            ax.hlines(layers, low, high, color=PALETTE[0], linewidth=1)
            ax.hlines(layers, quarter, three, color=PALETTE[0], linewidth=4.5)
            ax.plot(middle, layers, "o", color="white", markeredgecolor="black", markersize=4)
            ax.set(xlabel="share of tokens", ylabel="MLP", xlim=(0, 1), title=shorten(report.name))
            ax.invert_yaxis()
            ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        return figure


def comparable(reports: Sequence[GeometryReport]) -> list[GeometryComparison]:
    """Every report with as many MLPs as the first, against the first."""
    first, *others = reports
    return [compare_geometry(first, other) for other in others if len(other.modules) == len(first.modules)]


def write_geometry_page(folder: str | Path, reports: Sequence[GeometryReport]) -> None:
    """
    Write `geometry-NAME.json` and `.safetensors` of each report, each picture as SVG and PNG, and `report.html`.

    Args:
        folder: made if it is not there.
        reports: the first is what the others are compared with.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for report, name in zip(reports, file_names(reports), strict=True):
        report.save(folder / f"geometry-{name}.json")
    labels = ", ".join(report.name for report in reports)
    kinds = list(dict.fromkeys(kind for report in reports for kind in report.kinds if kind != "inputs"))
    figures = {
        "spectra-by-layer": Picture(
            by_layer(reports, SPECTRA_LINES),
            "Solid: after the activation; dashed: before it. The participation ratio is corrected for few rows.",
            f"By layer: participation ratio, spectral entropy, their change by the activation, of {labels}.",
        ),
        "spectra": Picture(
            spectra(reports),
            "Shares of variance by rank. Solid: after the activation; dotted: before it.",
            f"The spectra of every MLP of {labels}.",
        ),
        "firing": Picture(
            by_layer(reports, FIRING_LINES),
            "Dashed: the overlap of units that fire independently, each as often as it does.",
            f"By layer: how units share the tokens on which they fire, of {labels}.",
        ),
        "frequencies": Picture(
            frequencies(reports),
            "How often units fire: median, middle half, 5 % to 95 % of the units.",
            f"By layer: the median and spread of how often units fire, of {labels}.",
        ),
    }
    for kind in kinds:
        figures[f"classes-{kind}"] = Picture(
            by_layer(reports, class_lines(kind)),
            f"How far units tell classes of {kind} apart, and how selective they are within one.",
            f"By layer: selectivity for {kind}, of {labels}.",
        )
    for name, picture in figures.items():
        save(picture.figure, folder / name)
    sections = [
        Section("Verdict", [Verdict(" ".join(map(verdict, reports)), LIMITS), figures["spectra-by-layer"]]),
        Section("Spectra", [figures["spectra"], *tables(reports, SPECTRA)]),
        Section("Firing", [figures["firing"], figures["frequencies"], *tables(reports, FIRING)]),
        *(Section(f"By {kind}", [figures[f"classes-{kind}"], *class_tables(reports, kind)]) for kind in kinds),
        Section("Inputs", class_tables(reports, "inputs")),
        *changes(comparable(reports)),
        Section("Where the numbers are from", [Fold(r.name, [Listing(json_text(r.metadata))]) for r in reports]),
    ]
    write_report(folder / "report.html", "Geometry of features", labels, sections)


def verdict(report: GeometryReport) -> str:
    """What a report says in sentences."""
    return " ".join([report.verdict(), *report.notes()])


def tables(reports: Sequence[GeometryReport], metrics: Sequence[str]) -> list[Block]:
    """The numbers of each model, folded."""
    return [Fold(f"{report.name}: the numbers", [report.by_layer(metrics)]) for report in reports]


def class_tables(reports: Sequence[GeometryReport], kind: str) -> list[Block]:
    """The numbers of one kind of classes of each model, folded."""
    return [Fold(f"{r.name}: the numbers", [r.of_kind(kind)]) for r in reports if kind in r.kinds]


def changes(comparisons: Sequence[GeometryComparison]) -> list[Section]:
    """What moved between the models; no section for one alone."""
    blocks: list[Block] = []
    for comparison in comparisons:
        blocks += [f"{comparison.verdict()}.", comparison.furthest()]
    return [Section("What moved", blocks)] if blocks else []
