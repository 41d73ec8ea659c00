"""`LNFreeTrainer`: the HF Trainer with slopes out of weight decay, the attention probe, and a guarded output folder."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn
from transformers import ProgressCallback, Trainer

from ..analysis.analyzer import Batch
from ..models import named_slopes
from .arguments import LNFreeTrainingArguments
from .callbacks import AttentionProbe, JsonlLog, ReadableProgress, StopWhenDiverged


class LNFreeTrainer(Trainer):
    """
    [`Trainer`] for the models of this package.

    - Learnable slopes get no weight decay unless `args.slope_weight_decay` is set.
    - Every `args.probe_steps` steps entropy, slopes and non-finite counts of `probe` are logged (`AttentionProbe`).
    - `eval_perplexity` stands beside `eval_loss`; each log entry is a line of `log.jsonl`.
    - A non-finite training loss ends the run; `diverged_at` names the logging step.

    Args:
        probe: held-out batches for the probe; None for no probe.

    Raises:
        ValueError: `train` finds another process at work in the output folder, or was started by torchrun without
            forming one group with its peers.
    """

    args: LNFreeTrainingArguments

    def __init__(self, *args: Any, probe: Sequence[Batch] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if probe and self.args.probe_steps > 0:
            self.add_callback(AttentionProbe(self, probe, self.args.probe_steps))
        # First of all: the file is begun anew before another callback logs at the start of training.
        self.callback_handler.callbacks.insert(0, JsonlLog(Path(self.args.output_dir) / "log.jsonl"))
        self._divergence = StopWhenDiverged()
        self.add_callback(self._divergence)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ReadableProgress())

    @property
    def diverged_at(self) -> int | None:
        """The step at which a non-finite training loss was logged."""
        return self._divergence.step

    def train(self, *args: Any, **kwargs: Any):
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched > 1 and self.args.world_size == 1:
            raise ValueError(
                f"{launched} processes were launched, but each would train alone into {self.args.output_dir}. "
                "On the CPU pass --use_cpu (or set ACCELERATE_USE_CPU=true)."
            )
        if self.args.process_index != 0:
            return super().train(*args, **kwargs)
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")  # released by the system when the process dies
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"Another process is training into {folder}. Wait for it, or give another --output_dir."
            ) from None
        with held:
            return super().train(*args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        slopes = {f"{name}.negative_slope" for name in named_slopes(model)}
        return [name for name in super().get_decay_parameter_names(model) if name not in slopes]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        model = self.model if model is None else model
        slopes = {} if model is None else {id(p): p for p in named_slopes(model).values() if p.requires_grad}
        if fresh and self.args.slope_weight_decay and slopes:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in slopes]
            optimizer.add_param_group({"params": [*slopes.values()], "weight_decay": self.args.slope_weight_decay})
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "eval_loss" in logs:
            logs["eval_perplexity"] = torch.tensor(logs["eval_loss"]).double().exp().item()
        super().log(logs, start_time)
