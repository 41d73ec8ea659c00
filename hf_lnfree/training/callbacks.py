"""Callbacks of `LNFreeTrainer`: the JSONL log and a progress bar that stays readable."""

import json
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerState


class JsonlLog(TrainerCallback):
    """
    `log.jsonl` in the output folder: one line for each entry of log_history, written as it comes.

    A resumed run begins with the history of its checkpoint, so no step stands there twice.
    """

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.begin(state)

    def begin(self, state: TrainerState) -> None:
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
