"""The demo: the paper's four rows from scratch on real text, at a size for two cores, as a table and a page."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..analysis.entropy import causal_bound
from ..analysis.entropy_report import PAPER_RESULTS, EntropyReport, published_reports
from ..analysis.plots import curves, heatmaps, layer_dynamics
from ..analysis.report import Picture, Section, Table, write_report
from .arguments import LNFreeTrainingArguments, ModelArguments
from .data import DataArguments
from .provenance import command, environment
from .recipes import MAIN_ROWS
from .run import train
from .statistics import estimate, relative_difference

BASELINE = MAIN_ROWS[0]


@dataclass(frozen=True)
class DemoSettings:
    """Small enough for ten minutes on two cores. The paper: 12 layers, d 768, 2.1B tokens a row."""

    n_layer: int = 8
    n_embd: int = 96
    n_head: int = 8
    # The paper's 0.02 at d=768, scaled by sqrt(768/96): with 0.02 itself attention stays untrained at this width.
    initializer_range: float = 0.057
    vocab_size: int = 2048
    context_length: int = 128
    batch_size: int = 8
    steps: int = 900
    learning_rate: float = 2e-3
    validation_windows: int = 256

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_size * self.context_length

    def arguments(
        self, row: str, seed: int, folder: Path, cache_dir: str | None, use_cpu: bool
    ) -> tuple[ModelArguments, DataArguments, LNFreeTrainingArguments]:
        """What `hf-lnfree train` would be told for one row and seed; optimiser as in the paper."""
        overrides = {name: getattr(self, name) for name in ("n_layer", "n_embd", "n_head", "initializer_range")}
        model = ModelArguments(row=row, config_overrides=json.dumps(overrides | {"n_positions": self.context_length}))
        data = DataArguments(
            vocab_size=self.vocab_size,
            context_length=self.context_length,
            max_validation_windows=self.validation_windows,
            cache_dir=cache_dir,
        )
        training = LNFreeTrainingArguments(
            output_dir=str(folder),
            max_steps=self.steps,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=32,
            learning_rate=self.learning_rate,
            weight_decay=0.1,
            warmup_steps=0.05,
            max_grad_norm=1.0,
            logging_steps=max(1, self.steps // 25),
            eval_strategy="steps",
            eval_steps=max(1, self.steps // 5),
            probe_steps=max(1, self.steps // 25),
            save_strategy="no",
            seed=seed,
            use_cpu=use_cpu,
        )
        return model, data, training


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


def run_demo(
    output_dir: Path,
    seeds: Sequence[int] = (0,),
    rows: Sequence[str] = MAIN_ROWS,
    settings: DemoSettings | None = None,
    cache_dir: str | None = None,
    use_cpu: bool = False,
    announce: Callable[[str], None] = print,
) -> list[DemoRun]:
    """
    Train every row with every seed into `output_dir/ROW/seed-N`, skipping those that are finished, and write
    `report.html` and `summary.json`.

    Raises:
        ValueError: a folder holds a run that was made with other settings.
    """
    settings = settings or DemoSettings()
    runs = []
    cells = [(row, seed) for seed in seeds for row in rows]
    for index, (row, seed) in enumerate(cells, start=1):
        folder = output_dir / row / f"seed-{seed}"
        arguments = settings.arguments(row, seed, folder, cache_dir, use_cpu)
        if (folder / "results.json").exists():
            check_same_settings(folder, arguments[0], arguments[2])
            announce(f"[{index}/{len(cells)}] {row}, seed {seed}: found in {folder}")
        else:
            announce(f"[{index}/{len(cells)}] {row}, seed {seed}: {settings.tokens / 1e6:.2f}M tokens")
            train(*arguments)
        runs.append(DemoRun.load(row, seed, folder))
    table = summary_table(runs)
    write_demo_report(output_dir / "report.html", runs, settings, table)
    summary = {"header": table.header, "rows": table.rows, "environment": environment(), "command": command()}
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=1))
    return runs


def check_same_settings(folder: Path, model: ModelArguments, training: LNFreeTrainingArguments) -> None:
    found = json.loads((folder / "results.json").read_text())
    then = found["arguments"]["training"]
    same = all(then[key] == getattr(training, key) for key in ("max_steps", "learning_rate", "seed"))
    if not same or any(found["model"][key] != value for key, value in model.overrides.items()):
        raise ValueError(f"{folder} holds a run with other settings. Remove it, or give another --output-dir.")


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
                estimate([r.results["tokens_per_second"] for r in group]).format(0),
            ]
        )
    seeds = len(next(iter(grouped.values())))
    interval = f"mean ± 95 % interval over {seeds} seeds" if seeds > 1 else "one seed, so no interval"
    return Table(
        ["row", "eval perplexity", f"to {baseline}", "heads above 3max/4", "heads below max/4", "tokens/s"],
        rows,
        f"{interval}; endpoint of training; max is the causal bound (1/T) sum ln i = "
        f"{causal_bound(runs[0].entropy.context_length):.3f} nats.",
    )


def write_demo_report(path: Path, runs: Sequence[DemoRun], settings: DemoSettings, table: Table) -> None:
    grouped = by_row(runs)
    first = {row: group[0] for row, group in grouped.items()}
    published = published_reports()
    layers = range(settings.n_layer)
    seed = next(iter(first.values())).seed
    data = next(iter(first.values())).results["data"]
    sections = [
        Section(
            "What came out",
            [
                f"Each row was trained from scratch on {settings.tokens / 1e6:.2f}M tokens of Python's standard "
                f"library, with {settings.n_layer} layers of width {settings.n_embd} and {settings.n_head} heads. "
                "SM softmax attention, LN LayerNorm in the blocks, G GELU, R ReLU.",
                "The paper trains 124M parameters on 2.1B tokens. A run of this size shows the mechanism at most; it "
                "neither confirms nor refutes the paper's figures.",
            ],
            [table],
        ),
        Section(
            "Entropy of every head at the end of training",
            tables=[bucket_table([run.entropy for run in first.values()], "causal", "measured here")],
            figures=[Picture(heatmaps([r.entropy for r in first.values()]), f"Measured here, seed {seed}.")],
        ),
        Section(
            "The published heatmaps, for comparison",
            tables=[
                bucket_table(
                    [published[row] for row in first if row in published],
                    PAPER_RESULTS["bucket_maximum"]["value"],
                    "published, GPT-2 small, T=128",
                ),
                published_perplexities(list(first)),
            ],
            figures=[
                Picture(
                    heatmaps([published[row] for row in first if row in published]),
                    f"Published figures: {PAPER_RESULTS['source']}",
                )
            ],
        ),
        Section(
            "Entropy by layer over training",
            figures=[
                Picture(
                    layer_dynamics(
                        {row: [run.curve(f"entropy/layer_{i:02d}") for i in layers] for row, run in first.items()},
                        "mean entropy (nats)",
                        causal_bound(settings.context_length),
                    ),
                    f"Held-out probe batch in eval mode, seed {seed}.",
                )
            ],
        ),
        Section(
            "Loss",
            figures=[
                Picture(
                    curves({row: run.curve(key) for row, run in first.items()}, "step", label),
                    f"{caption}, seed {seed}.",
                )
                for key, label, caption in (
                    ("loss", "training loss (nats/token)", "Training loss, mean over each logging interval"),
                    ("eval_loss", "evaluation loss (nats/token)", "Loss on held-out files"),
                )
            ],
        ),
        Section(
            "Exact settings and hashes",
            [f"Command: {command()}"],
            details={
                "environment": json.dumps(environment(), indent=1),
                "data": json.dumps(data, indent=1),
                **{
                    f"{run.row}, seed {run.seed}": json.dumps(
                        {key: run.results[key] for key in ("model", "arguments", "tokens", "parameters")}, indent=1
                    )
                    for run in runs
                },
            },
        ),
    ]
    write_report(path, "LayerNorm-free language models: four rows", "Report of hf-lnfree demo.", sections)


def bucket_table(reports: Sequence[EntropyReport], maximum: Any, note: str) -> Table:
    header = ["row", "0..max/4", "max/4..max/2", "max/2..3max/4", "3max/4..max", "max (nats)"]
    percent = partial("{:.0f} %".format)
    rows = [
        [r.name, *(percent(100 * share) for share in r.buckets(maximum).tolist()), f"{r.maximum(maximum):.2f}"]
        for r in reports
    ]
    return Table(header, rows, f"Share of heads by quarter of the maximum entropy; {note}.")


def published_perplexities(rows: Sequence[str]) -> Table:
    settings = PAPER_RESULTS["eval_perplexity"]
    shown = [row for row in rows if all(row in values for values in settings.values())]
    cells = [[row, *(f"{values[row]:.3f}" for values in settings.values())] for row in shown]
    return Table(["row", *settings], cells, "Published evaluation perplexities; another tokenizer and other data.")
