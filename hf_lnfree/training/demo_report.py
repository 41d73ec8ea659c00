"""What the demo shows: finished runs -> a table and a page."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..analysis.entropy import causal_bound
from ..analysis.entropy_page import bucket_table
from ..analysis.entropy_report import PAPER_RESULTS, EntropyReport, published_reports
from ..analysis.plots import curves, entropy_dynamics, heatmaps, save
from ..analysis.report import Picture, Section, Table, write_report
from ..provenance import command
from .statistics import estimate, relative_difference


@dataclass
class DemoRun:
    """One row with one seed: what its folder holds."""

    row: str
    seed: int
    results: dict[str, Any]
    entropy: EntropyReport
    log: list[dict[str, Any]]

    @classmethod
    def load(cls, row: str, seed: int, folder: Path) -> "DemoRun":
        lines = (folder / "log.jsonl").read_text().splitlines()
        results = json.loads((folder / "results.json").read_text())
        return cls(row, seed, results, EntropyReport.load(folder / "entropy.json"), [json.loads(x) for x in lines])

    def curve(self, key: str) -> list[tuple[float, float]]:
        return [(entry["step"], entry[key]) for entry in self.log if key in entry]


def by_row(runs: Sequence[DemoRun]) -> dict[str, list[DemoRun]]:
    return {row: [r for r in runs if r.row == row] for row in dict.fromkeys(r.row for r in runs)}


def summary_table(runs: Sequence[DemoRun]) -> Table:
    """Perplexity, its relative difference to the first row (paired by seed), speed, and overloaded heads."""
    grouped = by_row(runs)
    perplexity = {row: [r.results["eval_perplexity"] for r in group] for row, group in grouped.items()}
    baseline = next(iter(perplexity))
    rows = []
    for row, group in grouped.items():
        gap = relative_difference(perplexity[row], perplexity[baseline])
        diverged = [r.seed for r in group if r.results["diverged_at"] is not None]
        rows.append(
            [
                row + (f" (diverged: seed {', '.join(map(str, diverged))})" if diverged else ""),
                estimate(perplexity[row]).format(2),
                "" if row == baseline else gap.format(1, percent=True, sign=True),
                estimate([r.entropy.overloaded("causal") for r in group]).format(0, percent=True),
                estimate([r.entropy.collapsed("causal") for r in group]).format(0, percent=True),
                f"{estimate([r.results['tokens_per_second'] for r in group]).mean:.0f}",
            ]
        )
    seeds = len(next(iter(grouped.values())))
    interval = f"mean ± 95 % interval over {seeds} seeds" if seeds > 1 else "one seed, so no interval"
    without_norm = ""
    if {"SM+R", "SM+G"} <= perplexity.keys():
        relu = relative_difference(perplexity["SM+R"], perplexity["SM+G"]).format(1, percent=True, sign=True)
        without_norm = f" Without LayerNorm, the perplexity of ReLU (SM+R) to that of GELU (SM+G): {relu}."
    return Table(
        ["row", "perplexity", f"to {baseline}", ">3max/4", "≤max/4", "tokens/s"],
        rows,
        f"Evaluation perplexity at the end of training; {interval}. The shares are of heads whose mean entropy lies "
        f"above 3/4, and at or below 1/4, of the causal bound: max = (1/T) sum ln i = "
        f"{causal_bound(runs[0].entropy.context_length):.3f} nats.{without_norm}",
    )


def write_demo_report(folder: Path, runs: Sequence[DemoRun], table: Table) -> None:
    """`report.html`: what came out, heatmaps beside the published ones, dynamics, losses, settings and hashes.
    `heatmaps.png`: the measured heatmaps alone."""
    first = {row: group[0] for row, group in by_row(runs).items()}
    example = next(iter(first.values()))
    sections = [
        outcome(example, table),
        head_entropies(first),
        Section("Entropy by layer over training", figures=[dynamics(first)]),
        Section(
            "Loss",
            figures=[
                loss_curves(
                    first, "loss", "training loss (nats/token)", "Training loss, mean over each logging interval"
                ),
                loss_curves(first, "eval_loss", "evaluation loss (nats/token)", "Loss on held-out files"),
            ],
        ),
        settings_and_hashes(runs),
    ]
    title = "LayerNorm-free language models: four rows"
    write_report(folder / "report.html", title, "Report of hf-lnfree demo.", sections)
    save(heatmaps([run.entropy for run in first.values()]), folder / "heatmaps.png", [".png"])


def outcome(example: DemoRun, table: Table) -> Section:
    layers, heads = example.entropy.entropy.shape
    config = example.results["model"]
    return Section(
        "What came out",
        [
            f"Each row was trained from scratch on {example.results['tokens'] / 1e6:.2f}M tokens of Python's standard "
            f"library, with {layers} layers of width {config['n_embd']} and {heads} heads. "
            "SM softmax attention, LN LayerNorm in the blocks, G GELU, R ReLU.",
            "The paper trains 124M parameters on 2.1B tokens. A run of this size shows the mechanism at most; it "
            "neither confirms nor refutes the paper's figures.",
        ],
        [table],
    )


def head_entropies(first: dict[str, DemoRun]) -> Section:
    published = {row: report for row, report in published_reports().items() if row in first}
    pairs = [report for row in published for report in (first[row].entropy, published[row])]
    seed = next(iter(first.values())).seed
    return Section(
        "Entropy of every head at the end of training",
        tables=[
            bucket_table([run.entropy for run in first.values()], "causal", f"measured here, seed {seed}"),
            bucket_table(
                [*published.values()], PAPER_RESULTS["bucket_maximum"]["value"], "published, GPT-2 small, T=128"
            ),
            published_perplexities(list(first)),
        ],
        figures=[
            Picture(heatmaps(pairs), f"Left: measured here, seed {seed}. Right: published, {PAPER_RESULTS['source']}")
        ],
    )


def dynamics(first: dict[str, DemoRun]) -> Picture:
    example = next(iter(first.values()))
    figure = entropy_dynamics({row: run.log for row, run in first.items()}, float(example.entropy.bound.max()))
    return Picture(figure, f"Held-out probe batch in eval mode, seed {example.seed}.")


def loss_curves(first: dict[str, DemoRun], key: str, label: str, caption: str) -> Picture:
    seed = next(iter(first.values())).seed
    return Picture(
        curves({row: run.curve(key) for row, run in first.items()}, "step", label), f"{caption}, seed {seed}."
    )


def settings_and_hashes(runs: Sequence[DemoRun]) -> Section:
    kept = ("command", "tokens", "parameters", "model", "arguments")
    details = {f"{r.row}, seed {r.seed}": {key: r.results[key] for key in kept} for r in runs}
    blocks = {"environment": runs[0].results["environment"], "data": runs[0].results["data"], **details}
    return Section(
        "Exact settings and hashes",
        [f"Command: {command()}"],
        details={name: json.dumps(block, indent=1) for name, block in blocks.items()},
    )


def published_perplexities(rows: Sequence[str]) -> Table:
    settings = PAPER_RESULTS["eval_perplexity"]
    shown = [row for row in rows if all(row in values for values in settings.values())]
    cells = [[row, *(f"{values[row]:.3f}" for values in settings.values())] for row in shown]
    return Table(["row", *settings], cells, "Published evaluation perplexities; another tokenizer and other data.")
