"""The pictures of entropic-overload.md, architecture.md and the findings. Usage: python docs/pictures.py"""

import json
import math
import re
import runpy
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from hf_lnfree.analysis import attention_entropy, causal_bound, published_reports
from hf_lnfree.pages.answer import Outcome, draw_scores, draw_shares, look, published
from hf_lnfree.pages.plots import STYLE, heatmaps, panels, plain_ticks, save
from hf_lnfree.pages.scaling import scaling_picture
from hf_lnfree.pages.study_geometry import label
from hf_lnfree.studies.geometry import ENTROPY, SETTLED
from hf_lnfree.studies.scaling import Point
from hf_lnfree.studies.statistics import MEASURES
from hf_lnfree.studies.summary import LEARNED

IMAGES = Path(__file__).parent / "images"
RESULTS = IMAGES.parents[1] / "benchmarks" / "results"
T = 24
LINES = 8  # that can be told apart in a panel
# The paper's figures that stand below a study's.
PUBLISHED = {"study-gpt2-T128-small": "GPT-2 T=128", "study-pythia-70m-T128-small": "Pythia-70M T=128"}
# What `hf-lnfree scaling` found in a study of several sizes.
SCALING = {"study-ladder-small": "scaling-ladder"}
# Of rows named "ROW field=value": the label of the axis, and what a value is multiplied with.
FACTORS = {"learning_rate": ("learning rate", 1.0), "max_steps": ("million tokens", 16 * 128 / 1e6)}


def maps() -> dict[str, torch.Tensor]:
    """Three causal heads on 24 tokens: one that attends to everything, one with preferences, one with a choice."""
    scores = torch.randn(T, T, generator=torch.Generator().manual_seed(0))
    future = torch.ones(T, T).triu(1).bool()
    sharpness = {"overloaded": 0.0, "in between": 1.5, "collapsed": 60.0}
    return {name: (scores * s).masked_fill(future, -torch.inf).softmax(-1) for name, s in sharpness.items()}


def drawn(heads: dict[str, torch.Tensor]) -> Figure:
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(len(heads), 3, 2.5, 2.9)
        figure.set_layout_engine("compressed")
        for (name, p), ax in zip(heads.items(), axes, strict=True):
            ax.imshow(p.sqrt().tolist(), cmap="viridis", vmin=0, vmax=1)
            ax.set_title(f"{name}\n{float(attention_entropy(p).mean()):.2f} of {causal_bound(T):.2f} nats", fontsize=10)
            ax.set(xlabel="key", ylabel="query", xticks=[], yticks=[])
        return figure


def by_row(study: dict) -> dict[str, list[dict]]:
    """Rows of one size go by their own name."""
    rows = defaultdict(list)
    for cell in study["cells"]:
        rows[re.sub(r" size=\S+", "", cell["row"])].append(cell)
    return rows


def outcome(study: dict, key: str | None) -> Figure:
    """Perplexity of every seed by row, and entropy of every layer at the end.

    Below them the paper's, or what activations learned: by layer at the end, and a mean over layers over training.
    """
    rows = by_row(study)
    count = len(next(iter(rows.values())))
    measure = "accuracy" if "eval_accuracy" in study["cells"][0] else "perplexity"
    ours = Outcome(
        f"here, {count} seed{'s' * (count != 1)}",
        {row: [finite(cell[f"eval_{measure}"]) for cell in cells] for row, cells in rows.items()},
        MEASURES[measure],
        shares_of_bound(study, rows),
    )
    outcomes = [ours] + ([published(key, list(rows))] if key else [])
    logged = {name for cell in study["cells"] for name in cell["over_training"]}
    learned = {name: label for name, label in LEARNED.items() if name in logged}
    parts = list(ours.shares)
    with matplotlib.rc_context(STYLE):
        count = (1 + len(parts)) * len(outcomes) + 2 * len(learned)
        figure, axes = panels(count, 2, 4.2, max(2.6, 0.8 + 0.28 * len(rows)))
        for shown in outcomes:
            draw_scores(axes.pop(0), shown)
            for part in parts if len(rows) <= LINES else ():
                title = f"{shown.title}, {part}" if part else shown.title
                draw_shares(axes.pop(0), shown.shares.get(part, {}), title)
            if len(rows) > LINES:
                draw_overloaded(axes.pop(0), rows)
        for name, label in learned.items():
            at_end, over_training = axes.pop(0), axes.pop(0)
            for index, (row, cells) in enumerate(rows.items()):
                if all(name in cell["over_training"] for cell in cells):
                    style = look(row, index)
                    at_end.plot(of_layers(cells, name), label=row, **style | {"markersize": 4})
                    for cell in cells:
                        points = zip(*cell["over_training"][name], strict=True)
                        over_training.plot(*points, **style | {"marker": "", "linewidth": 0.8})
            at_end.set(xlabel="layer", ylabel=f"{label} at the end")
            at_end.xaxis.set_major_locator(MaxNLocator(integer=True))
            over_training.set(xlabel="step", ylabel=f"{label}, mean of the layers")
            if name == "slope":  # from -0.1 to 1
                over_training.set_yscale("symlog", linthresh=0.1)
                plain_ticks(over_training.yaxis)
        return figure


