"""One training run from arguments to a folder: checkpoint, tokenizer, log.jsonl, entropy report and results.json."""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainerCallback, set_seed

from ..analysis.analyzer import AttentionEntropyAnalyzer
from ..analysis.entropy_report import EntropyReport
from ..analysis.likelihood import perplexity
from ..data.arguments import DIGITS, STDLIB, DataArguments
from ..data.collators import collator_of
from ..data.splits import RunData
from ..data.windows import batches_of
from ..errors import SettingsError
from ..files import require_own
from ..provenance import command, environment, on_hub
from .arguments import LNFreeTrainingArguments, ModelArguments
from .beginning import Beginning, arguments_of, checkpoint_of, content_of, finished_run, refuse_other_data
from .build import build_model, load_run_data, with_objective
from .checkpoints import checkpoints, require_room, step_of
from .efficiency import CHOICES, settled_choices
from .entropy_regularization import EntropyRegularization
from .lock import LOCK, only_run
from .log import LOG
from .possible import require_possible
from .procedure import Procedure
from .recorder import RECORD
from .results import ENTROPY, RESULTS, RunResults
from .trainer import LNFreeTrainer

# What tells the folder of a run, and what may stand in it before any of that.
RUN_FILES = (RESULTS, Beginning.file, "checkpoint-[0-9]*")
BEFORE_A_RUN = (LOCK, LOG, CHOICES, RECORD)

logger = logging.getLogger(__name__)


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: LNFreeTrainingArguments,
    procedure: Procedure | None = None,
    beside: Sequence[Path] = (),
    callbacks: Sequence[TrainerCallback] = (),
) -> RunResults:
    """
    Train, evaluate the endpoint, and write everything into `args.output_dir`; `results.json` comes last.

    With `args.resume_from_checkpoint` a run goes on as it was begun (`Beginning`), and a finished one is left as it is.

    Pictures, a model card and a push are `hf_lnfree.pages.finish_run`'s, with the same arguments.

    Args:
        procedure: what is done to the model besides; by default entropy regularisation if `args` ask for it.
        beside: folders of runs that this one is compared with: where they name the same data, it must be the same.
        callbacks: of the trainer, besides its own.

    Returns:
        What `results.json` holds. The loss of a run that diverged is NaN, its saved model the last state that was
        finite: without a checkpoint of one, none is saved.

    Raises:
        SettingsError: arguments, data and model do not fit each other; nothing has been written then.
        RunError: the folder holds something else, or a run that was begun with other settings or data; or a checkpoint
            does not fit the model.
        RunInUse: another process trains into the folder.
        OSError: no room for a checkpoint, or a folder that cannot be written.
    """
    if procedure is not None and args.entropy_weight:
        raise SettingsError("entropy_weight is for plain training: leave it out here.")
    data_args = with_objective(model_args, data_args)
    procedure = procedure or (EntropyRegularization.of(args) if args.entropy_weight else Procedure())
    folder, begun = Path(args.output_dir), Beginning.planned(model_args, data_args, args, procedure.settings())
    # What is wrong is refused before the corpus is read.
    require_own(folder, "run", RUN_FILES, BEFORE_A_RUN)
    if (finished := finished_run(folder, begun, args.resume_from_checkpoint)) is not None:
        return finished
    checkpoint_of(folder, begun, args.resume_from_checkpoint)
    require_possible(model_args, data_args, args)
    with args.main_process_first(desc="tokenising"):
        data = load_run_data(model_args, data_args, args.seed)
    begun.content = content_of(data)
    refuse_other_data(begun, beside)
    set_seed(args.seed)
    model = procedure.prepare(build_model(model_args, data_args, data))
    with only_run(args):
        if (finished := finished_run(folder, begun, args.resume_from_checkpoint)) is not None:
            return finished  # by another process, meanwhile
        return train_alone(model, data, model_args, data_args, args, procedure, begun, callbacks)


