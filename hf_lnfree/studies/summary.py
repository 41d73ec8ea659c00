"""What a study says in numbers: cells by row, differences paired by seed, the table, and `summary.json`."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ..analysis.entropy_report import FEWEST_KEYS, EntropyReport
from ..provenance import command
from ..tables import Table
from ..training.log import layer_curves
from ..training.results import RunResults
from .cells import Cell
from .geometry import geometry_summary, over_training
from .statistics import MEASURES, Estimate, Measure, estimate
from .study import Study

SUMMARY = "summary.json"
TOO_SHORT = "too short"
LONGEST_IN_HEADER = 12  # characters of a row's name, for a table of 80
# What activations learn: the key of the recorder's log, and what it is.
LEARNED = {"slope": "negative slope", "gelu_share": "share of GELU"}
Rows = Mapping[str, Sequence[Cell]]


def by_row(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """The cells that have results, by row."""
    done = [cell for cell in cells if cell.results is not None]
    return {row: [c for c in done if c.row == row] for row in dict.fromkeys(c.row for c in done)}


def results(cells: Sequence[Cell]) -> dict[int, RunResults]:
    """By seed, of the cells that have some."""
    return {cell.seed: cell.results for cell in cells if cell.results is not None}


def scores(cells: Sequence[Cell]) -> dict[int, float]:
    """By seed the perplexity or accuracy; NaN for a cell that diverged."""
    return {seed: found.score for seed, found in results(cells).items()}


def measure_of(rows: Rows) -> Measure:
    """What the variants of a study are compared by."""
    return MEASURES[next(found.measure for cells in rows.values() for found in results(cells).values())]


def paired(one: Sequence[Cell], other: Sequence[Cell]) -> Estimate | None:
    """Relative difference in perplexity, or difference in accuracy, of `one` to `other` over the seeds of both."""
    ours, theirs = scores(one), scores(other)
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return None
    return measure_of({"": one}).gap([ours[s] for s in seeds], [theirs[s] for s in seeds])


def share(cells: Sequence[Cell], which: str) -> str:
    """
    Of heads that are "overloaded" or "collapsed", of each part of the model by itself; "" where no entropies were
    measured; "too short" for a verdict.
    """
    reports = [cell.entropy for cell in cells if cell.entropy is not None]
    if any(report.too_short for report in reports):
        return TOO_SHORT
    shares = ([getattr(r, which)("causal", part) for r in reports] for part in parts_in(cells))
    return " / ".join(estimate(of_part).format(0, percent=True) for of_part in shares) if reports else ""


def layer_shares(reports: Sequence[EntropyReport]) -> dict[str, list[float]]:
    """By part of the model, of every layer the mean over reports and heads of entropy / bound."""
    found: dict[str, list[float]] = {}
    shares = [report.share.double().nanmean(dim=1).tolist() for report in reports]
    for part, *layer in zip(reports[0].part_names, *shares, strict=True):
        found.setdefault(part, []).append(fmean(layer))
    return found


def parts_in(cells: Sequence[Cell]) -> list[str]:
    """The parts of the model, by their short names; [""] for a model of one part."""
    report = next((cell.entropy for cell in cells if cell.entropy is not None), None)
    return list(dict.fromkeys(report.part_names)) if report is not None else [""]


def bounds_of(rows: Rows) -> str:
    """The largest mean entropies that heads could have, by part of the model."""
    found: dict[str, None] = {}
    reports = [cell.entropy for cells in rows.values() for cell in cells if cell.entropy is not None]
    for report in reports:
        for part in dict.fromkeys(report.part_names):
            kinds = {k for k, name in zip(report.kinds, report.part_names, strict=False) if name == part}
            nats = f"{float(report.bound[report.heads_of(part)].mean()):.3f} nats"
            length = (
                "" if part else f"T={report.context_length}"
            )  # an encoder and its decoder have lengths of their own
            words = dict.fromkeys(filter(None, [part, " and ".join(sorted(kinds)), length]))
            found[f"{nats} ({', '.join(words)})"] = None
    return ", ".join(found)


def data_of(cells: Sequence[Cell]) -> dict[str, Any]:
    """What the first cell that has results was trained and evaluated on."""
    return next((found.data for found in results(cells).values()), {})


def summary_table(study: Study, rows: Rows) -> Table:
    """Perplexity or accuracy, the difference to the first row (paired by seed), heads by entropy, by row."""
    baseline, measure = next(iter(rows)), measure_of(rows)
    lines = []
    for row, cells in rows.items():
        gap, found = paired(cells, rows[baseline]), results(cells)
        diverged = [str(seed) for seed, of_seed in found.items() if of_seed.diverged]
        lines.append(
            [
                row + (f" (diverged: seed {', '.join(diverged)})" if diverged else ""),
                str(len(cells)),
                measure.format(estimate(list(scores(cells).values()))),
                "" if row == baseline or gap is None else measure.format_gap(gap),
                share(cells, "overloaded"),
                share(cells, "collapsed"),
            ]
        )
    several = any(len(cells) > 1 for cells in rows.values())
    interval = "mean ± 95 % interval over seeds (Student t)" if several else "one seed, so no interval"
    note = (
        f"Evaluation {measure.name} at the end of training; {interval}, differences paired by seed. Overloaded, "
        "collapsed: shares of heads whose mean entropy lies above 3/4, and at or below 1/4, of the largest that the "
        "keys they may attend to allow: "
        f"{bounds_of(rows)}."
    )
    if any(TOO_SHORT in line for line in lines):
        note += f" Too short: no query has {FEWEST_KEYS} keys, and with fewer even random heads are near their maximum."
    for one, other in study.compare:
        if one in rows and other in rows and (gap := paired(rows[one], rows[other])) is not None:
            note += f" {measure.name.capitalize()} of {one} to {other}: {measure.format_gap(gap)}."
    to = f"to {baseline}" if len(baseline) <= LONGEST_IN_HEADER else "to the first"
    parts = list(filter(None, parts_in([cell for cells in rows.values() for cell in cells])))
    heads = [f"{which} ({' / '.join(parts)})" if parts else which for which in ("overloaded", "collapsed")]
    return Table(["row", "seeds", measure.name, to, *heads], lines, note)


def summary(study: Study, cells: Sequence[Cell], table: Table) -> dict[str, Any]:
    """What `summary.json` holds: the table, and every finished cell."""
    return {
        "title": study.title,
        "scale": study.scale,
        "header": table.header,
        "rows": table.rows,
        "note": table.note,
        "cells": [
            {
                "row": cell.row,
                "seed": cell.seed,
                **kept(cell.results),
                **heads_of(cell),
                **by_layer(cell),
                **over_training(cell),
            }
            for cell in cells
            if cell.results is not None
        ],
        **({"geometry": found} if (found := geometry_summary(by_row(cells), study.compare)) else {}),
        "settings": study.rows,
        "data": {
            split: {k: meta[k] for k in ("corpus", "corpus_sha256", "sha256")} for split, meta in data_of(cells).items()
        },
        "environment": environment_of(cells),
        "command": command(),
    }


def environment_of(cells: Sequence[Cell]) -> dict[str, Any]:
    """Where the cells were trained, which need not be where they are summarised: a list for what differs among them."""
    found = [of_cell.environment for cell in cells for of_cell in results([cell]).values()]
    values = {key: list(dict.fromkeys(of_cell.get(key) for of_cell in found)) for key in found[0]}
    return {key: seen[0] if len(seen) == 1 else seen for key, seen in values.items()}


def kept(found: RunResults) -> dict[str, Any]:
    """Of one cell; shares of heads where they were measured, the size where it was noted."""
    keys = ("eval_loss", f"eval_{found.measure}", "tokens", "tokens_per_second", "diverged_at", "choices")
    later = ("overloaded_heads", "collapsed_heads", "parameters_outside_embeddings")
    shares = {key: getattr(found, key) for key in later}
    return {key: getattr(found, key) for key in keys} | {k: v for k, v in shares.items() if v is not None}


def heads_of(cell: Cell) -> dict[str, Any]:
    """Of each part of the model: shares of overloaded and collapsed heads, and of every layer entropy / bound."""
    report = cell.entropy
    if report is None:
        return {}
    layers = layer_shares([report])
    return {
        "parts": {
            part: {
                "overloaded_heads": report.overloaded("causal", part),
                "collapsed_heads": report.collapsed("causal", part),
                "entropy_to_bound": layers[part],
            }
            for part in layers
        }
    }


def by_layer(cell: Cell) -> dict[str, Any]:
    """Of every layer, at the end: mean entropy of its heads in nats, and what its activation learned; of that also a
    mean over layers at each step that was logged."""
    found = {
        key + (f"/{part}" if part else ""): lines
        for key in ("entropy", *LEARNED)
        for part, lines in layer_curves(cell.log, key).items()
    }
    return {
        "layers": {key: [line[-1][1] for line in lines] for key, lines in found.items()},
        "over_training": {
            key: [(points[0][0], fmean(value for _, value in points)) for points in zip(*lines, strict=True)]
            for key, lines in found.items()
            if not key.startswith("entropy")
        },
    }