UNITS = (
    ENTROPY,
    "within_selectivity/next_token",
    "between_share/next_token",
    "frequency",
    "alignment/inputs",
    "row_participation_ratio_post",
)
"""Metrics that a study of the geometry of MLPs shows."""
OVER_TRAINING = ("SM+G", "SM+R")


def units(study: dict) -> Figure:
    """Entropy of heads and geometry of MLPs: by layer at the end; below, of the first two layers over training."""
    rows = by_row(study)
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(len(UNITS) + 4, 2, 4.2, 2.5)
        for key, ax in zip(UNITS, axes, strict=False):
            for index, (row, cells) in enumerate(rows.items()):
                values = torch.tensor([cell["geometry"][key][-SETTLED:] for cell in cells]).mean((0, 1))  # L
                ax.plot(values.tolist(), label=row, **look(row, index) | {"markersize": 4})
            ax.set(xlabel="layer", ylabel=label(key))
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
        rest = iter(axes[len(UNITS) :])
        for key in UNITS[:2]:
            for layer in range(2):
                ax = next(rest)
                for index, row in enumerate(OVER_TRAINING):
                    for cell in rows[row]:
                        line = [values[layer] for values in cell["geometry"][key]]
                        ax.plot(cell["geometry"]["steps"], line, **look(row, index) | {"marker": "", "linewidth": 0.9})
                ax.set(xlabel="step", ylabel=label(key), title=f"layer {layer}, {' and '.join(OVER_TRAINING)}")
        return figure


def finite(value: float | None) -> float:
    """NaN for a run that diverged."""
    return math.nan if value is None else value


def shares_of_bound(study: dict, rows: dict[str, list[dict]]) -> dict[str, dict[str, list[float]]]:
    """By part and row, of every layer entropy / bound at the end, a mean over the seeds that did not diverge."""
    found: dict[str, dict[str, list[float]]] = {}
    for row, cells in rows.items():
        if "parts" not in cells[0]:  # of earlier versions, which were decoders
            bound = causal_bound(study["settings"][row]["context_length"])
            found.setdefault("", {})[row] = [e / bound for e in of_layers(cells, "entropy")]
            continue
        finite = [cell["parts"] for cell in cells if cell["diverged_at"] is None]
        for part in cells[0]["parts"] if finite else ():
            layers = torch.tensor([parts[part]["entropy_to_bound"] for parts in finite])
            found.setdefault(part, {})[row] = layers.mean(0).tolist()
    return found


def draw_overloaded(ax: Axes, rows: dict[str, list[dict]]) -> None:
    """One point a seed."""
    for index, (row, cells) in enumerate(rows.items()):
        shares = [100 * cell["overloaded_heads"] for cell in cells]
        ax.plot(shares, [index] * len(shares), **look(row, index) | {"linestyle": "none"})
    ax.set(yticks=[], xlabel="overloaded heads, %", ylim=(len(rows) - 0.5, -0.5), xlim=(-2, None))


def of_layers(cells: list[dict], key: str) -> list[float]:
    """Of every layer at the end, a mean over the seeds that did not diverge."""
    found = [cell["layers"][key] for cell in cells if cell["diverged_at"] is None and key in cell["layers"]]
    return torch.tensor(found).mean(0).tolist() if found else []


