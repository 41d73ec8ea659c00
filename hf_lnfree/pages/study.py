"""What a study shows: finished cells -> tables with intervals, pictures, and one page; published figures beside."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..analysis.entropy import causal_bound
from ..analysis.entropy_report import PAPER_RESULTS, EntropyReport, published_reports
from ..files import write_at_once
from ..provenance import command, environment
from ..studies.statistics import Estimate, estimate, relative_difference
from ..studies.study import Cell, Study
from ..tables import Table, latex, markdown
from .entropy import bucket_table
from .plots import curves, entropy_dynamics, heatmaps, layer_curves, layer_dynamics, save
from .report import Picture, Section, write_report

# What activations learn, as the recorder has it in the log.
LEARNED = (
    ("slope", "negative slope", "Learnable slopes."),
    ("gelu_share", "share of GELU", "Share of GELU in each layer's activation; the rest is ReLU."),
)
Rows = Mapping[str, Sequence[Cell]]


def by_row(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """The cells that have results, by row."""
    done = [cell for cell in cells if cell.results is not None]
    return {row: [c for c in done if c.row == row] for row in dict.fromkeys(c.row for c in done)}


def perplexities(cells: Sequence[Cell]) -> dict[int, float]:
    """By seed; NaN for a cell that diverged."""
    return {cell.seed: cell.results["eval_perplexity"] for cell in cells if cell.results is not None}


def paired(one: Sequence[Cell], other: Sequence[Cell]) -> Estimate | None:
    """Relative difference in perplexity of `one` to `other` over the seeds that both have."""
    ours, theirs = perplexities(one), perplexities(other)
    seeds = [seed for seed in ours if seed in theirs]
    return relative_difference([ours[s] for s in seeds], [theirs[s] for s in seeds]) if seeds else None


def share(cells: Sequence[Cell], which: str) -> str:
    reports = [cell.entropy for cell in cells if cell.entropy is not None]
    return estimate([getattr(r, which)("causal") for r in reports]).format(0, percent=True) if reports else ""


def summary_table(study: Study, rows: Rows) -> Table:
    """Perplexity, its relative difference to the first row (paired by seed), heads by entropy, and speed."""
    baseline = next(iter(rows))
    lines = []
    for row, cells in rows.items():
        gap = paired(cells, rows[baseline])
        diverged = [cell.seed for cell in cells if cell.results and cell.results["diverged_at"] is not None]
        speed = [cell.results["tokens_per_second"] for cell in cells if cell.results]
        lines.append(
            [
                row + (f" (diverged: seed {', '.join(map(str, diverged))})" if diverged else ""),
                str(len(cells)),
                estimate(list(perplexities(cells).values())).format(2),
                "" if row == baseline or gap is None else gap.format(1, percent=True, sign=True),
                share(cells, "overloaded"),
                share(cells, "collapsed"),
                f"{estimate(speed).mean:.0f}",
            ]
        )
    lengths = {cell.entropy.context_length for cells in rows.values() for cell in cells if cell.entropy is not None}
    bounds = ", ".join(f"{causal_bound(length):.3f} nats at T={length}" for length in sorted(lengths))
    several = any(len(cells) > 1 for cells in rows.values())
    interval = "mean ± 95 % interval over seeds (Student t)" if several else "one seed, so no interval"
    note = (
        f"Evaluation perplexity at the end of training; {interval}, differences paired by seed. Shares are of heads "
        f"whose mean entropy lies above 3/4, and at or below 1/4, of the causal bound (1/T) sum ln i: {bounds}."
    )
    for one, other in study.compare:
        if one in rows and other in rows and (gap := paired(rows[one], rows[other])) is not None:
            note += f" Perplexity of {one} to {other}: {gap.format(1, percent=True, sign=True)}."
    return Table(["row", "seeds", "perplexity", f"to {baseline}", ">3max/4", "≤max/4", "tokens/s"], lines, note)


def write_study_report(study: Study, cells: Sequence[Cell], folder: Path) -> Table | None:
    """`report.html`, `table.md`, `table.tex`, `summary.json` and each picture; None while nothing is finished."""
    rows = by_row(cells)
    if not rows:
        return None
    table = summary_table(study, rows)
    first = {row: done[0] for row, done in rows.items()}
    sections = [
        outcome(study, cells, table),
        head_entropies(study, first),
        training_dynamics(rows),
        losses(first),
        settings_and_hashes(cells),
    ]
    write_report(folder / "report.html", study.title, f"{study.scale} scale" if study.scale else "", sections)
    measured = [cell.entropy for cell in first.values() if cell.entropy is not None]
    if measured:
        save(heatmaps(measured), folder / "heatmaps.png", [".png"])
    (folder / "table.md").write_text(markdown(table))
    (folder / "table.tex").write_text(latex(table))
    write_at_once(folder / "summary.json", json.dumps(summary(study, cells, table), indent=1) + "\n")
    return table


def summary(study: Study, cells: Sequence[Cell], table: Table) -> dict[str, Any]:
    """What a program reads: the table, and every finished cell."""
    kept = ("eval_loss", "eval_perplexity", "tokens", "tokens_per_second", "diverged_at", "overloaded_heads",
            "collapsed_heads", "choices")  # fmt: skip
    done = [cell for cell in cells if cell.results is not None]
    return {
        "title": study.title,
        "scale": study.scale,
        "header": table.header,
        "rows": table.rows,
        "note": table.note,
        "cells": [
            {"row": c.row, "seed": c.seed, **{k: c.results[k] for k in kept if k in c.results}} | by_layer(c)
            for c in done
            if c.results is not None
        ],
        "settings": study.rows,
        "data": {
            split: {k: meta[k] for k in ("corpus", "corpus_sha256", "sha256")} for split, meta in data(done).items()
        },
        "environment": environment(),
        "command": command(),
    }


def by_layer(cell: Cell) -> dict[str, Any]:
    """Of every layer, at the end: mean entropy of its heads in nats, and what its activation learned; of that also a
    mean over layers at each step that was logged."""
    learned = [key for key, _, _ in LEARNED]
    found = {key: lines for key in ("entropy", *learned) if (lines := layer_curves(cell.log, key))}
    return {
        "layers": {key: [line[-1][1] for line in lines] for key, lines in found.items()},
        "over_training": {
            key: [(points[0][0], fmean(value for _, value in points)) for points in zip(*found[key], strict=True)]
            for key in learned
            if key in found
        },
    }


def data(done: Sequence[Cell]) -> dict[str, Any]:
    return done[0].results["data"] if done[0].results is not None else {}


def outcome(study: Study, cells: Sequence[Cell], table: Table) -> Section:
    tokens = sorted({cell.results["tokens"] for cell in cells if cell.results and cell.results["diverged_at"] is None})
    trained = f"Tokens a run: {', '.join(f'{t / 1e6:.2f}M' for t in tokens)}." if tokens else ""
    paragraphs = [text for text in (study.about, trained, unfinished(cells)) if text]
    tables = [table]
    diverged = [
        [cell.row, str(cell.seed), str(event["step"]), event["action"], event["verdict"], event["first"]]
        for cell in cells
        for event in (cell.results or {}).get("nonfinite_events", [])
    ]
    if diverged:
        header = ["row", "seed", "step", "action", "verdict", "first"]
        tables.append(Table(header, diverged, "Steps whose loss or gradient was not finite."))
    if study.published is not None:
        tables.append(published_perplexities(study.published))
    return Section("What came out", paragraphs, tables)


def unfinished(cells: Sequence[Cell]) -> str:
    """Which cells have no results, and why; "" when all have."""
    seeds: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        if cell.results is None:
            seeds.setdefault((cell.row, cell.state), []).append(str(cell.seed))
    found = [f"{row}, seed {', '.join(of_row)}: {state}" for (row, state), of_row in seeds.items()]
    return f"Not in the tables: {'; '.join(found)}." if found else ""


def published_perplexities(key: str) -> Table:
    """The paper's own figures, in a table of their own."""
    values = PAPER_RESULTS["eval_perplexity"][key]
    baseline = next(iter(values))
    rows = [
        [row, f"{v:.3f}", "" if row == baseline else f"{100 * (v / values[baseline] - 1):+.1f} %"]
        for row, v in values.items()
    ]
    note = f"Published, {key}: {PAPER_RESULTS['source']} Another tokenizer, other data, one seed."
    return Table(["row", "perplexity", f"to {baseline}"], rows, note)


