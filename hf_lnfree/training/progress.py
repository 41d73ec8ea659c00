"""A progress bar that stays readable, and how long a run is going to take."""

import logging
import time
from typing import Any

from transformers import ProgressCallback, TrainerCallback

from ..tables import duration, number

STEPS_TIMED, SECONDS_TIMED = 10, 20.0  # whichever comes first, once there are three
WORTH_A_WORD = 60.0  # seconds
SHOWN = {"loss": "loss", "H": "entropy/mean", "ppl": "eval_perplexity", "acc": "eval_accuracy"}

logger = logging.getLogger(__name__)


class ReadableProgress(ProgressCallback):
    """The host's progress bar; beside it loss, perplexity or accuracy, and not forty probe metrics a line."""

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs) -> None:
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        found = {name: logs.get(key) for name, key in SHOWN.items()}
        values = {name: number(value, ".3f") for name, value in found.items() if isinstance(value, (int, float))}
        if values:
            self.latest = {**getattr(self, "latest", {}), **values}
            self.training_bar.set_postfix(self.latest)


class Forecast(TrainerCallback):
    """Says after the first steps how long the others are going to take, when that is more than a minute."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.first, self.started, self.said = state.global_step + 1, 0.0, False

    def on_step_end(self, args, state, control, **kwargs) -> None:
        timed = state.global_step - self.first  # without the first one, which compiles and allocates
        if timed <= 0:
            self.started = time.perf_counter()
        elapsed = time.perf_counter() - self.started
        if self.said or timed < 3 or (timed < STEPS_TIMED and elapsed < SECONDS_TIMED):
            return
        self.said = True
        left = elapsed / timed * (state.max_steps - state.global_step)
        if left > WORTH_A_WORD and state.is_world_process_zero:
            steps = state.max_steps - state.global_step
            logger.info("About %s left: %d steps of %.2f s.", duration(left), steps, elapsed / timed)
