"""One training run from arguments to a folder: checkpoint, tokenizer, log.jsonl, entropy report and results.json."""

import json
import logging
import math
import shutil
import time
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, default_data_collator, set_seed

from ..analysis.analyzer import AttentionEntropyAnalyzer
from ..analysis.entropy_report import EntropyReport
from ..analysis.likelihood import perplexity
from ..data.arguments import STDLIB, DataArguments
from ..data.splits import TextData, load_data
from ..data.windows import TokenWindows, window_batches
from ..errors import SettingsError
from ..files import write_at_once
from ..loading import load_model
from ..pages.plots import heatmaps, save
from ..provenance import command, environment, shareable
from ..sharing.card import RESULTS
from ..sharing.push import publish
from .arguments import LNFreeTrainingArguments, ModelArguments
from .checkpoints import find_checkpoint, step_of
from .efficiency import Choices, attention_dropout, choose_attention, choose_loss, training_dtype
from .entropy_regularization import EntropyRegularization
from .losses import use_loss
from .procedure import Procedure
from .trainer import LNFreeTrainer, only_run

CHOICES = "choices.json"
CHECKPOINT_BYTES_A_PARAMETER = 12  # weights and two moments, in float32

logger = logging.getLogger(__name__)


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: LNFreeTrainingArguments,
    procedure: Procedure | None = None,
) -> dict[str, Any]:
    """
    Train, evaluate the endpoint, and write everything into `args.output_dir`; `results.json` and the card come last.

    Args:
        procedure: what is done to the model besides; by default entropy regularisation if `args` ask for it.

    Returns:
        What `results.json` holds: perplexity, tokens, data hash, settings, versions, and `diverged_at` (step or None).
        The perplexity of a run that diverged is NaN, its saved model the last state that was finite.

    Raises:
        SettingsError: arguments, data and model do not fit each other; nothing has been written then.
        RunInUse: another process trains into the folder.
        OSError: no room for a checkpoint, or a folder that cannot be written.
    """
    if procedure is not None and args.entropy_weight:
        raise SettingsError("entropy_weight is for plain training: leave it out here.")
    procedure = procedure or (EntropyRegularization.of(args) if args.entropy_weight else Procedure())
    # What is wrong is refused before the corpus is read.
    find_checkpoint(Path(args.output_dir), args.resume_from_checkpoint)
    model_args.config(data_args.context_length)
    with args.main_process_first(desc="tokenising"):
        data = load_data(data_args, **model_args.access(data_args.tokenizer))
    set_seed(args.seed)
    model = procedure.prepare(build_model(model_args, data_args, data))
    with only_run(args):
        return train_alone(model, data, model_args, data_args, args, procedure)


def train_alone(
    model: PreTrainedModel,
    data: TextData,
    model_args: ModelArguments,
    data_args: DataArguments,
    args: LNFreeTrainingArguments,
    procedure: Procedure,
) -> dict[str, Any]:
    """`train` from the first thing that is written on."""
    folder = Path(args.output_dir)
    checkpoint = find_checkpoint(folder, args.resume_from_checkpoint)
    require_room(folder, model, args)
    use_cache = model.config.use_cache
    trainer = LNFreeTrainer(
        model=procedure.adapt(model),
        args=args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=data.tokenizer,
        data_collator=default_data_collator,
        probe=window_batches(data.validation, args.probe_sequences),
    )
    planned = planned_steps(args, len(data.train))
    procedure.attach(trainer, planned)
    with args.main_process_first(desc="choosing attention and loss"):
        if args.local_process_index == 0:
            recorded = Choices.load(folder / CHOICES) if checkpoint and (folder / CHOICES).is_file() else None
            length = data_args.context_length
            choose(model_args, args, model.config, length, planned, recorded).save(folder / CHOICES)
    choices = Choices.load(folder / CHOICES)
    logger.info("attention: %s, loss: %s", choices.attn_implementation, choices.loss)
    if model.config._attn_implementation != choices.attn_implementation:
        model.set_attn_implementation(choices.attn_implementation)
    use_loss(model, choices.loss)
    resumed_at = step_of(Path(checkpoint)) if checkpoint else 0
    started = time.perf_counter()
    if checkpoint and resumed_at >= planned:
        trainer.restore(checkpoint)
        procedure.resume(trainer.state)
    else:
        with procedure.while_training():
            trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - started
    diverged = trainer.guard.diverged_at is not None
    trained = trainer.recorder.model
    trainable = trained.num_parameters(only_trainable=True)
    model = procedure.finish(trained)
    if model is not trained:
        trainer.model = trainer.model_wrapped = model
    loss = math.nan if diverged else trainer.evaluate()["eval_loss"]
    model.config.use_cache = use_cache  # Trainer turns it off, in the saved configuration too
    trainer.save_model(_internal_call=True)  # what is pushed to the Hub is the finished run
    windows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    tokens_a_step = windows * data_args.context_length
    steps = trainer.state.global_step
    results = {
        "row": model_args.row if model_args.model_name_or_path is None else model_args.model_name_or_path,
        "base_model": on_hub(model_args.model_name_or_path),
        "hub_dataset": None if data_args.data == STDLIB else on_hub(data_args.data.partition(":")[0]),
        "eval_loss": loss,
        "eval_perplexity": perplexity(loss),
        "train_loss": next((e["loss"] for e in reversed(trainer.state.log_history) if "loss" in e), math.nan),
        "steps": steps,
        "diverged_at": trainer.guard.diverged_at,
        "nonfinite_events": trainer.guard.events,
        "tokens": steps * tokens_a_step,
        "tokens_per_second": (steps - resumed_at) * tokens_a_step / seconds,
        "train_seconds": seconds,
        "resumed_at": resumed_at,
        "seed": args.seed,
        "parameters": model.num_parameters(),
        "trainable_parameters": trainable,
        "data": {"train": data.train.meta, "validation": data.validation.meta | {"used": len(data.validation)}},
        "model": model.config.to_dict(),
        "choices": vars(choices),
        "arguments": {
            "model": vars(model_args),
            "data": vars(data_args),
            "training": json.loads(args.to_json_string()),
        },
        "environment": environment(),
        "command": command(),
        **procedure.report(),
    }
    report = final_report(model, data.validation, args, model_args.name)  # on all processes: shards need each other
    if trainer.is_world_process_zero():
        if report is not None:
            report.save(folder / "entropy.json")
            save(heatmaps([report]), folder / "entropy.svg", [".svg"])
            results["overloaded_heads"] = report.overloaded("causal")
            results["collapsed_heads"] = report.collapsed("causal")
        text = shareable(json.dumps(results, indent=1, default=str))
        write_at_once(folder / RESULTS, text)
        publish(folder, args)
    trainer.accelerator.wait_for_everyone()
    return results


