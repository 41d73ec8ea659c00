"""Callbacks of `LNFreeTrainer`: the attention probe, the JSONL log and a progress bar that stays readable."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, ProgressCallback, TrainerCallback

from ..analysis.analyzer import AttentionEntropyAnalyzer, Batch
from ..models import named_slopes

if TYPE_CHECKING:
    from .trainer import LNFreeTrainer


class AttentionProbe(TrainerCallback):
    """
    Logs entropy per layer, slopes and non-finite counts, measured on a fixed held-out batch in eval mode.

    Keys: `entropy/layer_00`..., `entropy/mean` (nats), `entropy/overloaded` and `entropy/collapsed` (shares of heads
    against the causal bound), `slope/layer_00`... or `slope/global`, `nonfinite/attention_rows`,
    `nonfinite/parameters`.

    Args:
        trainer: whose `log` receives the metrics, and with it log_history, JSONL and everything report_to names.
        batches: the held-out inputs.
        every: steps between two measurements; the first and the last step are always measured.
    """

    def __init__(self, trainer: "LNFreeTrainer", batches: Sequence[Batch], every: int):
        self.trainer, self.batches, self.every = trainer, batches, every

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == 0:
            self.measure()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.measure()

    def measure(self) -> None:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        report = AttentionEntropyAnalyzer(model, replicates=0).run(self.batches)
        metrics: dict[str, float] = {
            f"entropy/layer_{layer:02d}": mean for layer, mean in enumerate(report.layer_means())
        }
        metrics["entropy/mean"] = float(report.entropy[report.heads].mean())
        metrics["entropy/overloaded"] = report.overloaded("causal")
        metrics["entropy/collapsed"] = report.collapsed("causal")
        metrics |= slope_metrics(model)
        metrics["nonfinite/attention_rows"] = int(report.nonfinite_rows.sum())
        metrics["nonfinite/parameters"] = int(sum((~p.detach().isfinite()).sum() for p in model.parameters()))
        # Logging clears should_log, and the host's own loss of this step is still to come.
        should_log = self.trainer.control.should_log
        self.trainer.log(metrics)
        self.trainer.control.should_log = should_log


def slope_metrics(model: PreTrainedModel) -> dict[str, float]:
    """Learnable slopes as `slope/layer_NN`, or as `slope/global` when the model has one."""
    slopes = named_slopes(model)
    if not slopes:
        return {}
    if model.config.slope_scope == "global":
        return {"slope/global": next(iter(slopes.values())).item()}
    layers = (i for i, name in enumerate(model.config.block_activations) if name == "learnable_leaky_relu")
    return {f"slope/layer_{i:02d}": p.item() for i, p in zip(layers, slopes.values(), strict=True)}


class JsonlLog(TrainerCallback):
    """
    `log.jsonl` in the output folder: one line for each entry of log_history, written as it comes.

    A resumed run begins with the history of its checkpoint, so no step stands there twice.
    """

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("".join(json.dumps(entry) + "\n" for entry in state.log_history))

    def on_log(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero and self.path.exists():
            with open(self.path, "a") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")


class ReadableProgress(ProgressCallback):
    """The host's progress bar; beside it loss and perplexity, and not forty probe metrics a line."""

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs) -> None:
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        shown = {"loss": logs.get("loss"), "ppl": logs.get("eval_perplexity"), "H": logs.get("entropy/mean")}
        values = {key: f"{value:.3f}" for key, value in shown.items() if isinstance(value, (int, float))}
        if values:
            self.latest = {**getattr(self, "latest", {}), **values}
            self.training_bar.set_postfix(self.latest)


class StopWhenDiverged(TrainerCallback):
    """Ends a run whose training loss is no longer finite, so that hours are not spent on NaN."""

    step: int | None = None

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs) -> None:
        loss = (logs or {}).get("loss")
        if self.step is None and isinstance(loss, float) and not math.isfinite(loss):
            self.step = state.global_step
            control.should_training_stop = True