def over_factor(study: dict, factor: str) -> Figure:
    """Perplexity, and the share of overloaded heads, over the values of one factor.

    A point is a seed, a line goes through means. Values at which a seed diverged are left out.
    """
    label, scale = FACTORS[factor]
    lines: dict[str, dict[float, list[dict]]] = defaultdict(dict)
    for row, cells in by_row(study).items():
        name, value = row.split(f" {factor}=")
        if all(cell["diverged_at"] is None for cell in cells):
            lines[name][float(value) * scale] = cells
    every = sorted({value for values in lines.values() for value in values})
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(2, 2, 4.2, 3.0)
        for ax, key, times in zip(axes, ("eval_perplexity", "overloaded_heads"), (1, 100), strict=True):
            for index, (name, values) in enumerate(lines.items()):
                style = look(name, index)
                points = [(v, times * cell[key]) for v, cells in values.items() for cell in cells]
                means = [(v, times * fmean(cell[key] for cell in cells)) for v, cells in values.items()]
                ax.plot(*zip(*points, strict=True), **style | {"linestyle": "", "markersize": 3})
                ax.plot(*zip(*means, strict=True), **style | {"marker": ""}, label=name)
            ax.set_xscale("log")
            ax.set_xticks(every, [f"{value:.3g}" for value in every])
            ax.minorticks_off()
            ax.set(xlabel=label, ylabel="perplexity" if key == "eval_perplexity" else "overloaded heads, %")
        axes[0].set_yscale("log")
        within(axes[0], [8, 10, 12, 14, 16, 18, 20, 25, 30, 35])
        axes[1].set_ylim(0, 103)
        axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        return figure


def over_sizes(name: str) -> Figure:
    """Loss, differences and overloaded heads of every run, and what is foretold."""
    found = json.loads((RESULTS / f"{name}.json").read_text())
    return scaling_picture([Point(**run) for run in found["runs"]], found)


def within(ax: Axes, ticks: list[Any]) -> None:
    """Only the ticks that the data reach."""
    low, high = ax.dataLim.intervaly
    kept = [tick for tick in ticks if 0.95 * low <= tick <= 1.05 * high]
    ax.set_yticks(kept, [str(tick) for tick in kept])
    ax.minorticks_off()


def rooms() -> Figure:
    """The rooms in the order that the test of the layers demands, and the way of the imports."""
    names = runpy.run_path(str(IMAGES.parents[1] / "tests" / "test_layering.py"))["FLOORS"]
    with matplotlib.rc_context(STYLE):
        figure, (ax,) = panels(1, 1, 4.2, 0.34 * len(names))
        ax.set(xlim=(0, 1), ylim=(-0.2, len(names)))
        ax.axis("off")
        for floor, name in enumerate(names):
            ax.add_patch(Rectangle((0.05, floor), 0.7, 0.8, facecolor="#E8EEF4", edgecolor="#0072B2", linewidth=0.8))
            ax.text(0.4, floor + 0.4, name, ha="center", va="center", family="monospace")
        ax.annotate("", (0.83, 0.2), (0.83, len(names) - 0.3), arrowprops={"arrowstyle": "->", "color": "0.4"})
        ax.text(0.9, len(names) / 2, "imports", rotation=270, ha="center", va="center", color="0.3")
        return figure


def main() -> None:
    for path in sorted(RESULTS.glob("study-*-small.json")):
        study = json.loads(path.read_text())
        named = (re.search(r" (\w+)=", cell["row"]) for cell in study["cells"])
        factors = {found[1] for found in named if found} & FACTORS.keys()
        if path.stem in SCALING:
            picture = over_sizes(SCALING[path.stem])
        else:
            picture = over_factor(study, *factors) if factors else outcome(study, PUBLISHED.get(path.stem))
        save(picture, IMAGES / path.stem, [".svg"])
        if "geometry" in study:
            save(units(study), IMAGES / f"{path.stem}-units", [".svg"])
    save(drawn(maps()), IMAGES / "entropies", [".svg"])
    save(rooms(), IMAGES / "rooms", [".svg"])
    rows = published_reports()
    save(heatmaps([rows[row] for row in ("SM+LN+G", "SM+LN+R", "SM+G", "SM+R")]), IMAGES / "published", [".svg"])


if __name__ == "__main__":
    main()