def on_hub(name: str | None) -> str | None:
    """The name, if it is no path of this machine."""
    return None if name is None or Path(name).expanduser().exists() else name


def require_room(folder: Path, model: PreTrainedModel, args: LNFreeTrainingArguments) -> None:
    """Raise OSError when not even one checkpoint would fit on the disk."""
    needed = CHECKPOINT_BYTES_A_PARAMETER * model.num_parameters()
    free = shutil.disk_usage(folder).free
    if args.save_strategy != "no" and free < needed:
        raise OSError(
            f"A checkpoint takes {needed / 1e9:.2f} GB and {folder} has room for {free / 1e9:.2f} GB. Make room, give "
            "another --out, or pass --save-strategy no."
        )


def choose(
    model_args: ModelArguments,
    args: LNFreeTrainingArguments,
    config: PreTrainedConfig,
    length: int,
    steps: int,
    recorded: Choices | None,
) -> Choices:
    """Attention and loss: what a flag says, else what was chosen when the run began, else what suits the machine."""
    attention, loss = model_args.attn_implementation, args.loss
    if attention == "auto":
        dtype = training_dtype(args.bf16, args.fp16)
        capped = getattr(config, "attention_softcap", None) is not None  # sdpa has no cap
        fastest = "eager" if capped else choose_attention(args.device, dtype, length, attention_dropout(config))
        attention = recorded.attn_implementation if recorded else fastest
    if loss == "auto":
        logits = args.train_batch_size * length * config.vocab_size
        loss = recorded.loss if recorded else choose_loss(args.device, logits, steps)
    return Choices(attention, loss)


def planned_steps(args: LNFreeTrainingArguments, windows: int) -> int:
    """Optimiser steps of the whole run."""
    if args.max_steps > 0:
        return args.max_steps
    batches = math.ceil(windows / (args.train_batch_size * args.world_size))
    return math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))


def build_model(model_args: ModelArguments, data_args: DataArguments, data: TextData) -> PreTrainedModel:
    """The model of the arguments, checked against the tokenizer and the window length."""
    tokenizer = data.tokenizer
    config = model_args.config(
        data_args.context_length,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if config.vocab_size < len(tokenizer):
        raise SettingsError(
            f"The tokenizer has {len(tokenizer)} entries and the model's vocabulary {config.vocab_size}. Use the "
            "model's own tokenizer (--tokenizer), or set vocab_size in --config-overrides."
        )
    positions = getattr(config, "max_position_embeddings", None) or data_args.context_length
    if positions < data_args.context_length:
        raise SettingsError(
            f"The model has {positions} positions, fewer than --context-length {data_args.context_length}."
        )
    if model_args.model_name_or_path is not None:
        access = model_args.access(model_args.model_name_or_path)
        return load_model(model_args.model_name_or_path, config=config, **access)
    return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def final_report(
    model: PreTrainedModel, windows: TokenWindows, args: LNFreeTrainingArguments, name: str
) -> EntropyReport | None:
    batches = window_batches(windows, args.attention_report_windows)
    if not batches:
        return None
    report = AttentionEntropyAnalyzer(model).run(batches, name=name)
    report.metadata |= {"windows_sha256": windows.sha256, "seed": args.seed}
    return report
