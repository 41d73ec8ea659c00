"""What a study says about the paper's question, in a sentence and in a picture with the published one below it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..analysis.entropy_report import FEWEST_KEYS, PAPER_RESULTS, published_reports
from ..analysis.head_entropies import OVERLOADED
from ..studies.comparison import counted
from ..studies.statistics import MEASURES, Estimate, Measure, estimate
from ..studies.summary import TOO_SHORT, Rows, layer_shares, measure_of, paired, scores, share
from .plots import PALETTE, STYLE, panels

QUESTION = "Do GELU's early heads overload without LayerNorm, and does ReLU win?"
PUBLISHED_ENTROPIES = "GPT-2 T=128"  # the only ones that were printed head by head
# What the eye is to compare: GELU and ReLU by colour, with and without LayerNorm by line.
LOOKS = {
    "SM+LN+G": {"color": "#0072B2", "linestyle": ":", "marker": "o", "markerfacecolor": "white"},
    "SM+LN+R": {"color": "#D55E00", "linestyle": ":", "marker": "o", "markerfacecolor": "white"},
    "SM+G": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "SM+R": {"color": "#D55E00", "linestyle": "-", "marker": "o"},
}

OTHERS = [colour for colour in PALETTE if colour not in {look["color"] for look in LOOKS.values()}]


@dataclass(frozen=True)
class Outcome:
    """
    Args:
        title: of its panels.
        scores: variant -> one value a seed, the same seeds in all of them; not finite where a run diverged.
        measure: what the values are.
        shares: part of the model -> variant -> of every layer, the mean entropy of its heads as a share of the largest
            possible; the part is "" where there is one only.
    """

    title: str
    scores: Mapping[str, Sequence[float]]
    measure: Measure = MEASURES["perplexity"]
    shares: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)


def by_part(variants: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, Sequence[float]]]:
    """What is known by variant and part, by part and variant."""
    parts = dict.fromkeys(part for of_row in variants.values() for part in of_row)
    return {part: {row: of_row[part] for row, of_row in variants.items() if part in of_row} for part in parts}


def measured(rows: Rows) -> Outcome:
    """What was trained here; seeds that every variant has."""
    found = {row: scores(cells) for row, cells in rows.items()}
    seeds = [seed for seed in next(iter(found.values())) if all(seed in of_row for of_row in found.values())]
    reports = {
        row: [cell.entropy for cell in cells if cell.entropy is not None and cell.results and not cell.results.diverged]
        for row, cells in rows.items()
    }
    return Outcome(
        f"here, {counted(len(seeds))}",
        {row: [of_row[seed] for seed in seeds] for row, of_row in found.items()},
        measure_of(rows),
        by_part({row: layer_shares(of_row) for row, of_row in reports.items() if of_row}),
    )


def published(key: str, rows: Sequence[str]) -> Outcome:
    """The paper's figures for these variants; entropies only where they were printed."""
    values = PAPER_RESULTS["eval_perplexity"][key]
    heads = published_reports() if key == PUBLISHED_ENTROPIES else {}
    return Outcome(
        f"published, {key}",
        {row: [values[row]] for row in rows if row in values},
        shares=by_part({row: layer_shares([heads[row]]) for row in rows if row in heads}),
    )


def answer_picture(outcomes: Sequence[Outcome]) -> Figure:
    """A line of panels for each outcome: perplexity relative to its first variant, and entropy by layer."""
    with matplotlib.rc_context(STYLE):
        parts = [part for outcome in outcomes[:1] for part in outcome.shares] or [""]
        figure, axes = panels((1 + len(parts)) * len(outcomes), 2, 4.2, 2.6)
        free = iter(axes)
        for outcome in outcomes:
            draw_scores(next(free), outcome)
            for part in parts:
                draw_shares(next(free), outcome.shares.get(part, {}), f"{outcome.title}{', ' * bool(part)}{part}")
        return figure


def draw_scores(ax: Axes, outcome: Outcome) -> None:
    """One point a seed, beside the first variant; the mean is written on the right."""
    first, *_ = outcome.scores.values()
    measure = outcome.measure
    for index, (row, values) in enumerate(outcome.scores.items()):
        gaps = [100 * measure.gap([value], [base]).mean for value, base in zip(values, first, strict=True)]
        gaps = [gap for gap in gaps if math.isfinite(gap)]
        ax.plot(gaps, [index] * len(gaps), **look(row, index) | {"linestyle": "none"})
        mean = fmean(values)
        said = measure.format(estimate([mean])) if math.isfinite(mean) else "diverged"
        ax.text(1.02, index, said, transform=ax.get_yaxis_transform(), va="center", color="0.35")
    ax.axvline(0, color="0.6", linewidth=0.8, linestyle="--", zorder=0)
    names = list(outcome.scores)
    xlabel = f"{measure.name}, {measure.unit} above {names[0]}'s; mean on the right"
    ax.set(yticks=range(len(names)), yticklabels=names, xlabel=xlabel)
    ax.set(title=outcome.title, ylim=(len(names) - 0.5, -0.5))
    ax.margins(x=0.1)


