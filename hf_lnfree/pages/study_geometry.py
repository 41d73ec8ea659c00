"""The geometry of MLPs in the page of a study: beside the entropy of heads, by layer, at the end of training."""

from collections.abc import Mapping, Sequence

import matplotlib
import torch
from matplotlib.figure import Figure

from ..analysis.drawing import STYLE, panels
from ..analysis.geometry_report import NAMES
from ..studies.cells import Cell
from ..studies.geometry import ENTROPY, Probes, correlation, differences, has_norms, leaving_overload, onsets, probes_of
from ..studies.statistics import Estimate
from ..tables import Table, shorten
from .answer import look
from .report import Block, Picture, Section

DIFFERENCES = (
    "Differences between rows at the end, paired by seed, with 95 % intervals over seeds. In brackets, where there is "
    "a difference: the step from which it is beyond half of that, mean over seeds."
)
MARKS = {"o": "circle", "s": "square", "^": "triangle", "D": "diamond", "P": "plus", "X": "cross"}


def geometry_section(rows: Mapping[str, Sequence[Cell]], compare: Sequence[Sequence[str]]) -> Section:
    """Where entropy and geometry stand by layer, how rows differ, and how both go together; empty without samples."""
    probed = probes_of(rows)
    blocks: list[Block] = []
    if probed:
        metrics = [key for key in first_of(probed).values if key != ENTROPY]
        caption = (
            "Every MLP at the end, mean over seeds, beside the entropy of the heads of its layer as a share of the "
            f"largest possible. Layers from 0 on: {', '.join(MARKS.values())}, then anew."
        )
        alt = f"Points: metrics of every MLP against the entropy of its layer's heads, of {', '.join(probed)}."
        blocks = [Picture(scatter(probed, metrics), caption, alt)]
        pairs = [pair for pair in compare if all(row in probed for row in pair)]
        blocks += [DIFFERENCES] if pairs else []
        blocks += [difference_table(probed, pair, metrics) for pair in pairs]
        blocks.append(leaving_table(probed))
        bare = [of_row for row, of_row in probed.items() if not has_norms(rows[row])]
        if len(bare) > 1:
            blocks.append(correlation_table(bare, metrics))
    return Section("Geometry of MLPs and entropy of heads", blocks)


def first_of(probed: Mapping[str, Mapping[int, Probes]]) -> Probes:
    """Of the first row and seed."""
    return next(iter(next(iter(probed.values())).values()))


def title(metric: str) -> str:
    """What tables and pictures call a metric."""
    if metric == ENTROPY:
        return "entropy / bound"
    name, _, kind = metric.partition("/")
    return NAMES[name] + (f" ({kind.replace('_', ' ')})" if kind else "")


def label(metric: str) -> str:
    """The same over two lines, beside a panel."""
    return title(metric).replace(" (", "\n(")


def scatter(probed: Mapping[str, Mapping[int, Probes]], metrics: Sequence[str]) -> Figure:
    """A panel for each metric: over the entropy of heads, a colour for each row and a mark for each layer."""
    marks = list(MARKS)
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(len(metrics), 2, 4.2, 2.8)
        for metric, ax in zip(metrics, axes, strict=True):
            for index, (row, of_row) in enumerate(probed.items()):
                x, y = (torch.stack([p.end[key] for p in of_row.values()]).mean(0) for key in (ENTROPY, metric))
                color, line = (look(row, index)[key] for key in ("color", "linestyle"))
                ax.plot(x, y, line, color=color, linewidth=0.9, alpha=0.6, label=shorten(row))
                for layer, point in enumerate(zip(x, y, strict=True)):
                    ax.plot(*point, marks[layer % len(marks)], color=color, markersize=4)
            ax.set(xlabel="entropy of heads / bound", ylabel=label(metric))
            ax.grid(alpha=0.25, linewidth=0.5)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
        return figure


def difference_table(probed: Mapping[str, Mapping[int, Probes]], pair: Sequence[str], metrics: Sequence[str]) -> Table:
    """Of two rows by layer at the end, and since when."""
    one, other = (probed[row] for row in pair)
    lines = []
    for metric in (ENTROPY, *metrics):
        layers = zip(differences(one, other, metric), onsets(one, other, metric), strict=True)
        lines.append([title(metric), *(with_onset(*layer) for layer in layers)])
    return Table([f"{pair[0]} minus {pair[1]}", *(f"layer {i}" for i in range(len(lines[0]) - 1))], lines)


def with_onset(difference: Estimate, onset: Estimate | None) -> str:
    """A difference and, if there is one, since when."""
    return difference.format(3, sign=True) + ("" if onset is None else f" ({onset.mean:.0f})")


def leaving_table(probed: Mapping[str, Mapping[int, Probes]]) -> Table:
    """When the heads of each layer leave overload, by seed."""
    lines = [
        [
            row,
            *(
                ", ".join("never" if step is None else str(step) for step in layer)
                for layer in leaving_overload(of_row)
            ),
        ]
        for row, of_row in probed.items()
    ]
    note = "The step from which the mean entropy of a layer's heads stays at or below 3/4 of its bound, by seed."
    return Table(["row", *(f"layer {i}" for i in range(len(lines[0]) - 1))], lines, note)


def correlation_table(bare: Sequence[Mapping[int, Probes]], metrics: Sequence[str]) -> Table:
    """Of entropy with each metric, over the rows without norms."""
    lines = [
        [title(metric), signed(correlation(bare, metric)), signed(correlation(bare, metric, within_layers=True))]
        for metric in metrics
    ]
    note = (
        "Pearson's r of the entropy of a layer's heads (share of the bound) with a metric of its MLP, over all layers "
        "and rows without norms at the end; mean over seeds with its 95 % interval. Within layers: after each mean "
        "of a layer over rows is taken off, so that what depth does to both is left out."
    )
    return Table(["entropy with", "r over layers and rows", "r within layers"], lines, note)


def signed(found: Estimate | None, digits: int = 2) -> str:
    """With its sign; "" where there is none."""
    return "" if found is None else found.format(digits, sign=True)