def head_entropies(study: Study, first: Mapping[str, Cell]) -> Section:
    measured = {row: cell.entropy for row, cell in first.items() if cell.entropy is not None}
    if not measured:
        return Section("Entropy of every head at the end of training", ["No entropy report was asked for."])
    seed = next(iter(first.values())).seed
    published = {row: report for row, report in published_reports().items() if row in measured and study.published}
    shown: list[EntropyReport] = []
    for row, report in measured.items():
        shown += [report, published[row]] if row in published else [report]
    tables = [bucket_table([*measured.values()], "causal", f"measured here, seed {seed}")]
    if published:
        top = PAPER_RESULTS["bucket_maximum"]["value"]
        tables.append(bucket_table([*published.values()], top, "published, GPT-2 small, T=128"))
    caption = f"Measured here, seed {seed}."
    if published:
        caption = f"Measured here, seed {seed}; beside them published, {PAPER_RESULTS['source']}"
    return Section(
        "Entropy of every head at the end of training", tables=tables, figures=[Picture(heatmaps(shown), caption)]
    )


def training_dynamics(rows: Rows) -> Section:
    """By layer: entropy, residual stream and sparsity of each row's first seed; slopes of every seed."""
    first = {row: cells[0] for row, cells in rows.items()}
    figures = []
    probed = {row: cell for row, cell in first.items() if cell.curve("entropy/mean")}
    if probed:
        bounds = [float(cell.entropy.bound.max()) for cell in probed.values() if cell.entropy is not None]
        figure = entropy_dynamics({row: c.log for row, c in probed.items()}, max(bounds, default=None))
        seed = next(iter(probed.values())).seed
        figures.append(Picture(figure, f"Entropy by layer, held-out windows in eval mode, seed {seed}."))
        for key, label, caption in (
            ("residual_rms", "residual stream (RMS)", "Size of the residual stream after each block"),
            ("sparsity", "activations that are 0", "Share of the MLPs' activations that are exactly 0"),
        ):
            panels = {row: layer_curves(cell.log, key) for row, cell in probed.items()}
            figures.append(Picture(layer_dynamics(panels, label), f"{caption}, seed {seed}."))
    cells = [cell for done in rows.values() for cell in done]
    for key, label, caption in LEARNED:
        panels = {c.name: layer_curves(c.log, key) or [c.curve(f"{key}/global")] for c in cells}
        panels = {name: lines for name, lines in panels.items() if any(lines)}
        if panels:
            figures.append(Picture(layer_dynamics(panels, label), caption))
    return Section("Over training", figures=figures)


def losses(first: Mapping[str, Cell]) -> Section:
    seed = next(iter(first.values())).seed
    shown = {"loss": "Training loss, mean over each logging interval", "eval_loss": "Loss on held-out files"}
    figures = []
    for key, caption in shown.items():
        found = {row: cell.curve(key) for row, cell in first.items() if cell.curve(key)}
        if found:
            figures.append(Picture(curves(found, "step", "loss (nats/token)"), f"{caption}, seed {seed}."))
    return Section("Loss", figures=figures)


def settings_and_hashes(cells: Sequence[Cell]) -> Section:
    kept = ("command", "tokens", "parameters", "choices", "model", "arguments")
    done = [cell for cell in cells if cell.results is not None]
    details = {c.name: {key: c.results[key] for key in kept} for c in done if c.results is not None}
    blocks = {"environment": environment(), "data": data(done), **details}
    return Section(
        "Exact settings and hashes",
        [f"Command: {command()}"],
        details={name: json.dumps(block, indent=1, default=str) for name, block in blocks.items()},
    )
