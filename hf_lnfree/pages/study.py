"""The page of a study: its table, every head, curves over training, settings; published figures beside."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..analysis.entropy_report import PAPER_RESULTS, published_reports
from ..files import json_text, write_json, write_text
from ..provenance import command, environment
from ..studies.cells import Cell
from ..studies.study import Study
from ..studies.summary import LEARNED, SUMMARY, Rows, by_row, data_of, measure_of, summary, summary_table
from ..tables import Table, latex, markdown
from ..training.log import layer_panels
from .answer import QUESTION, answer_picture, answer_sentence, best_row, limits, measured, published
from .differences import curves_and_differences
from .heads import bucket_table
from .plots import entropy_dynamics, heatmaps, layer_dynamics, save
from .report import Block, Choice, Fold, Listing, Picture, Section, Verdict, write_report
from .study_geometry import geometry_section
from .timeline import head_timeline

LOSSES = {"loss": "Training loss, mean over each logging interval", "eval_loss": "Loss on held-out files"}
DYNAMICS = (
    ("residual_rms", "residual stream (RMS)", "Size of the residual stream after each block"),
    ("sparsity", "activations that are 0", "Share of the MLPs' activations that are exactly 0"),
    ("specialisation", "specialisation", "How much less the units of an MLP fire together than chance would have it"),
    ("between_share/next_token", "variance between classes", "Share of a unit's variance between next tokens"),
    ("between_share/label", "variance between classes", "Share of a unit's variance between labels"),
    ("within_selectivity/next_token", "selectivity within classes", "How selective units are within a next token"),
    ("within_selectivity/label", "selectivity within classes", "How selective units are within a label"),
    ("row_participation_ratio_post", "participation ratio", "How many directions the activations of an MLP use"),
    ("participation_gain", "participation gain", "Directions after the activation divided by those before it"),
    ("frequency", "firing frequency", "How often the units of an MLP fire"),
)
"""Key of the log, what a picture of it has at its side, and what it says."""
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
    sections = [
        answer(study, rows),
        outcome(study, cells, table),
        head_entropies(study, rows),
        geometry_section(rows, study.compare),
        *training_dynamics(rows),
        losses(rows),
        settings_and_hashes(cells),
    ]
    sections = [section for section in sections if section.blocks]
    write_report(folder / "report.html", study.title, f"{study.scale} scale" if study.scale else "", sections)
    measured = [done[0].entropy for done in rows.values() if done[0].entropy is not None]
    if measured:
        save(heatmaps(measured), folder / "heatmaps.png", [".png"])
    write_text(folder / "table.md", markdown(table))
    write_text(folder / "table.tex", latex(table))
    write_json(folder / SUMMARY, summary(study, cells, table))
    return table


def answer(study: Study, rows: Rows) -> Section:
    """The paper's question and its picture; which variant came out best in a study without the paper's."""
    said = answer_sentence(rows, study.published)
    if not said:
        return Section("Verdict", [Verdict(best_row(rows), limits(rows))])
    outcomes = [measured(rows)] + ([published(study.published, list(rows))] if study.published else [])
    measure = measure_of(rows).name
    caption = (
        f"Left: {measure} of every seed, beside that of the first variant. Right: by layer, the mean entropy "
        "of its heads as a share of the largest possible."
    )
    if study.published:
        caption += f" Below: {PAPER_RESULTS['source']}"
    alt = f"Points: {measure} of each seed of {', '.join(rows)}. Lines: mean entropy of the heads of each layer."
    return Section(QUESTION, [Verdict(said, limits(rows)), Picture(answer_picture(outcomes), caption, alt)])


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
    return Section("What came out", [*tables, *paragraphs])


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


def by_seed(rows: Rows) -> dict[int, dict[str, Cell]]:
    """Of every seed its finished cells, by variant."""
    seeds = dict.fromkeys(cell.seed for cells in rows.values() for cell in cells)
    return {seed: {cell.row: cell for cells in rows.values() for cell in cells if cell.seed == seed} for seed in seeds}


def for_each_seed(rows: Rows, draw: Callable[[dict[str, Cell]], Sequence[Block]]) -> list[Block]:
    """What `draw` makes of each seed's cells, to choose from; nothing to choose where one seed has something."""
    options = {str(seed): blocks for seed, of_seed in by_seed(rows).items() if (blocks := draw(of_seed))}
    if len(options) > 1:
        return [Choice("seed", options)]
    return [block for blocks in options.values() for block in blocks]


