"""Norms removed from a model by fine-tuning, beside as many steps of plain fine-tuning."""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..data.arguments import DataArguments
from ..errors import RunError
from ..training.arguments import LNFreeTrainingArguments, ModelArguments
from ..training.fields import CheckpointArguments
from ..training.log import curve, read_log
from ..training.procedure import Procedure
from ..training.results import RunResults
from ..training.run import train
from .arguments import RemovalArguments
from .procedure import NormRemoval, PlainFineTuning
from .results import RemovalSummary
from .schedule import read_schedule

PLAIN = "plain"


def remove_norms(
    model: str,
    removal: RemovalArguments,
    data: DataArguments,
    args: LNFreeTrainingArguments,
    checkpoint: CheckpointArguments | None = None,
) -> RemovalSummary:
    """
    Fine-tune a model while its norms are removed, and, unless `removal.baseline` is off, as long without.

    Writes the model, folded, and everything that `train` writes into `args.output_dir`, the same of the plain run into
    its folder `plain`, and `removal.json`, which compares them; `hf_lnfree.pages` draws and shows it. Goes on with
    `args.resume_from_checkpoint`.

    Args:
        model: folder or Hub name, of ours or stock.
        checkpoint: how it is read.

    Returns:
        What removal.json holds: held-out losses before, around each removal, and after, and the gap to plain
        fine-tuning in nats a token.

    Raises:
        SettingsError: as `train`; or a schedule that cannot be read, names a norm that is not there, or does not end.
        RunError: as `train`; or a finished run that is there removed no norms, or its log.jsonl is damaged.
    """
    schedule = read_schedule(str(removal.schedule))
    data.tokenizer = data.tokenizer or model
    args.eval_on_start = True
    folder = Path(args.output_dir)
    lora = (removal.lora_rank, removal.lora_alpha)
    procedure = NormRemoval(schedule, removal.gate_steps, removal.residual_norm_weight, removal.removal_windows, *lora)
    start = ModelArguments(model_name_or_path=model, **vars(checkpoint or CheckpointArguments()))
    results = {"removal": run(start, data, args, folder, procedure)}
    if removal.baseline:
        results["plain"] = run(start, data, args, folder / PLAIN, PlainFineTuning(*lora))
    summary = summarise(results, folder, vars(removal))
    if args.process_index == 0:
        summary.save(folder)
    return summary


def run(
    model: ModelArguments, data: DataArguments, args: LNFreeTrainingArguments, folder: Path, procedure: Procedure
) -> RunResults:
    """One of the two runs; a finished one is read when the other is gone on with."""
    own = copy.copy(args)
    own.output_dir, own.push_to_hub = str(folder), False
    if str(args.resume_from_checkpoint).lower() in ("last", "true"):
        own.resume_from_checkpoint = "auto"  # the other run may not have begun
    return train(model, copy.copy(data), own, procedure)


def summarise(results: Mapping[str, RunResults], folder: Path, arguments: dict[str, Any]) -> RemovalSummary:
    """Out of one run or both, by name; `folder` is that of the first."""
    removed, plain = results["removal"], results.get("plain")
    if removed.removal is None:
        raise RunError(f"{folder} holds a finished run that removed no norms. Give another --out.")
    folders = {"removal": folder, "plain": folder / PLAIN}
    curves = {name: curve(read_log(folders[name]), "eval_loss") for name in results}
    norms = {removed.model["norm"], removed.model["final_norm"]}
    return RemovalSummary(
        model=removed.row,
        loss_before=curves["removal"][0][1],
        loss_after=removed.eval_loss,
        loss_plain=None if plain is None else plain.eval_loss,
        gap=None if plain is None else removed.eval_loss - plain.eval_loss,
        norms_left=norms.pop() if len(norms) == 1 else "mixed",
        events=removed.removal["events"],
        curves=curves,
        steps=removed.steps,
        tokens=removed.tokens,
        sigma=removed.removal["sigma"],
        arguments=arguments,
        seed=removed.seed,
        data=removed.data,
        environment=removed.environment,
        command=removed.command,
        objective=removed.objective,
        accuracy=accuracies(results, read_log(folder)),
        diverged_at=removed.diverged_at,
    )


def accuracies(results: Mapping[str, RunResults], log: Iterable[dict[str, Any]]) -> dict[str, float] | None:
    """Of images, at both ends and after plain fine-tuning; None for other objectives, or where a run diverged."""
    measured = {{"removal": "after"}.get(name, name): run.eval_accuracy for name, run in results.items()}
    known = {name: value for name, value in measured.items() if value is not None}
    return {"before": curve(log, "eval_accuracy")[0][1], **known} if len(known) == len(measured) else None
