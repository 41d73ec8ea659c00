"""What the explorer shows of one model, as HTML that fetches nothing: pictures as SVG, tables, errors in one line."""

import warnings
from html import escape
from typing import Any

import matplotlib
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from ..analysis.drawing import cells
from ..analysis.entropy_report import EntropyReport
from ..errors import LNFreeError
from ..tables import Table, number
from .explorer import Explorer, Reading
from .plots import STYLE, to_svg

MARKS = {"overloaded": ("#D55E00", "-"), "collapsed": ("#CC79A7", "--"), "not finite": ("#000000", ":")}
COMPONENTS = 12  # of an attribution
NAMED_TOKENS = 48  # on an axis


def panel(explorer: Explorer, text: str, layer: int, head: int) -> str:
    """Everything that a model makes of a text, or one line that says what is wrong with it."""
    parts = [f"<h3>{escape(explorer.name)}</h3>"]
    try:
        reading = explorer.read(text)
    except LNFreeError as error:
        return "".join([*parts, error_line(error)])
    report = reading.report
    parts.append(paragraph(f"Tokens: {len(reading.tokens)}, {verdict(report)}"))
    parts += map(paragraph, reading.notes)
    parts.append(svg(share_heatmap(report)))
    try:
        weights = explorer.head_map(text, layer, head)
        parts.append(paragraph(f"Layer {layer} is {report.modules[layer]}."))
        parts.append(svg(map_picture(weights, reading, layer, head)))
    except LNFreeError as error:
        parts.append(error_line(error))
    if reading.next_tokens:
        rows = [[token, number(100 * share, ".2f")] for token, share in reading.next_tokens]
        parts.append(html_table(Table(["next token", "probability (%)"], rows)))
    if reading.attribution is not None:
        parts.append(paragraph(f"The logit of {reading.next_tokens[0][0]}:"))
        parts.append(html_table(reading.attribution.largest(COMPONENTS)))
        parts.append(paragraph(reading.attribution.certificate()))
    return "".join(parts)


def verdict(report: EntropyReport) -> str:
    """The share of the largest possible on average, and how many heads stand out."""
    if not (report.bound[report.heads] > 0).any():
        return "of which each sees a single key: attention has no choice."
    kinds = [flag.kind for flag in report.flags()]
    share = number(100 * float(report.normalized[report.heads].mean()), ".0f")
    counts = [f"{kinds.count(kind)} {kind}" for kind in MARKS if kind in ("overloaded", "collapsed") or kind in kinds]
    of = f"with {share} % of the largest possible entropy on average"
    return f"{of}." if report.too_short else f"{of}; of {int(report.heads.sum())} heads {', '.join(counts)}."


def share_heatmap(report: EntropyReport) -> Figure:
    """Mean entropy of every head in per cent of the largest possible; overloaded and collapsed heads are framed."""
    layers, heads = report.entropy.shape
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(3.2, 0.42 * min(heads, 20) + 1.4), max(2.8, 0.3 * layers + 1.3)))
        figure.set_layout_engine("constrained")
        ax = figure.subplots()
        shown = report.heads & (report.bound > 0)  # a single key leaves no choice
        image = cells(ax, 100 * report.entropy / report.bound, shown, "viridis", 0.0, 100.0, ".0f")
        legend = {}
        for layer, head, kind, _ in report.flags():
            if kind in MARKS:
                color, line = MARKS[kind]
                frame: dict[str, Any] = {"fill": False, "edgecolor": color, "linestyle": line, "linewidth": 2}
                ax.add_patch(Rectangle((head - 0.44, layer - 0.44), 0.88, 0.88, **frame))
                legend[kind] = Patch(**frame, label=kind)
        if legend:
            figure.legend(handles=list(legend.values()), loc="outside lower center", ncols=3, frameon=False)
        figure.colorbar(image, ax=ax, label="entropy (% of largest possible)")
        return figure


def map_picture(weights: Tensor, reading: Reading, layer: int, head: int) -> Figure:
    """A map [Q, K]: what each query (row) attends to; short texts with their tokens on the axes."""
    queries, keys = weights.shape
    with matplotlib.rc_context(STYLE):
        side = min(9.0, 2.2 + 0.16 * min(keys, NAMED_TOKENS))
        figure = Figure(figsize=(side + 0.8, side * max(0.4, min(1.0, queries / keys))))
        figure.set_layout_engine("constrained")
        ax = figure.subplots()
        top = float(weights.nan_to_num().max()) or 1.0
        scale = PowerNorm(0.5, 0.0, top)  # most weights of a long text are small
        image = ax.imshow(weights.to(torch.float32).numpy(), cmap="viridis", norm=scale, aspect="auto")
        ax.set(title=f"Layer {layer}, head {head}", xlabel="key", ylabel="query")
        if queries == keys == len(reading.tokens) <= NAMED_TOKENS and "decoder_input_ids" not in reading.inputs:
            ax.set_xticks(range(keys), reading.tokens, rotation=90, fontsize=7)
            ax.set_yticks(range(queries), reading.tokens, fontsize=7)
            ax.tick_params(length=0)
        figure.colorbar(image, ax=ax, label="probability")
        return figure


def svg(figure: Figure) -> str:
    """The picture; a browser has the glyphs that matplotlib's own font lacks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph|Matplotlib currently does not support", UserWarning)
        return f"<div>{to_svg(figure)}</div>"


def paragraph(text: str) -> str:
    """A text as it is."""
    return f"<p>{escape(text)}</p>"


def error_line(error: Exception) -> str:
    """What a user is told is wrong."""
    return f'<p role="alert"><strong>{escape(" ".join(str(error).split()))}</strong></p>'


def html_table(table: Table) -> str:
    """A table without its note."""
    lines = [("th", table.header), *(("td", cells) for cells in table.rows)]
    rows = ("".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) for tag, cells in lines)
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