def head_entropies(study: Study, rows: Rows) -> Section:
    """Shares of heads, a heat map of each variant, and the way there, for every seed; published ones below them."""

    def draw(of_seed: dict[str, Cell]) -> Sequence[Block]:
        found = {row: cell for row, cell in of_seed.items() if cell.entropy is not None}
        reports = [replace(cell.entropy, name=row) for row, cell in found.items() if cell.entropy is not None]
        seed = next(iter(of_seed.values())).seed
        timeline = head_timeline(of_seed, seed)
        over_training = [] if timeline is None else [timeline]
        if not reports:
            return over_training
        caption = f"Measured here, seed {seed}. Under the pointer: what each head is."
        alt = f"Heat maps of the mean attention entropy of every head, seed {seed}, of {', '.join(found)}."
        return [
            bucket_table(reports, "causal", f"measured here, seed {seed}"),
            Picture(heatmaps(reports), caption, alt),
            *over_training,
        ]

    heading = "Entropy of every head at the end of training"
    blocks = for_each_seed(rows, draw)
    if not any(cell.entropy for cells in rows.values() for cell in cells):
        return Section(heading, ["No entropy report was asked for.", *blocks])
    reports = [report for row, report in published_reports().items() if row in rows and study.published]
    if reports:
        top = PAPER_RESULTS["bucket_maximum"]["value"]
        alt = (
            f"Heat maps of the published mean attention entropy of every head, of {', '.join(r.name for r in reports)}."
        )
        blocks += [
            bucket_table(reports, top, "published, GPT-2 small, T=128"),
            Picture(heatmaps(reports, maximum=top), f"Published, {PAPER_RESULTS['source']}", alt),
        ]
    return Section(heading, blocks)


def training_dynamics(rows: Rows) -> list[Section]:
    """By layer: entropy, residual stream and sparsity of each variant, for every seed; what activations learned."""

    def draw(of_seed: dict[str, Cell]) -> Sequence[Block]:
        probed = {row: cell for row, cell in of_seed.items() if cell.curve("entropy/mean")}
        if not probed:
            return []
        bounds = {row: cell.entropy.part_bounds for row, cell in probed.items() if cell.entropy is not None}
        seed = next(iter(probed.values())).seed
        figure = entropy_dynamics({row: c.log for row, c in probed.items()}, bounds)
        caption = f"Mean entropy by layer, held-out windows in eval mode, seed {seed}."
        pictures = [Picture(figure, caption, f"A curve for each layer over steps. {caption}")]
        for key, label, caption in DYNAMICS:
            panels = {
                name: curves
                for row, cell in probed.items()
                for name, curves in layer_panels(row, cell.log, key).items()
            }
            if not panels:  # the geometry of MLPs is only sampled when asked for
                continue
            caption = f"{caption}, seed {seed}."
            pictures.append(
                Picture(layer_dynamics(panels, label), caption, f"A curve for each layer over steps. {caption}")
            )
        return pictures

    cells = [cell for done in rows.values() for cell in done]
    learned: list[Block] = []
    for key, label in LEARNED.items():
        found = (layer_panels(c.name, c.log, key) or {c.name: [c.curve(f"{key}/global")]} for c in cells)
        panels = {name: lines for of_cell in found for name, lines in of_cell.items() if any(lines)}
        if panels:
            alt = f"A curve for each layer over steps, of {', '.join(panels)}. {CAPTIONS[key]}"
            learned.append(Picture(layer_dynamics(panels, label), CAPTIONS[key], alt))
    return [Section("Over training", for_each_seed(rows, draw)), Section("What activations learn", learned)]


def losses(rows: Rows) -> Section:
    """Training and held-out loss over steps, and how far each variant is from the first, for every seed."""

    def draw(of_seed: dict[str, Cell]) -> Sequence[Block]:
        pictures = []
        for key, caption in LOSSES.items():
            found = {row: cell.curve(key) for row, cell in of_seed.items() if cell.curve(key)}
            if found:
                seed = next(iter(of_seed.values())).seed
                first, *others = found
                caption = f"{caption}, seed {seed}."
                caption += f" Right: the loss of each variant minus that of {first} at the same step." if others else ""
                alt = f"Curves of the loss over steps of {', '.join(found)}. {caption}"
                unit = "image" if measure_of(rows).name == "accuracy" else "token"
                pictures.append(Picture(curves_and_differences(found, "step", f"loss (nats/{unit})"), caption, alt))
        return pictures

    return Section("Loss", for_each_seed(rows, draw))


def settings_and_hashes(cells: Sequence[Cell]) -> Section:
    """What the numbers rest on, folded."""
    kept = ("command", "tokens", "parameters", "choices", "model", "arguments")
    details = {c.name: {key: getattr(c.results, key) for key in kept} for c in cells if c.results is not None}
    blocks = {"environment": environment(), "data": data_of(cells), **details}
    return Section(
        "Exact settings and hashes",
        [f"Command: {command()}", *(Fold(name, [Listing(json_text(block))]) for name, block in blocks.items())],
    )
