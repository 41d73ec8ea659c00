"""`hf-lnfree remove-norms`: norms removed from a model by fine-tuning, beside as many steps of plain fine-tuning."""

import copy
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data.arguments import DataArguments
from ..files import write_at_once
from ..pages.removal import write_removal_report
from ..provenance import shareable
from ..sharing.push import publish
from ..training.arguments import LNFreeTrainingArguments, ModelArguments
from ..training.fields import CheckpointArguments
from ..training.procedure import Procedure
from ..training.run import RESULTS, train
from .arguments import RemovalArguments
from .procedure import NormRemoval, PlainFineTuning
from .schedule import read_schedule

SUMMARY = "removal.json"

logger = logging.getLogger(__name__)


def remove_norms(
    model: str,
    removal: RemovalArguments,
    data: DataArguments,
    args: LNFreeTrainingArguments,
    checkpoint: CheckpointArguments | None = None,
) -> dict[str, Any]:
    """
    Fine-tune a model while its norms are removed, and, unless `removal.baseline` is off, as long without.

    Writes the model, folded, and everything that `train` writes into `args.output_dir`, the same of the plain run into
    its folder `plain`, and removal.json with report.html that compare them. Goes on with `args.resume_from_checkpoint`.

    Args:
        model: folder or Hub name, of ours or stock.
        checkpoint: how it is read.

    Returns:
        What removal.json holds: held-out losses before, around each removal, and after, and the gap to plain
        fine-tuning in nats a token.

    Raises:
        SettingsError: as `train`; or a schedule that cannot be read, names a norm that is not there, or does not end.
    """
    schedule = read_schedule(removal.schedule)
    data.tokenizer = data.tokenizer or model
    args.eval_on_start = True
    folder = Path(args.output_dir)
    lora = (removal.lora_rank, removal.lora_alpha)
    procedure = NormRemoval(schedule, removal.gate_steps, removal.residual_norm_weight, removal.removal_windows, *lora)
    start = ModelArguments(model_name_or_path=model, **vars(checkpoint or CheckpointArguments()))
    results = {"removal": run(start, data, args, folder, procedure)}
    if removal.baseline:
        results["plain"] = run(start, data, args, folder / "plain", PlainFineTuning(*lora))
    summary = summarise(results, folder, vars(removal))
    if args.process_index == 0:
        write_at_once(folder / SUMMARY, shareable(json.dumps(summary, indent=1)))
        write_removal_report(folder, summary)
        publish(folder, args)
    return summary


def run(
    model: ModelArguments, data: DataArguments, args: LNFreeTrainingArguments, folder: Path, procedure: Procedure
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
    return train(model, copy.copy(data), own, procedure)


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
