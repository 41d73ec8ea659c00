"""The page of a study: its table, every head, curves over training, settings; published figures beside."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..analysis.entropy_report import PAPER_RESULTS, EntropyReport, published_reports
from ..files import json_text, write_json, write_text
from ..provenance import command, environment
from ..studies.cells import Cell
from ..studies.study import Study
from ..studies.summary import LEARNED, SUMMARY, Rows, by_row, data_of, summary, summary_table
from ..tables import Table, latex, markdown
from ..training.log import layer_curves
from .answer import QUESTION, answer_picture, answer_sentence, measured, published
from .entropy import bucket_table
from .plots import curves, entropy_dynamics, heatmaps, layer_dynamics, save
from .report import Picture, Section, write_report

CAPTIONS = {
    "slope": "Learnable slopes.",
    "gelu_share": "Share of GELU in each layer's activation; the rest is ReLU.",
}


def write_study_report(study: Study, cells: Sequence[Cell], folder: Path) -> Table | None:
    """`report.html`, `table.md`, `table.tex`, `summary.json` and each picture; None while nothing is finished."""
    rows = by_row(cells)
    if not rows:
        return None
    table = summary_table(study, rows)
    first = {row: done[0] for row, done in rows.items()}
    sections = [
        *answer(study, rows),
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
    write_text(folder / "table.md", markdown(table))
    write_text(folder / "table.tex", latex(table))
    write_json(folder / SUMMARY, summary(study, cells, table))
    return table


def answer(study: Study, rows: Rows) -> list[Section]:
    """The paper's question; none for a study without its rows."""
    sentence = answer_sentence(rows, study.published)
    if not sentence:
        return []
    outcomes = [measured(rows)] + ([published(study.published, list(rows))] if study.published else [])
    caption = (
        "Left: perplexity of every seed, relative to that of the first row. Right: by layer, the mean entropy "
        "of its heads as a share of the largest possible."
    )
    if study.published:
        caption += f" Below: {PAPER_RESULTS['source']}"
    return [Section(QUESTION, [sentence], figures=[Picture(answer_picture(outcomes), caption)])]


def outcome(study: Study, cells: Sequence[Cell], table: Table) -> Section:
    """The table of the study, its diverged steps, and published perplexities."""
    tokens = sorted({cell.results.tokens for cell in cells if cell.results and not cell.results.diverged})
    trained = f"Tokens a run: {', '.join(f'{t / 1e6:.2f}M' for t in tokens)}." if tokens else ""
    paragraphs = [text for text in (study.about, trained, unfinished(cells)) if text]
    tables = [table]
    diverged = [
        [cell.row, str(cell.seed), str(event["step"]), event["action"], event["verdict"], event["first"]]
        for cell in cells
        if cell.results is not None
        for event in cell.results.nonfinite_events
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
    """Heat maps and shares of heads of each row's first seed, published ones beside them."""
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
    for key, label in LEARNED.items():
        panels = {c.name: layer_curves(c.log, key) or [c.curve(f"{key}/global")] for c in cells}
        panels = {name: lines for name, lines in panels.items() if any(lines)}
        if panels:
            figures.append(Picture(layer_dynamics(panels, label), CAPTIONS[key]))
    return Section("Over training", figures=figures)


def losses(first: Mapping[str, Cell]) -> Section:
    """Training and held-out loss over steps, of each row's first seed."""
    seed = next(iter(first.values())).seed
    shown = {"loss": "Training loss, mean over each logging interval", "eval_loss": "Loss on held-out files"}
    figures = []
    for key, caption in shown.items():
        found = {row: cell.curve(key) for row, cell in first.items() if cell.curve(key)}
        if found:
            figures.append(Picture(curves(found, "step", "loss (nats/token)"), f"{caption}, seed {seed}."))
    return Section("Loss", figures=figures)


def settings_and_hashes(cells: Sequence[Cell]) -> Section:
    """What the numbers rest on, folded."""
    kept = ("command", "tokens", "parameters", "choices", "model", "arguments")
    details = {c.name: {key: getattr(c.results, key) for key in kept} for c in cells if c.results is not None}
    blocks = {"environment": environment(), "data": data_of(cells), **details}
    return Section(
        "Exact settings and hashes",
        [f"Command: {command()}"],
        details={name: json_text(block) for name, block in blocks.items()},
    )