def draw_shares(ax: Axes, variants: Mapping[str, Sequence[float]], title: str) -> None:
    """A line a variant, over layers, and the share above which a head counts as overloaded."""
    for index, (row, shares) in enumerate(variants.items()):
        ax.plot(range(len(shares)), shares, label=row, **look(row, index) | {"markersize": 4})
    ax.axhline(OVERLOADED, color="0.6", linewidth=0.8, linestyle="--", zorder=0)
    ax.text(1, OVERLOADED, " overloaded\n above", transform=ax.get_yaxis_transform(), va="center", color="0.35")
    ax.set(xlabel="layer", ylabel="entropy / largest possible", ylim=(0, 1.03), title=title)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if variants:
        ax.legend(frameon=False, fontsize=8, ncols=2, loc="lower left")
    else:
        ax.text(0.5, 0.5, "not published", transform=ax.transAxes, ha="center", color="0.35")


def look(row: str, index: int) -> dict[str, Any]:
    """Of a variant's points and lines."""
    other = {"color": OTHERS[index % len(OTHERS)], "linestyle": "--" if index >= len(OTHERS) else "-", "marker": "o"}
    return LOOKS.get(row, other)


def answer_sentence(rows: Rows, key: str | None) -> str:
    """What came out for the paper's question; "" for a study without SM+G and SM+R."""
    if not {"SM+G", "SM+R"} <= set(rows):
        return ""
    gap = paired(rows["SM+R"], rows["SM+G"])
    shares = {row: share(rows[row], "overloaded") for row in LOOKS if row in rows}
    heads = ", ".join(f"{row} {of_row}" for row, of_row in shares.items() if of_row)
    said = f"Heads that are overloaded (mean entropy above 3/4 of the largest possible): {heads}. " if heads else ""
    if TOO_SHORT in shares.values():
        said = f"No verdict on heads: their queries have fewer than {FEWEST_KEYS} keys. "
    if gap is not None:
        measure = measure_of(rows)
        said += f"Without LayerNorm, ReLU's {measure.name} is {beside(gap, measure)} GELU's{doubt(gap)}."
    if key is not None and {"SM+G", "SM+R"} <= set(values := PAPER_RESULTS["eval_perplexity"][key]):
        said += f" Published, {key}: {beside(estimate([values['SM+R'] / values['SM+G'] - 1]))}."
    return said


def best_row(rows: Rows) -> str:
    """Which variant came out best, and how far it is from the first; for studies of any variants."""
    first, measure = next(iter(rows)), measure_of(rows)
    means = {row: estimate(list(scores(cells).values())) for row, cells in rows.items()}
    finite = [row for row in rows if math.isfinite(means[row].mean)]
    if not finite:
        return f"No variant has a {measure.name}: in each at least one seed diverged."
    best = measure.best(finite, key=lambda row: means[row].mean)
    gap = paired(rows[best], rows[first])
    said = f"The {measure.superlative} {measure.name} is that of {best}, {measure.format(means[best])}"
    if best != first and gap is not None and math.isfinite(gap.mean):
        said += f", {beside(gap, measure)} that of {first}{doubt(gap)}"
    lost = [row for row in rows if row not in finite]
    return f"{said}." + (f" Seeds diverged in {', '.join(lost)}." if lost else "")


def doubt(gap: Estimate) -> str:
    """What keeps a difference from being shown by its seeds; "" for one that is."""
    if gap.seeds < 2:
        return " (one seed, so no interval)"
    return " (the interval holds 0: no difference is shown)" if abs(gap.mean) <= gap.half_width else ""


def limits(rows: Rows) -> str:
    """What a study's verdict cannot say."""
    seeds = max(len(cells) for cells in rows.values())
    spread = "Intervals are over seeds, 95 %." if seeds > 1 else "One seed does not tell a difference from chance."
    return f"{spread} This holds for models of this size, trained this long on this data."


def beside(gap: Estimate, measure: Measure = MEASURES["perplexity"]) -> str:
    """A difference in words: "8.2 % below", "1.3 points above"."""
    if not math.isfinite(gap.mean):
        return f"{gap.format()} beside"
    size = measure.format_gap(replace(gap, mean=abs(gap.mean)), sign=False)
    return f"{size} {'below' if gap.mean < 0 else 'above'}"
