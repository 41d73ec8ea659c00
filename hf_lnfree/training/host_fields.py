"""The fields of transformers' `TrainingArguments` that people use, as `--help` says them without loading transformers.

A run takes all of its fields; `--help-all` asks the class itself, and a test holds these names and defaults to it.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from ..checks import FILLED, MOST_PROCESSES, MappingOrFile, Range, above, at_least


def said(group: str, default: Any, text: str) -> Any:
    """A field of TrainingArguments with our words for it."""
    return field(default=default, metadata={"group": group, "help": text})


STEPS, OPTIMISER, RECORDS, MACHINE, HUB = (
    "Steps and batches (transformers)",
    "Optimiser (transformers)",
    "Evaluation, checkpoints and logs (transformers)",
    "Machine (transformers)",
    "Hub (transformers)",
)


@dataclass
class HostFields:
    """Fields of TrainingArguments that the help shows; no object is made of it."""

    max_steps: int = said(STEPS, -1, "Optimiser steps; wins over --num-train-epochs when above 0.")
    num_train_epochs: float = said(STEPS, 3.0, "Passes over the training windows.")
    per_device_train_batch_size: int = said(STEPS, 8, "Windows a device takes at a time.")
    gradient_accumulation_steps: int = said(STEPS, 1, "Batches of each device that make one step.")
    per_device_eval_batch_size: int = said(STEPS, 8, "Held-out windows a device takes at a time.")
    seed: int = said(STEPS, 42, "Seed of weights, order and dropout.")
    resume_from_checkpoint: str | None = said(
        STEPS, None, "last: go on with the run in --out; auto: that, or begin; or the folder of a checkpoint."
    )

    learning_rate: float = said(
        OPTIMISER, 5e-5, "Learning rate after warm-up; 1e-3 for a new model where none is given."
    )
    lr_scheduler_type: str = said(
        OPTIMISER, "linear", "Course of the learning rate: linear, cosine, constant_with_warmup, ..."
    )
    warmup_steps: float = said(OPTIMISER, 0, "Steps of warm-up; below 1, a share of all steps.")
    weight_decay: float = said(OPTIMISER, 0.0, "Weight decay of matrices; of slopes: --slope-weight-decay.")
    max_grad_norm: float = said(OPTIMISER, 1.0, "Gradients are clipped to this norm; 0 for never.")
    optim: str = said(OPTIMISER, "adamw_torch_fused", "Optimiser, one of transformers.training_args.OptimizerNames.")
    adam_beta1: float = said(OPTIMISER, 0.9, "Decay of Adam's first moment.")
    adam_beta2: float = said(OPTIMISER, 0.999, "Decay of Adam's second moment.")
    adam_epsilon: float = said(OPTIMISER, 1e-8, "Added to the root of Adam's second moment.")
    label_smoothing_factor: float = said(OPTIMISER, 0.0, "Share of the target that goes to all other tokens.")

    eval_strategy: Literal["no", "steps", "epoch"] = said(RECORDS, "no", "When the held-out loss is measured.")
    eval_steps: float | None = said(RECORDS, None, "Measure it every N steps; --logging-steps by default.")
    save_strategy: Literal["no", "steps", "epoch", "best"] = said(RECORDS, "steps", "When checkpoints are written.")
    save_steps: float = said(RECORDS, 500, "Write one every N steps.")
    save_total_limit: int | None = said(RECORDS, None, "Keep the last N checkpoints; all by default.")
    logging_steps: float = said(RECORDS, 500, "Log the loss every N steps.")
    report_to: str = said(RECORDS, "none", "Where logs go besides: tensorboard, wandb, trackio, ...")
    run_name: str | None = said(RECORDS, None, "Name of the run there.")
    disable_tqdm: bool | None = said(RECORDS, None, "Show no progress bars.")

    use_cpu: bool = said(MACHINE, False, "cpu, or the kind of accelerator of this machine, which is the default.")
    bf16: bool = said(MACHINE, False, "Mixed precision with bfloat16.")
    fp16: bool = said(MACHINE, False, "Mixed precision with float16; needs a GPU.")
    torch_compile: bool = said(MACHINE, False, "Compile the model with torch.compile.")
    dataloader_num_workers: int = said(MACHINE, 0, "Processes that read windows ahead.")

    push_to_hub: bool = said(HUB, False, "Push the run to the Hub.")
    hub_model_id: str | None = said(HUB, None, "Repository on the Hub, like owner/name.")
    hub_private_repo: bool | None = said(HUB, None, "Make the repository private, if it is made.")


SEED = Range(0, 2**32 - 1)  # numpy takes no other
# What numbers of TrainingArguments, shown or not, may be: transformers checks few of them before it computes with them.
HOST_RANGES: dict[str, Any] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), Range(1, 1_000_000)),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps", "torch_empty_cache_steps"), at_least(1)),
    **dict.fromkeys(
        ("save_total_limit", "dataloader_prefetch_factor", "ddp_bucket_cap_mb", "ddp_timeout"), at_least(1)
    ),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "eval_steps", "save_steps"), above(0)),
    **dict.fromkeys(("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "adam_epsilon"), at_least(0)),
    **dict.fromkeys(("eval_delay", "neftune_noise_alpha"), at_least(0)),
    "dataloader_num_workers": Range(0, MOST_PROCESSES),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), Range(0, 1, open="most")),
    **dict.fromkeys(("seed", "data_seed"), SEED),
    "max_steps": at_least(-1),
    "local_rank": at_least(-1),
    **dict.fromkeys(("lr_scheduler_kwargs", "activation_checkpointing_kwargs"), MappingOrFile()),
    **dict.fromkeys(
        ("gradient_checkpointing_kwargs", "accelerator_config", "fsdp_config", "deepspeed"), MappingOrFile()
    ),
    **dict.fromkeys(("output_dir", "resume_from_checkpoint", "hub_model_id", "hub_revision", "run_name"), FILLED),
}
