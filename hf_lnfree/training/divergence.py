"""What happens when a loss or a gradient is no longer finite: it is diagnosed before the step is taken."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback

from ..analysis.nonfinite import count_nonfinite, first_nonfinite, judge
from ..errors import LNFreeError
from .checkpoints import checkpoints
from .recorder import FlightRecorder, Sample

if TYPE_CHECKING:
    from .trainer import LNFreeTrainer

ROLLBACK_FACTOR, MOST_ROLLBACKS = 0.5, 8
SCALER_PATIENCE = 40  # steps in a row that a loss scaler may skip before its gradients count as diverged
ACTIONS = {
    "stop": "The run stops",
    "skip": "The step is skipped",
    "rollback": "Back to the last sample, at half the learning rate",
}

logger = logging.getLogger(__name__)


class DivergenceGuard(TrainerCallback):
    """
    Checks every step's loss and gradients before they are applied.

    When they are not finite, the tensor that went first is looked for by repeating the step, `flight_recorder.json` is
    written, and `args.on_nonfinite` decides:

    - "stop" ends the run. The state before the step is saved as a checkpoint, unless its weights are spoilt already.
    - "skip" leaves the weights as they are and goes on.
    - "rollback" goes back to the weights and optimiser state of the last sample and halves the learning rate for good;
      after eight times it stops. Keeps a copy of both in the CPU's memory.

    Args:
        trainer: whose steps are checked.
        recorder: whose samples tell what led there.
    """

    def __init__(self, trainer: "LNFreeTrainer", recorder: FlightRecorder):
        self.trainer, self.recorder = trainer, recorder
        self.events: list[dict[str, Any]] = []
        self.diverged_at: int | None = None
        self.scaled_in_vain = 0
        self.good: dict[str, Tensor] | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step:  # a resumed run keeps what happened before its checkpoint
            self.events = [event for event in self.recorder.recorded_events() if event["step"] <= state.global_step]
        self.remember()

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.trainer.micro_batches = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.diverged_at is not None:
            control.should_training_stop = control.should_log = True
        elif self.recorder.due(state.global_step, state.max_steps):
            self.remember()

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        if self.is_finite():
            self.scaled_in_vain = 0
        elif self.is_divergence():
            self.diverge(state)

    def is_finite(self) -> bool:
        # Gradients are the same on all processes, and a loss that is not finite on one of them reaches them all.
        alone = self.trainer.args.world_size == 1
        losses_finite = not alone or all(bool(loss.isfinite()) for _, loss in self.trainer.micro_batches)
        return math.isfinite(self.trainer.grad_norm) and losses_finite

    def is_divergence(self) -> bool:
        """A loss scaler tries out scales that overflow, and skips these steps by itself; the loss is finite then."""
        accelerator = self.trainer.accelerator
        losses = torch.stack([loss for _, loss in self.trainer.micro_batches])
        if accelerator.scaler is None or not bool(accelerator.gather(losses).isfinite().all()):
            return True
        self.scaled_in_vain += 1
        return self.scaled_in_vain > SCALER_PATIENCE

    def diverge(self, state: Any) -> None:
        step = state.global_step + 1
        action = self.trainer.args.on_nonfinite
        if action == "rollback" and (self.good is None or len(self.events) >= MOST_ROLLBACKS):
            action = "stop"
        event = {"step": step, "action": action, **self.diagnose()}
        self.events.append(event)
        logger.error(
            "Step %d is not finite: %s. First: %s. %s. %s.",
            *(step, event["verdict"], event["first"], event["figures"], ACTIONS[action]),
        )
        self.trainer.log({"nonfinite/events": len(self.events)})
        if action == "stop":
            self.diverged_at = step
            event["last_good_state"] = self.save_good_state(state)
        elif action == "rollback":
            self.roll_back()
        self.recorder.write(f"not finite at step {step}", self.events)
        if self.trainer.accelerator.scaler is None:  # a scaler skips the step itself, and needs the gradients for that
            self.trainer.model_wrapped.zero_grad(set_to_none=True)

    def diagnose(self) -> dict[str, Any]:
        model = self.recorder.model
        inputs = [batch for batch, _ in self.trainer.micro_batches]
        found = filter(None, (first_nonfinite(model, self.loss_of(model, batch)) for batch in inputs))
        first = next(found, None)
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
            "first": str(first) if first else "not seen again when the step was repeated",
            "tensor": first.to_dict() if first else None,
            "sample": now,
        }

    def loss_of(self, model: PreTrainedModel, batch: Mapping[str, Any]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with self.trainer.compute_loss_context_manager(), torch.compiler.set_stance("force_eager"):
                return model(**batch).loss

        return run

    def save_good_state(self, state: Any) -> str:
        if not any(map(count_nonfinite, self.recorder.model.parameters())):
            self.trainer._save_checkpoint(self.trainer.model_wrapped, None)
            return f"checkpoint-{state.global_step}"
        known = checkpoints(Path(self.trainer.args.output_dir))
        return known[-1].name if known else "none: the weights are not finite, and no checkpoint was saved before"

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """This process's part of the weights and of the optimiser's state, by name."""
        optimizer: Any = self.trainer.optimizer
        for name, parameter in self.recorder.model.named_parameters():
            yield name, local(parameter.detach())
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    yield f"{name}, {key}", local(value)

    def remember(self) -> None:
        if self.trainer.args.on_nonfinite == "rollback":
            self.good = {name: tensor.to("cpu", copy=True) for name, tensor in self.state_tensors()}

    @torch.no_grad()
    def roll_back(self) -> None:
        assert self.good is not None
        for name, tensor in self.state_tensors():
            known = self.good.get(name)
            tensor.zero_() if known is None else tensor.copy_(known)  # before the first step there were no moments
        optimizer: Any = self.trainer.optimizer
        scheduler: Any = getattr(self.trainer.lr_scheduler, "scheduler", self.trainer.lr_scheduler)
        for group in optimizer.param_groups:
            group.update({key: ROLLBACK_FACTOR * group[key] for key in ("lr", "initial_lr")})
        scheduler.base_lrs = [ROLLBACK_FACTOR * rate for rate in scheduler.base_lrs]


def local(x: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds."""
    return x.to_local() if isinstance(x, DTensor) else x
