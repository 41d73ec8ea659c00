"""The demo: the paper's four rows from scratch on real text, at a size for two cores, as a table and a page."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..provenance import command, environment
from .arguments import LNFreeTrainingArguments, ModelArguments
from .data import DataArguments
from .demo_report import DemoRun, summary_table, write_demo_report
from .recipes import MAIN_ROWS
from .run import train


@dataclass(frozen=True)
class DemoSettings:
    """Small enough for ten minutes on two cores. The paper: 12 layers, d 768, 2.1B tokens a row."""

    n_layer: int = 8
    n_embd: int = 64
    n_head: int = 4
    # The paper's 0.02 at d=768, scaled by sqrt(768/64): with 0.02 itself attention stays untrained at this width.
    initializer_range: float = 0.07
    vocab_size: int = 2048
    context_length: int = 128
    batch_size: int = 8
    steps: int = 1200
    learning_rate: float = 3e-3
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
    `report.html`, `heatmaps.png` and `summary.json`.

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
    write_demo_report(output_dir, runs, table)
    summary = {
        "header": table.header,
        "rows": table.rows,
        "note": table.note,
        "perplexity": {f"{r.row}, seed {r.seed}": r.results["eval_perplexity"] for r in runs},
        "settings": asdict(settings),
        "tokens": settings.tokens,
        "data_sha256": {split: meta["sha256"] for split, meta in runs[0].results["data"].items()},
        "environment": environment(),
        "command": command(),
    }
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=1))
    return runs


def check_same_settings(folder: Path, model: ModelArguments, training: LNFreeTrainingArguments) -> None:
    found = json.loads((folder / "results.json").read_text())
    then = found["arguments"]["training"]
    same = all(then[key] == getattr(training, key) for key in ("max_steps", "learning_rate", "seed"))
    if not same or any(found["model"][key] != value for key, value in model.overrides.items()):
        raise ValueError(f"{folder} holds a run with other settings. Remove it, or give another --output-dir.")
