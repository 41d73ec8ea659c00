"""The pictures of entropic-overload.md, architecture.md and the findings. Usage: python docs/pictures.py"""

import json
import runpy
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hf_lnfree.analysis import attention_entropy, causal_bound, published_reports
from hf_lnfree.pages.plots import STYLE, heatmaps, panels, plain_ticks, save
from hf_lnfree.studies.summary import LEARNED

IMAGES = Path(__file__).parent / "images"
T = 24
COLOURS = len(STYLE["axes.prop_cycle"])


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


def outcome(study: dict) -> Figure:
    """Perplexity of every seed by row; entropy of every layer at the end, a mean over the seeds that did not diverge;
    where activations learn something, that too, and the mean over layers while each seed trains."""
    rows = defaultdict(list)
    for cell in study["cells"]:
        rows[cell["row"]].append(cell)
    logged = {key for cell in study["cells"] for key in cell.get("over_training", ())}
    learned = {key: label for key, label in LEARNED.items() if key in logged}
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(2 + 2 * len(learned), 2, 4.2, max(2.9, 0.8 + 0.28 * len(rows)))
        perplexity, entropy, *others = axes
        for index, (row, cells) in enumerate(rows.items()):
            style = {"color": f"C{index}", "linestyle": "-" if index < COLOURS else "--", "linewidth": 1.3}
            perplexity.plot(
                [cell["eval_perplexity"] for cell in cells], [index] * len(cells), "o", color=style["color"]
            )
            drawn_by_layer(entropy, cells, "entropy", label=row, **style)
            for key, at_end, over_training in zip(learned, others[::2], others[1::2], strict=True):
                if all(key in cell.get("over_training", ()) for cell in cells):
                    drawn_by_layer(at_end, cells, key, **style)
                    for cell in cells:
                        over_training.plot(*zip(*cell["over_training"][key], strict=True), **style | {"linewidth": 0.7})
        perplexity.set(yticks=range(len(rows)), yticklabels=list(rows), xlabel="perplexity, one point a seed")
        perplexity.invert_yaxis()
        (length,) = {settings["context_length"] for settings in study["settings"].values()}
        bound = causal_bound(length)
        entropy.axhline(bound, color="0.5", linewidth=0.8, linestyle="--")
        entropy.set(xlabel="layer", ylabel="mean entropy (nats)", ylim=(0, bound * 1.05))
        entropy.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        for (key, label), at_end, over_training in zip(learned.items(), others[::2], others[1::2], strict=True):
            at_end.set(xlabel="layer", ylabel=f"{label} at the end")
            over_training.set(xlabel="step", ylabel=f"{label}, mean of the layers")
            if key == "slope":  # from -0.1 to 1
                for ax in (at_end, over_training):
                    ax.set_yscale("symlog", linthresh=0.1)
                    plain_ticks(ax.yaxis)
        for ax in axes:
            ax.grid(alpha=0.25, linewidth=0.5)
        return figure


def drawn_by_layer(ax: Axes, cells: list[dict], key: str, **style: Any) -> None:
    found = [cell["layers"][key] for cell in cells if cell["diverged_at"] is None]
    values = torch.tensor(found).mean(0).tolist() if found else []
    ax.plot(values, **style)


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
    for path in sorted((IMAGES.parents[1] / "benchmarks" / "results").glob("study-*-cpu.json")):
        study = json.loads(path.read_text())
        if all("layers" in cell for cell in study["cells"]):
            save(outcome(study), IMAGES / path.stem, [".svg"])
    save(drawn(maps()), IMAGES / "entropies", [".svg"])
    save(rooms(), IMAGES / "rooms", [".svg"])
    published = published_reports()
    save(heatmaps([published[row] for row in ("SM+LN+G", "SM+LN+R", "SM+G", "SM+R")]), IMAGES / "published", [".svg"])


if __name__ == "__main__":
    main()