def train_alone(
    model: PreTrainedModel,
    data: RunData,
    model_args: ModelArguments,
    data_args: DataArguments,
    args: LNFreeTrainingArguments,
    procedure: Procedure,
    begun: Beginning,
    callbacks: Sequence[TrainerCallback] = (),
) -> RunResults:
    """`train` from the first thing that is written on."""
    folder = Path(args.output_dir)
    checkpoint, before = checkpoint_of(folder, begun, args.resume_from_checkpoint)
    require_room(folder, model, args)
    use_cache = getattr(model.config, "use_cache", None)
    trainer = build_trainer(procedure.adapt(model), data, args, callbacks)
    length = tokens_an_example(trainer, data)
    steps = planned_steps(args, len(data.train))
    procedure.attach(trainer, steps)
    resumes = checkpoint is not None
    choices = settled_choices(model_args, args, model.config, data.objective, length, steps, resumes)
    choices.apply(model)
    for line in plan(trainer, model_args, data_args, data, steps, length) if args.process_index == 0 else ():
        logger.info(line)
    if args.process_index == 0:
        kept = begun if before is None else before.resumed(begun, step_of(Path(str(checkpoint))))
        kept.save(folder)

    trained = fit(trainer, procedure, checkpoint, steps, length)
    trained["trainable_parameters"] = trainer.unwrapped.num_parameters(only_trainable=True)
    finite = go_back_if_spoilt(trainer, procedure)
    model = finished_model(trainer, procedure)

    measured = {} if trained["diverged_at"] is not None else trainer.evaluate()
    loss = measured.get("eval_loss", math.nan)
    if use_cache is not None:
        model.config.use_cache = use_cache  # Trainer turns it off, in the saved configuration too
    else:
        vars(model.config).pop("use_cache", None)
    if finite:
        trainer.save_model(_internal_call=True)  # to the Hub goes the finished run, and nothing before it
    report = final_report(trainer, model, data, model_args.name)  # on all processes: shards need each other
    results = RunResults.of(
        **inputs_of(model_args, data_args, args, data),
        **trained,
        eval_loss=loss,
        eval_perplexity=perplexity(loss),
        eval_accuracy=measured.get("eval_accuracy"),
        objective=data.objective.name,
        parameters=model.num_parameters(),
        parameters_outside_embeddings=outside_embeddings(model),
        model=model.config.to_dict(),
        choices=asdict(choices),
        overloaded_heads=None if report is None else report.overloaded("causal"),
        collapsed_heads=None if report is None else report.collapsed("causal"),
        **procedure.report(),
    )
    if trainer.is_world_process_zero():
        if report is not None:
            report.save(folder / ENTROPY)
        results.save(folder)
    trainer.accelerator.wait_for_everyone()
    return results


def outside_embeddings(model: PreTrainedModel) -> int:
    """Parameters, without embeddings and without an output layer that has weights of its own: the N of scaling laws."""
    count = model.num_parameters(exclude_embeddings=True)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    own = isinstance(head, nn.Linear) and head.weight is not getattr(embedding, "weight", None)
    return count - head.weight.numel() if own else count


def plan(
    trainer: LNFreeTrainer, model_args: ModelArguments, data_args: DataArguments, data: RunData, steps: int, length: int
) -> Iterator[str]:
    """What is going to be trained on what, how long and where, before the first step."""
    args, start = trainer.args, model_args.model_name_or_path
    new = f"a new {model_args.family}, row {model_args.name}" if start is None else f"from {start}"
    yield f"Model: {new}, {trainer.unwrapped.num_parameters() / 1e6:,.2f} million parameters."
    what = f"{data.objective.example}s"
    yield f"Data: {data_args.data}, {len(data.train):,} {what} of {length} tokens; {len(data.validation):,} held out."
    windows = windows_a_step(args)
    processes = "1 process" if args.world_size == 1 else f"{args.world_size} processes"
    shards = f", in shards on {processes}" if trainer.is_fsdp_enabled else ""
    yield (
        f"Training: {steps:,} steps of {windows:,} {what}, {steps * windows * length:,} tokens "
        f"({steps * windows / len(data.train):.2g} times the data), learning rate {args.learning_rate:g}, on "
        f"{args.device.type}{shards}."
    )
    yield f"Folder: {args.output_dir}"


