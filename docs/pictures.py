"""The pictures of entropic-overload.md. Usage: python docs/pictures.py"""

from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure

from hf_lnfree.analysis import attention_entropy, causal_bound, published_reports
from hf_lnfree.analysis.plots import STYLE, heatmaps, panels, save

IMAGES = Path(__file__).parent / "images"
T = 24


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


def main() -> None:
    save(drawn(maps()), IMAGES / "entropies", [".svg"])
    published = published_reports()
    save(heatmaps([published[row] for row in ("SM+LN+G", "SM+LN+R", "SM+G", "SM+R")]), IMAGES / "published", [".svg"])


if __name__ == "__main__":
    main()
