"""The pictures of entropic-overload.md and of the findings. Usage: python docs/pictures.py"""

import json
from collections import defaultdict
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure

from hf_lnfree.analysis import attention_entropy, causal_bound, published_reports
from hf_lnfree.analysis.plots import STYLE, heatmaps, panels, save

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
    """Perplexity of every seed by row, and the entropy of every layer at the end, a mean over seeds."""
    cells = defaultdict(list)
    for cell in study["cells"]:
        cells[cell["row"]].append(cell)
    with matplotlib.rc_context(STYLE):
        figure, (left, right) = panels(2, 2, 4.2, 0.8 + 0.28 * len(cells))
        figure.set_layout_engine("compressed")
        for index, (row, done) in enumerate(cells.items()):
            colour, line = f"C{index}", "-" if index < COLOURS else "--"
            left.plot([cell["eval_perplexity"] for cell in done], [index] * len(done), "o", color=colour, alpha=0.7)
            layers = torch.tensor([cell["layers"]["entropy"] for cell in done]).mean(0)
            right.plot(range(1, len(layers) + 1), layers, line, label=row, color=colour, linewidth=1.3)
        left.set(yticks=range(len(cells)), yticklabels=list(cells), xlabel="perplexity, one point a seed")
        left.invert_yaxis()
        (length,) = {settings["context_length"] for settings in study["settings"].values()}
        bound = causal_bound(length)
        right.axhline(bound, color="0.5", linewidth=0.8, linestyle="--")
        right.set(xlabel="layer", ylabel="mean entropy (nats)", ylim=(0, bound * 1.05))
        right.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        for ax in (left, right):
            ax.grid(alpha=0.25, linewidth=0.5)
        return figure


def main() -> None:
    for path in sorted((IMAGES.parents[1] / "benchmarks" / "results").glob("study-*-cpu.json")):
        study = json.loads(path.read_text())
        if all("layers" in cell for cell in study["cells"]):
            save(outcome(study), IMAGES / path.stem, [".svg"])
    save(drawn(maps()), IMAGES / "entropies", [".svg"])
    published = published_reports()
    save(heatmaps([published[row] for row in ("SM+LN+G", "SM+LN+R", "SM+G", "SM+R")]), IMAGES / "published", [".svg"])


if __name__ == "__main__":
    main()
