"""Laws of loss over parameters and tokens, and what they foretell, as tables and a page."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter

from ..analysis.drawing import STYLE, panels
from ..files import json_text, write_json
from ..provenance import command, environment
from ..studies.scaling import Point, by_row
from ..tables import Table, number
from .answer import look
from .plots import save
from .report import Block, Fold, Listing, Picture, Section, Verdict, write_report

LIMITS = (
    "What lies beyond the largest size is an extrapolation: its interval holds if loss goes on as it did, and says "
    "nothing about what has not been seen."
)


def scaling_tables(found: Mapping[str, Any]) -> list[Table]:
    """Of `scaling_summary`: laws, what was held out, gaps, overload; those that there are."""
    at = f"{found['target']['parameters']:.3g} parameters and {found['target']['tokens']:.3g} tokens"
    tables = []
    if found["laws"]:
        rows = [
            [row, *(number(law[key], ".3g") for key in ("E", "A", "alpha", "B", "beta")), with_interval(law)]
            for row, law in found["laws"].items()
        ]
        note = (
            f"Loss = E + A / parameters^alpha + B / tokens^beta, in nats; parameters are those outside embeddings. "
            f"Foretold: at {at}, in brackets 95 % of bootstrap replicates over seeds."
        )
        tables.append(Table(["row", "E", "A", "alpha", "B", "beta", "foretold loss"], rows, note))
    if found["held_out"]:
        rows = [
            [
                h["row"],
                f"{h['parameters']:.3g}",
                f"{h['tokens']:.3g}",
                number(h["seen"], ".3f"),
                number(h["foretold"], ".3f"),
            ]
            for h in found["held_out"]
        ]
        note = "The largest size, and what the law of the smaller sizes alone says of it."
        tables.append(Table(["row", "parameters", "tokens", "loss", "foretold"], rows, note))
    if gaps := [gap for gap in found["gaps"] if gap["foretold"] is not None]:
        rows = [
            [" to ".join(gap["rows"]), *(per_tenfold(c) for c in gap["coefficients"][1:]), percent(**gap["foretold"])]
            for gap in gaps
        ]
        note = (
            "How far the perplexity of one row is from that of another. Ten times the parameters or tokens: how far "
            f"the difference moves. Foretold: at {at}, with a 95 % prediction interval, which widens with the distance."
        )
        tables.append(Table(["rows", "ten times the parameters", "ten times the tokens", "foretold"], rows, note))
    if held := [(gap, each) for gap in found["gaps"] for each in gap["held_out"]]:
        rows = [
            [
                " to ".join(gap["rows"]),
                f"{each['parameters']:.3g}",
                f"{each['tokens']:.3g}",
                f"{100 * math.expm1(each['seen']):+.1f} %",
                percent(each["foretold"], each["half_width"]),
            ]
            for gap, each in held
        ]
        note = "The same at the largest size, a mean over seeds, and what the smaller sizes alone say of it."
        tables.append(Table(["rows", "parameters", "tokens", "seen", "foretold"], rows, note))
    if found["overload"]:
        rows = [[row, share_with_interval(share)] for row, share in found["overload"].items()]
        note = (
            f"The mean share of overloaded heads, foretold at {at} by a logistic function over the logarithms, with a "
            "95 % interval. It tends to 0 or 100 %: heads that stay overloaded whatever the size are not in it."
        )
        tables.append(Table(["row", "overloaded heads"], rows, note))
    return tables


def with_interval(law: Mapping[str, Any]) -> str:
    """The loss that a law foretells, with its interval."""
    ends = law["interval_95"]
    return number(law["loss"], ".3f") + (f" ({ends[0]:.3f} to {ends[1]:.3f})" if ends else "")


def share_with_interval(share: Mapping[str, float] | None) -> str:
    """In per cent with the ends of its interval."""
    if share is None:
        return "not to be told: too few shares between 0 and 100 %"
    mean, low, high = (100 * share[key] for key in ("share", "low", "high"))
    return f"{mean:.0f} % ({low:.0f} to {high:.0f})"


def per_tenfold(coefficient: float) -> str:
    """Of a logarithm of perplexity, in points of per cent."""
    return f"{100 * math.log(10) * coefficient:+.1f} points"


def percent(log_ratio: float, half_width: float) -> str:
    """A difference of log perplexities with its interval, as a difference in per cent with its ends."""
    middle, low, high = (100 * math.expm1(log_ratio + sign * half_width) for sign in (0, -1, 1))
    return f"{middle:+.1f} % ({low:+.1f} to {high:+.1f})"


def scaling_picture(points: Sequence[Point], found: Mapping[str, Any]) -> Figure:
    """Loss, the differences between rows, and overloaded heads, over parameters; a point is a run."""
    gaps, overload, at = found["gaps"], found["overload"], found["target"]["parameters"]
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(1 + bool(gaps) + bool(overload), 3, 3.8, 3.0)
        for ax in axes:
            ax.set(xscale="log", xlabel="parameters outside embeddings")
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
            ax.xaxis.set_minor_formatter(NullFormatter())
        rest = iter(axes)
        ax = next(rest)
        for index, (row, of_row) in enumerate(by_row(points).items()):
            over_parameters(ax, [(p.parameters, p.loss) for p in of_row], dots(row, index), row)
        ax.set(ylabel="loss (nats)")
        ax.legend(frameon=False, fontsize=7)
        if gaps:
            ax = next(rest)
            for index, gap in enumerate(gaps):
                name, values = " to ".join(gap["rows"]), [(n, y) for n, _, y in gap["points"]]
                over_parameters(ax, values, dots(name, index), name)
                if gap["foretold"] is not None:
                    mean, half = gap["foretold"].values()
                    foretell(ax, dots(name, index), at, (mean, mean - half, mean + half))
            ax.axhline(0, color="grey", linewidth=0.8)
            ax.set(ylabel="difference in loss (nats)")
            ax.legend(frameon=False, fontsize=7)
        if overload:
            ax = next(rest)
            for index, (row, of_row) in enumerate(by_row(points).items()):
                over_parameters(ax, [(p.parameters, p.overloaded) for p in of_row], dots(row, index), row)
                if overload.get(row) is not None:
                    foretell(ax, dots(row, index), at, tuple(overload[row].values()))
            ax.set(ylabel="overloaded heads", ylim=(-0.05, 1.05))
        return figure


def dots(row: str, index: int) -> dict[str, Any]:
    """How runs of a row look."""
    return look(row, index) | {"linestyle": "", "markersize": 3}


def over_parameters(ax: Axes, values: Sequence[tuple[float, float]], style: dict[str, Any], label: str) -> None:
    """Runs as points."""
    ax.plot([n for n, _ in values], [y for _, y in values], **style, label=label)


def foretell(ax: Axes, style: dict[str, Any], at: float, foretold: tuple[float, ...]) -> None:
    """What is foretold at a size: the mean, and the ends of its interval."""
    mean, low, high = foretold
    ends = [[mean - low], [high - mean]]
    ax.errorbar([at], [mean], ends, **style | {"marker": "D", "markersize": 4}, elinewidth=1, capsize=2)


def write_scaling_page(folder: str | Path, points: Sequence[Point], found: Mapping[str, Any], name: str) -> None:
    """Write `report.html`, the picture as SVG and PNG, and everything as JSON under `name`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figure = scaling_picture(points, found)
    save(figure, folder / "scaling")
    said = [
        f"Perplexity of {gap['rows'][0]} to {gap['rows'][1]}, foretold: {percent(**gap['foretold'])}."
        for gap in found["gaps"]
        if gap["foretold"] is not None
    ]
    rows = ", ".join(by_row(points))
    caption = "A dot is a run. Diamonds: what is foretold at the target, with its 95 % interval."
    blocks: list[Block] = [
        Verdict(" ".join(said) or f"{len(points)} runs of {rows}.", LIMITS),
        Picture(figure, caption, f"Loss, differences and overloaded heads over parameters, of {rows}."),
        *scaling_tables(found),
    ]
    about = {"command": command(), "environment": environment(), "runs": [point._asdict() for point in points]}
    write_json(folder / name, dict(found) | about)
    source = Section("Where the numbers are from", [Fold("Every run", [Listing(json_text(about))])])
    write_report(folder / "report.html", "From small models to large ones", rows, [Section("Scaling", blocks), source])
