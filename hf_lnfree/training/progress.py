"""A progress bar that stays readable."""

from typing import Any

from transformers import ProgressCallback

from ..tables import number


class ReadableProgress(ProgressCallback):
    """The host's progress bar; beside it loss and perplexity, and not forty probe metrics a line."""

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs) -> None:
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        shown = {"loss": logs.get("loss"), "ppl": logs.get("eval_perplexity"), "H": logs.get("entropy/mean")}
        values = {key: number(value, ".3f") for key, value in shown.items() if isinstance(value, (int, float))}
        if values:
            self.latest = {**getattr(self, "latest", {}), **values}
            self.training_bar.set_postfix(self.latest)
