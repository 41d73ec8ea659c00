"""One training run from arguments to a folder: checkpoint, tokenizer, log.jsonl, entropy report and results.json."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerState, default_data_collator, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from ..analysis.analyzer import AttentionEntropyAnalyzer
from ..analysis.entropy_report import EntropyReport
from ..analysis.plots import heatmaps, save
from ..provenance import command, environment
from .arguments import LNFreeTrainingArguments, ModelArguments
from .data import DataArguments, TextData, TokenWindows, load_data
from .trainer import LNFreeTrainer


def train(model_args: ModelArguments, data_args: DataArguments, args: LNFreeTrainingArguments) -> dict[str, Any]:
    """
    Train, evaluate the endpoint, and write everything into `args.output_dir`.

    Returns:
        What `results.json` holds: perplexity, tokens, data hash, settings, versions, and `diverged_at` (step or None).

    Raises:
        ValueError: arguments, data and model do not fit each other; nothing has been written then.
    """
    checkpoint = find_checkpoint(args)
    model_args.config(data_args.context_length)  # a wrong field is refused before the corpus is read
    with args.main_process_first(desc="tokenising"):
        data = load_data(data_args)
    set_seed(args.seed)
    model = build_model(model_args, data_args, data)
    use_cache = model.config.use_cache
    trainer = LNFreeTrainer(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=data.tokenizer,
        data_collator=default_data_collator,
        probe=window_batches(data.validation, args.probe_sequences),
    )
    resumed_at = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME))).global_step if checkpoint else 0
    started = time.perf_counter()
    trained = trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - started
    metrics = trainer.evaluate()
    model.config.use_cache = use_cache  # Trainer turns it off, in the saved configuration too
    trainer.save_model()
    windows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    tokens_a_step = windows * data_args.context_length
    steps = trainer.state.global_step
    results = {
        "row": model_args.row if model_args.model_name_or_path is None else model_args.model_name_or_path,
        "eval_loss": metrics["eval_loss"],
        "eval_perplexity": metrics["eval_perplexity"],
        "train_loss": trained.training_loss,
        "steps": steps,
        "diverged_at": trainer.diverged_at,
        "tokens": steps * tokens_a_step,
        "tokens_per_second": (steps - resumed_at) * tokens_a_step / seconds,
        "train_seconds": seconds,
        "seed": args.seed,
        "parameters": model.num_parameters(),
        "trainable_parameters": model.num_parameters(only_trainable=True),
        "data": {"train": data.train.meta, "validation": data.validation.meta | {"used": len(data.validation)}},
        "model": model.config.to_dict(),
        "arguments": {"data": vars(data_args), "training": json.loads(args.to_json_string())},
        "environment": environment(),
        "command": command(),
    }
    if trainer.is_world_process_zero():
        folder = Path(args.output_dir)
        report = final_report(model, data.validation, args, model_args.row)
        if report is not None:
            report.save(folder / "entropy.json")
            save(heatmaps([report]), folder / "entropy.svg", [".svg"])
            results["overloaded_heads"] = report.overloaded("causal")
            results["collapsed_heads"] = report.collapsed("causal")
        text = json.dumps(results, indent=1, default=str).replace(str(Path.home()), "~")
        (folder / "results.json").write_text(text)
    trainer.accelerator.wait_for_everyone()
    return results


def find_checkpoint(args: LNFreeTrainingArguments) -> str | None:
    """The checkpoint to resume from; `last` means the newest one. Never starts over on top of an earlier run."""
    wanted = args.resume_from_checkpoint
    folder = Path(args.output_dir)
    last = get_last_checkpoint(args.output_dir) if folder.is_dir() else None
    if wanted is None or str(wanted).lower() == "false":
        if last is not None or (folder / "results.json").exists():
            raise ValueError(
                f"{folder} holds an earlier run. Pass --resume_from_checkpoint last to go on with it, or give another "
                "--output_dir."
            )
        return None
    if str(wanted).lower() in ("last", "true"):
        if last is None:
            raise ValueError(f"{folder} holds no checkpoint to resume from.")
        return last
    if not Path(wanted, TRAINER_STATE_NAME).is_file():
        raise ValueError(f"{wanted} is not a checkpoint of a run: it has no {TRAINER_STATE_NAME}.")
    return str(wanted)


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
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} entries and the model's vocabulary {config.vocab_size}. Use the "
            "model's own tokenizer (--tokenizer), or set vocab_size in --config_overrides."
        )
    if config.max_position_embeddings < data_args.context_length:
        raise ValueError(
            f"The model has {config.max_position_embeddings} positions, fewer than --context_length "
            f"{data_args.context_length}."
        )
    if model_args.model_name_or_path is not None:
        return AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, config=config)
    return AutoModelForCausalLM.from_config(config)


def window_batches(windows: TokenWindows, count: int, batch_size: int = 16) -> list[torch.Tensor]:
    """`count` windows spread evenly over a split, as `input_ids` batches [B, T]."""
    chosen = torch.linspace(0, len(windows) - 1, min(count, len(windows))).long().unique().tolist()
    ids = [windows[i]["input_ids"] for i in chosen]
    return [torch.stack(ids[i : i + batch_size]) for i in range(0, len(ids), batch_size)]


def final_report(
    model: PreTrainedModel, windows: TokenWindows, args: LNFreeTrainingArguments, name: str
) -> EntropyReport | None:
    batches = window_batches(windows, args.attention_report_windows)
    if not batches:
        return None
    report = AttentionEntropyAnalyzer(model).run(batches, name=name)
    report.metadata |= {"windows_sha256": windows.sha256, "seed": args.seed}
    return report