def windows_a_step(args: LNFreeTrainingArguments) -> int:
    """Of all processes and batches."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def build_trainer(
    model: Any, data: RunData, args: LNFreeTrainingArguments, callbacks: Sequence[TrainerCallback] = ()
) -> LNFreeTrainer:
    """The trainer on both splits, with examples for its flight recorder."""
    collator = collator_of(data.objective, data.tokenizer, model)
    return LNFreeTrainer(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=data.processor,
        data_collator=collator,
        callbacks=[*callbacks, EachEpoch(data.train)],
        probe=batches_of(data.validation, collator, args.probe_sequences),
        objective=data.objective,
    )


class EachEpoch(TrainerCallback):
    """Tells data that are made anew in every epoch which one it is; loaders of several processes do not."""

    def __init__(self, data: Any):
        self.data = data

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(int(state.epoch or 0))


def tokens_an_example(trainer: LNFreeTrainer, data: RunData) -> int:
    """What a model reads of one: of an image its patches and a class token, of pairs and recordings the mean."""
    if data.objective.example in ("pair", "recording"):
        return round(data.train.meta["tokens"] / data.train.meta["documents"])
    if data.objective.example == "window":
        return data.train.meta["context_length"]
    config = trainer.unwrapped.config
    return 1 + math.prod(side // config.patch_size for side in data.train.meta["shape"][1:])


def planned_steps(args: LNFreeTrainingArguments, windows: int) -> int:
    """Optimiser steps of the whole run."""
    if args.max_steps > 0:
        return args.max_steps
    batches = math.ceil(windows / (args.train_batch_size * args.world_size))
    return math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))


def fit(
    trainer: LNFreeTrainer, procedure: Procedure, checkpoint: str | None, steps: int, length: int
) -> dict[str, Any]:
    """Train to the last of `steps`, from a checkpoint if there is one; returns what of `RunResults` it was."""
    resumed_at = step_of(Path(checkpoint)) if checkpoint else 0
    started = time.perf_counter()
    if checkpoint and resumed_at >= steps:
        trainer.restore(checkpoint)
        procedure.resume(trainer.state)
    else:
        with procedure.while_training():
            trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - started
    args, done, history = trainer.args, trainer.state.global_step, trainer.state.log_history
    tokens_a_step = windows_a_step(args) * length
    return {
        "train_loss": next((entry["loss"] for entry in reversed(history) if "loss" in entry), math.nan),
        "steps": done,
        "diverged_at": trainer.guard.diverged_at,
        "nonfinite_events": trainer.guard.events,
        "tokens": done * tokens_a_step,
        "tokens_per_second": (done - resumed_at) * tokens_a_step / seconds,
        "train_seconds": seconds,
        "resumed_at": resumed_at,
    }


def go_back_if_spoilt(trainer: LNFreeTrainer, procedure: Procedure) -> bool:
    """To the last checkpoint, when the weights are not finite; returns whether there is a finite state to save."""
    if trainer.first_spoilt(moments=False) is None:
        return True
    known = checkpoints(Path(trainer.args.output_dir))
    if not known:
        logger.error("No model is saved: its weights are not finite, and there is no checkpoint from before.")
        return False
    logger.warning("The weights are not finite: what is saved is %s.", known[-1].name)
    procedure.resume(trainer.load_state(known[-1]))
    return True


def finished_model(trainer: LNFreeTrainer, procedure: Procedure) -> PreTrainedModel:
    """What the procedure makes of the trained model; the trainer evaluates and saves it from here on."""
    trained = trainer.unwrapped
    model = procedure.finish(trained)
    if model is not trained:
        trainer.model = trainer.model_wrapped = model
    return model


def final_report(trainer: LNFreeTrainer, model: PreTrainedModel, data: RunData, name: str) -> EntropyReport | None:
    """Entropies of the model that is saved, on held-out examples; None if none were asked for."""
    batches = batches_of(data.validation, trainer.data_collator, trainer.args.attention_report_windows)
    if not batches:
        return None
    report = AttentionEntropyAnalyzer(model).run(batches, name=name)
    report.metadata |= {"windows_sha256": data.validation.meta["sha256"], "seed": trainer.args.seed}
    return report


def inputs_of(
    model_args: ModelArguments, data_args: DataArguments, args: LNFreeTrainingArguments, data: RunData
) -> dict[str, Any]:
    """What of `RunResults` was there before the training."""
    start = model_args.model_name_or_path
    return {
        "row": model_args.name if start is None else start,
        "base_model": base_model(start),
        "hub_dataset": None if data_args.data in (STDLIB, DIGITS) else on_hub(data_args.data.partition(":")[0]),
        "seed": args.seed,
        "data": {"train": data.train.meta, "validation": data.validation.meta | {"used": len(data.validation)}},
        "arguments": arguments_of(model_args, data_args, args),
        "environment": environment(args.device),
        "command": command(),
    }


def base_model(start: str | None) -> str | None:
    """Hub name of the checkpoint that a run began with, or of that with which the run in that folder did."""
    if start is not None and (Path(start) / RESULTS).is_file():
        return RunResults.load(Path(start)).base_model
    return on_hub(start)
