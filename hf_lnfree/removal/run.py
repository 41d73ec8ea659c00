"""`hf-lnfree remove-norms`: norms removed from a model by fine-tuning, beside as many steps of plain fine-tuning."""

import copy
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..data.arguments import DataArguments
from ..files import write_at_once
from ..pages.removal import write_removal_report
from ..provenance import shareable
from ..sharing.push import publish
from ..training.arguments import LNFreeTrainingArguments, ModelArguments
from ..training.procedure import Procedure
from ..training.run import RESULTS, train
from .procedure import NormRemoval, PlainFineTuning
from .schedule import read_schedule

SUMMARY = "removal.json"

logger = logging.getLogger(__name__)


@dataclass
class RemovalArguments:
    """Which norms go when, and what is trained meanwhile."""

    schedule: str = field(
        default="auto",
        metadata={
            "help": "'auto' (MLPs, queries and keys, values, final norm, first position, in the first 39 %% of "
            "max_steps), a YAML file, or YAML like '[{norms: mlp, start: 20, every: 2}]'; norms: mlp, attention, "
            "query_key, value, final, first, or the name of a norm"
        },
    )
    gate_steps: int = field(default=0, metadata={"help": "steps from sigma to the fixed scale; 0 for a switch"})
    residual_norm_weight: float = field(
        default=0.0, metadata={"help": "weight of the penalty that keeps residual norms at their averages"}
    )
    removal_windows: int = field(
        default=64, metadata={"help": "windows behind the first averages and the losses around each removal"}
    )
    baseline: bool = field(
        default=True, metadata={"help": "also fine-tune without removal for as many steps, into output_dir/plain"}
    )
    lora_rank: int | None = field(default=None, metadata={"help": "train LoRA adapters of this rank, then merge them"})
    lora_alpha: int | None = field(default=None, metadata={"help": "scale of the adapters; twice the rank"})

    _argument_group_name = "removal arguments"

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, str):  # a YAML file gives a list; its text is what a result file records
            self.schedule = yaml.safe_dump(self.schedule, default_flow_style=True).strip()
        for name, least in (("gate_steps", 0), ("residual_norm_weight", 0), ("removal_windows", 1), ("lora_rank", 1)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")


def remove_norms(
    model: str, removal: RemovalArguments, data: DataArguments, args: LNFreeTrainingArguments
) -> dict[str, Any]:
    """
    Fine-tune a model while its norms are removed, and, unless `removal.baseline` is off, as long without.

    Writes the model, folded, and everything that `train` writes into `args.output_dir`, the same of the plain run into
    its folder `plain`, and removal.json with report.html that compare them. Goes on with `args.resume_from_checkpoint`.

    Args:
        model: folder or Hub name, of ours or stock.

    Returns:
        What removal.json holds: held-out losses before, around each removal, and after, and the gap to plain
        fine-tuning in nats a token.

    Raises:
        ValueError: as `train`; or a schedule that cannot be read, names a norm that is not there, or does not end.
    """
    schedule = read_schedule(removal.schedule)
    data.tokenizer = data.tokenizer or model
    args.eval_on_start = True
    folder = Path(args.output_dir)
    lora = (removal.lora_rank, removal.lora_alpha)
    procedure = NormRemoval(schedule, removal.gate_steps, removal.residual_norm_weight, removal.removal_windows, *lora)
    results = {"removal": run(model, data, args, folder, procedure)}
    if removal.baseline:
        results["plain"] = run(model, data, args, folder / "plain", PlainFineTuning(*lora))
    summary = summarise(results, folder, vars(removal))
    if args.process_index == 0:
        write_at_once(folder / SUMMARY, shareable(json.dumps(summary, indent=1)))
        write_removal_report(folder, summary)
        publish(folder, args)
    return summary


def run(
    model: str, data: DataArguments, args: LNFreeTrainingArguments, folder: Path, procedure: Procedure
) -> dict[str, Any]:
    """One of the two runs; a finished one is read when the other is gone on with."""
    goes_on = str(args.resume_from_checkpoint).lower() in ("auto", "last", "true")
    if goes_on and (folder / RESULTS).is_file():
        logger.info("%s is finished.", folder)
        return json.loads((folder / RESULTS).read_text())
    own = copy.copy(args)
    own.output_dir, own.push_to_hub = str(folder), False
    if goes_on:
        own.resume_from_checkpoint = "auto"  # the other run may not have begun
    return train(ModelArguments(model_name_or_path=model), copy.copy(data), own, procedure)


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def summarise(results: Mapping[str, Mapping[str, Any]], folder: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """Losses in nats a token, on the held-out windows."""
    folders = {"removal": folder, "plain": folder / "plain"}
    curves = {
        name: [(entry["step"], entry["eval_loss"]) for entry in log_of(folders[name]) if "eval_loss" in entry]
        for name in results
    }
    removed = results["removal"]
    events = removed["removal"]["events"]
    summary = {
        "model": removed["row"],
        "loss_before": curves["removal"][0][1],
        "loss_after": removed["eval_loss"],
        "loss_plain": results["plain"]["eval_loss"] if "plain" in results else None,
        "gap": removed["eval_loss"] - results["plain"]["eval_loss"] if "plain" in results else None,
        "norms_left": removed["model"]["norm"]
        if removed["model"]["norm"] == removed["model"]["final_norm"]
        else "mixed",
        "events": events,
        "curves": curves,
        "steps": removed["steps"],
        "tokens": removed["tokens"],
        "sigma": removed["removal"]["sigma"],
        "arguments": arguments,
    }
    shared = ("seed", "data", "environment", "command", "diverged_at")
    return summary | {key: removed[key] for key in shared}
