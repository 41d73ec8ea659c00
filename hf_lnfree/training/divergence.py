"""What happens when a loss or a gradient is no longer finite: it is diagnosed before the step is taken."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerCallback

from ..analysis.nonfinite import NonFinite, first_nonfinite, judge
from ..errors import LNFreeError, listed
from .checkpoints import checkpoints
from .recorder import FlightRecorder, Sample, recorded_events
from .rollback import GoodState, scale_learning_rate

ROLLBACK_FACTOR, MOST_ROLLBACKS = 0.5, 8
SCALER_PATIENCE = 40  # steps in a row that a loss scaler may skip before its gradients count as diverged
SCALED_IN_VAIN: dict[str, Any] = {
    "verdict": "overflow",
    "figures": "",
    "first": "gradients, at every loss scale that was tried",
    "tensor": None,
    "sample": {},
}
ACTIONS = {
    "stop": "The run stops",
    "skip": "The step is skipped",
    "rollback": "Back to the last sample, at half the learning rate",
}

logger = logging.getLogger(__name__)


class DivergenceGuard(TrainerCallback):
    """
    Checks every step's loss and gradients before they are applied, and the weights and moments that a step leaves
    wherever they are sampled or saved, and at the end.

    When they are not finite, the tensor that went first is looked for by repeating the step, `flight_recorder.json` is
    written, and `args.on_nonfinite` decides:

    - "stop" ends the run. The state before the step is saved as a checkpoint, unless its weights are spoilt already.
    - "skip" leaves the weights as they are and goes on; it stops when they are spoilt already.
    - "rollback" goes back to the weights and optimiser state of the last sample and halves the learning rate for good;
      after eight times it stops. Keeps a copy of both in the CPU's memory.

    A run none of whose steps was taken counts as diverged at its last one.

    Args:
        recorder: whose samples tell what led there; its model and its steps are those that are checked.
        loss: of its model on a batch, without anything around it that hides modules.
        folder: gives that of the run.
        save: saves a checkpoint of the state before the step.
        spoilt: names a tensor of the weights or the optimiser's moments that is not finite, or gives None.
        drop_gradients: of the step at hand.
        scaler: gives the loss scaler, or None.
        skipped: whether the scaler did not take the last step.
        gather: one tensor out of those of all processes.
    """

    def __init__(
        self,
        recorder: FlightRecorder,
        *,
        loss: Callable[[Mapping[str, Any]], Tensor],
        folder: Callable[[], Path],
        save: Callable[[], None],
        spoilt: Callable[[], str | None],
        drop_gradients: Callable[[], None],
        scaler: Callable[[], Any],
        skipped: Callable[[], bool],
        gather: Callable[[Tensor], Tensor],
    ):
        self.recorder, self.step = recorder, recorder.step
        self.loss, self.save, self.spoilt, self.drop_gradients = loss, save, spoilt, drop_gradients
        self.scaler, self.skipped, self.gather, self.folder = scaler, skipped, gather, folder
        self.begin()

    def begin(self) -> None:
        """Nothing has happened yet."""
        self.events: list[dict[str, Any]] = []
        self.diverged_at: int | None = None
        self.scaled_in_vain = self.taken = 0
        self.good: GoodState | None = None

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        self.begin()  # an earlier trial of a search may have ended otherwise
        self.recall(state.global_step)
        self.remember(args, optimizer)

    def recall(self, step: int) -> None:
        """A resumed run keeps what happened before its checkpoint."""
        if step:
            self.events = [event for event in recorded_events(self.folder()) if event["step"] <= step]
            self.taken = step - len(self.events)

    def on_step_end(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs) -> None:
        not_finite = bool(self.events) and self.events[-1]["step"] == state.global_step
        self.taken += not (not_finite or self.skipped())
        due = self.recorder.due(state.global_step, state.max_steps)
        if self.diverged_at is None and (due or control.should_save):
            if spoilt := self.spoilt():
                self.diverge(args, state.global_step, optimizer, lr_scheduler, spoilt)
            elif due:
                self.remember(args, optimizer)
        if self.diverged_at is not None:
            control.should_training_stop = control.should_log = True

    def on_train_end(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs) -> None:
        step = state.global_step
        if self.diverged_at is None and (spoilt := self.spoilt()):
            self.diverge(args, step, optimizer, lr_scheduler, spoilt)
        if self.diverged_at is None and step and self.taken <= 0:
            logger.error("None of the %d steps was taken: each was not finite.", step)
            self.diverged_at = step
            if not self.events:  # a loss scaler skipped them all
                self.events.append({"step": step, "action": "skip", **SCALED_IN_VAIN})
            self.events[-1]["last_good_state"] = "none: no step was taken"
            self.recorder.write("no step was taken", self.events)

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs) -> None:
        if self.is_finite(args.world_size):
            self.scaled_in_vain = 0
        elif self.is_divergence():
            self.diverge(args, state.global_step + 1, optimizer, lr_scheduler)

    def is_finite(self, processes: int) -> bool:
        # Gradients are the same on all processes, and a loss that is not finite on one of them reaches them all.
        losses_finite = processes > 1 or bool(self.step.losses.isfinite().all())
        return math.isfinite(self.step.grad_norm) and losses_finite

    def is_divergence(self) -> bool:
        """A loss scaler tries out scales that overflow, and skips these steps by itself; the loss is finite then."""
        if self.scaler() is None or not bool(self.gather(self.step.losses).isfinite().all()):
            return True
        self.scaled_in_vain += 1
        return self.scaled_in_vain > SCALER_PATIENCE

    def diverge(self, args: Any, step: int, optimizer: Any, lr_scheduler: Any, spoilt: str | None = None) -> None:
        """A step is not finite, or left `spoilt`, a tensor that is not."""
        action = args.on_nonfinite
        if action == "rollback" and (self.good is None or len(self.events) >= MOST_ROLLBACKS):
            action = "stop"
        if action == "skip" and spoilt:
            action = "stop"
        event = {"step": step, "action": action, **self.diagnose(spoilt)}
        self.events.append(event)
        logger.error(
            "Step %d is not finite: %s. First: %s. %s. %s.",
            *(step, event["verdict"], event["first"], event["figures"], ACTIONS[action]),
        )
        self.recorder.log({"nonfinite/events": len(self.events)})
        if action == "stop":
            self.diverged_at = step
            event["last_good_state"] = self.save_good_state(step - 1)
        elif action == "rollback":
            assert self.good is not None
            self.good.restore(self.recorder.model(), optimizer)
            scale_learning_rate(optimizer, lr_scheduler, ROLLBACK_FACTOR)
        self.recorder.write(f"not finite at step {step}", self.events)
        if self.scaler() is None:  # a scaler skips the step itself, and needs the gradients for that
            self.drop_gradients()

    def diagnose(self, spoilt: str | None = None) -> dict[str, Any]:
        model, inputs = self.recorder.model(), self.step.inputs
        first, where = self.first_nonfinite(model, inputs)
        now: Sample = {}
        try:
            now = self.recorder.sample(self.recorder.batches or inputs)
        except LNFreeError as error:
            logger.warning("No sample could be taken: %s", error)
        before = self.recorder.samples[-1] if self.recorder.samples else now
        # Heads that are not finite any more say nothing: what they were before does.
        whole = now.get("nonfinite/attention_rows", 1) == 0
        last = before | {k: v for k, v in now.items() if math.isfinite(v) and (whole or "entropy/" not in k)}
        verdict, figures = judge(self.recorder.first or before, last)
        return {
            "verdict": verdict,
            "figures": figures,
            "first": f"{first}{where}" if first else spoilt or "not seen again when the step was repeated",
            "tensor": first.to_dict() if first else None,
            "sample": now,
        }

    def first_nonfinite(self, model: nn.Module, inputs: Sequence[Mapping[str, Any]]) -> tuple[NonFinite | None, str]:
        """What was found in the first batch in which any process finds something, and on which of them it was."""

        def anywhere(found: bool) -> bool:
            return bool(self.gather(torch.tensor([found], device=self.step.losses.device)).any())

        for batch in inputs:
            everyones = gather_object([first_nonfinite(model, partial(self.loss, batch), anywhere)])
            seen = [number for number, first in enumerate(everyones) if first]
            if seen:
                which = listed([str(number) for number in seen])
                where = "" if len(seen) == len(everyones) else f", on process {which} of {len(everyones)}"
                return everyones[seen[0]], where
        return None, ""

    def save_good_state(self, step: int) -> str:
        """Its name, or why there is none."""
        if self.spoilt() is None:
            self.save()
            return f"checkpoint-{step}"
        known = checkpoints(self.folder())
        return known[-1].name if known else "none: the weights are not finite, and no checkpoint was saved before"

    def remember(self, args: Any, optimizer: Any) -> None:
        if args.on_nonfinite == "rollback" and self.spoilt() is None:
            self.good = GoodState(self.recorder.model(), optimizer)
