"""Norms removed by fine-tuning: each becomes a fixed scale on a schedule, while the model trains on."""

import copy
import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from ..analysis.modes import evaluation
from ..conversion.families import blank, own_weights, set_block_norms
from ..conversion.folding import fold, require_declared
from ..conversion.norm_sites import norm_sites
from ..conversion.stock_to_ours import ours
from ..data.collators import IGNORED
from ..data.windows import batches_of
from ..errors import ModelError, listed
from ..models.removal import MAIN, VALUE, RemovalNorm
from ..training.procedure import AttachedTrainer, Procedure
from .schedule import Removal, expand

# What is said of a removal, of the name of its norm.
PARTS = {
    "all": "{} is a fixed scale",
    "query_key": "{} is a fixed scale for queries and keys",
    "value": "{} is a fixed scale for values",
    "first": "first tokens have the scale of all others",
}
GATES = {"all": (MAIN, VALUE), "query_key": (MAIN,), "value": (VALUE,)}

logger = logging.getLogger(__name__)


def removable(model: PreTrainedModel) -> PreTrainedModel:
    """
    A copy of a model, of ours or stock, in which every norm that its stock family has is a [`RemovalNorm`] that still
    does what it did. Norms of queries and keys stay what they are.

    Raises:
        ModelError: it has no such norm, or one that could not be folded, or is no model that can become one of ours.
    """
    model = ours(model)
    require_declared(model)
    sites = norm_sites(model)
    if behind := [site.name for site in sites if site.behind]:
        raise ModelError(
            f"{behind[0]} stands behind the sum of stream and branch, as all norms of {type(model).__name__} do. A "
            "fixed scale could not be folded there: such norms are not removed."
        )
    if disabled := [site.name for site in sites if site.fixed_scale is not None]:
        raise ModelError(f"{disabled[0]} has a fixed scale already: hf-lnfree convert takes it out exactly.")
    config, stock = copy.deepcopy(model.config), model.config.stock_norm
    kinds = ["removal" if kind == stock else kind for kind in config.block_norms]
    set_block_norms(config, kinds)
    config.final_norm = "removal" if config.final_norm == stock else config.final_norm
    if "removal" not in {*kinds, config.final_norm}:
        name = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}[stock]
        raise ModelError(f"The model has no {name} to remove: its norms are {sorted({*kinds, config.final_norm})}.")
    new = blank(type(model), config, model.dtype, own_weights(model))
    _, unexpected = new.load_state_dict(model.state_dict(), strict=False)  # what is missing is the norms' own state
    assert not unexpected, unexpected
    if model.can_generate():
        new.generation_config = copy.deepcopy(model.generation_config)
    return new


class PlainFineTuning(Procedure):
    """What a removal is compared with: the same model with its norms, as one of ours, so that losses mean the same."""

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        return ours(model)


class NormRemoval(Procedure, TrainerCallback, ExportableState):
    """
    Removes norms while a model is fine-tuned, and folds what is left at the end.

    Its state is a part of each checkpoint's trainer_state.json, so that a run goes on in the middle of the schedule.

    Args:
        schedule: as `read_schedule` gives it.
        gate_steps: over how many steps a norm goes from sigma to its fixed scale; 0 and 1 are a switch.
        residual_norm_weight: of a penalty on `(sigma / fixed sigma - 1)^2`, the mean over norms and over all tokens,
            where the first token of a sequence counts as 0: it keeps residual streams at one size (arXiv 2507.02559,
            auxiliary loss).
        windows: held-out examples behind the losses before and after a removal, and as many behind the first averages.
    """

    def __init__(
        self,
        schedule: Sequence[dict[str, Any]] | Literal["auto"],
        gate_steps: int = 0,
        residual_norm_weight: float = 0.0,
        windows: int = 64,
        lora_rank: int | None = None,
        lora_alpha: int | None = None,
    ):
        super().__init__(lora_rank, lora_alpha)
        self.schedule, self.gate_steps, self.weight, self.windows = schedule, gate_steps, residual_norm_weight, windows
        self.removals: list[Removal] = []
        self.events: list[dict[str, Any]] = []
        self.norms: dict[str, RemovalNorm] = {}

    # What Procedure asks for

    def settings(self) -> dict[str, Any]:
        told = {"schedule": self.schedule, "gate_steps": self.gate_steps, "residual_norm_weight": self.weight}
        return super().settings() | told | {"removal_windows": self.windows}

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        model = removable(model)
        self.norms = {site.name: site.norm for site in norm_sites(model) if isinstance(site.norm, RemovalNorm)}
        self.removed_model = model
        return model

    def attach(self, trainer: AttachedTrainer, steps: int) -> None:
        if trainer.is_fsdp_enabled:
            raise ModelError(
                "Norms are removed with whole weights on every device: a removal is judged by a held-out loss in the "
                "middle of a step, and folded into the weights at the end. Use DDP (drop the FSDP settings)."
            )
        self.trainer = trainer
        self.removals = expand(self.schedule, self.removed_model, steps, self.gate_steps)
        trainer.add_callback(self)
        if self.weight:
            trainer.penalties.append(self.penalty)

    def finish(self, model: PreTrainedModel | PeftModel) -> PreTrainedModel:
        merged = super().finish(model)
        left = [name for name, norm in self.norms.items() if not norm.finished]
        if left:
            logger.warning("Norms that are not removed to the end: %s. The model is not folded.", listed(left))
            return merged
        folded, _ = fold(merged)
        return folded

    def report(self) -> dict[str, Any]:
        return super().report() | {
            "removal": {
                **self.plan,
                "events": self.events,
                "sigma": {name: norm.sigma.tolist() for name, norm in self.norms.items()},
            }
        }

    @property
    def plan(self) -> dict[str, Any]:
        schedule = [asdict(removal) for removal in self.removals]
        return {"schedule": schedule, "gate_steps": self.gate_steps, "residual_norm_weight": self.weight}

    # What Trainer asks for

    def state(self) -> dict[str, Any]:
        norms = {name: [*norm.sigma.tolist(), norm.batches.item()] for name, norm in self.norms.items()}
        return {"args": {}, "attributes": {"plan": self.plan, "events": self.events, "norms": norms}}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == 0:
            self.calibrate()
        else:
            self.resume(state)

    def resume(self, state: TrainerState) -> None:
        callbacks: Any = state.stateful_callbacks
        stored = callbacks.get(type(self).__name__, {}).get("attributes")
        if stored is None or stored["plan"] != self.plan:
            raise ModelError(
                "The checkpoint is of a run with another schedule, or of none that removes norms. Give the schedule, "
                "gate_steps, residual_norm_weight and max_steps of that run, or another --out."
            )
        self.events[:] = stored["events"]
        for name, (first, others, batches) in stored["norms"].items():
            self.norms[name].sigma.copy_(torch.tensor([first, others]))
            self.norms[name].batches.fill_(batches)
        for removal in self.removals:
            self.set_gate(removal, self.gate(removal, state.global_step - 1))

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        step = state.global_step
        for removal in self.removals:
            gate = self.gate(removal, step)
            if removal.step == step:
                self.agree(removal)
                self.events.append({**asdict(removal), "loss_before": self.loss(), "loss_after": None})
            self.set_gate(removal, gate)  # at every step: a rollback takes gates back
            if gate == 1 and self.gate(removal, step - 1) < 1:
                self.removed(removal)
        self.observe(True)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.observe(False)

    # What both rest on

    def gate(self, removal: Removal, step: int) -> float:
        """How far a removal is in the forward passes of a step."""
        return min(1.0, max(0, step - removal.step + 1) / max(1, self.gate_steps))

    @torch.no_grad()
    def set_gate(self, removal: Removal, gate: float) -> None:
        if gate and removal.part == "first":
            for norm in self.norms.values():
                norm.first_gate.fill_(gate)
        elif gate:
            self.norms[removal.norm].gate[list(GATES[removal.part])] = gate

    def removed(self, removal: Removal) -> None:
        """Note the loss after a removal, and log it."""
        event = next(event for event in self.events if (event["norm"], event["part"]) == (removal.norm, removal.part))
        event["loss_after"] = self.loss()
        left = sum(not norm.gate.eq(1).all() for norm in self.norms.values())
        losses = {f"removal/{key}": event[key] for key in ("loss_before", "loss_after")}
        self.trainer.log_aside(losses | {"removal/norms": left})
        if self.trainer.args.process_index == 0:
            what = f"step {removal.step}: {PARTS[removal.part].format(removal.norm)}"
            left_of = f"{left} of {len(self.norms)} norms left"
            logger.info("%s; %s; loss %.4f, before %.4f", what, left_of, event["loss_after"], event["loss_before"])

    def agree(self, removal: Removal) -> None:
        """One average over all processes, for a norm whose average stops moving now."""
        for norm in self.norms.values() if removal.part == "first" else (self.norms[removal.norm],):
            if dist.is_initialized() and not norm.gate.any():
                dist.all_reduce(norm.sigma)
                norm.sigma /= dist.get_world_size()

    def observe(self, on: bool) -> None:
        for norm in self.norms.values():
            norm.observing = on

    @torch.no_grad()
    def calibrate(self) -> None:
        """The first averages, from training examples."""
        self.observe(True)
        self.run(self.trainer.train_dataset)
        self.observe(False)

    def loss(self) -> float:
        """Of held-out examples, in the units of the objective."""
        return self.run(self.trainer.eval_dataset)

    @torch.no_grad()
    def run(self, split: Any) -> float:
        """The loss on examples spread over a split, in eval mode."""
        model = self.trainer.unwrapped
        batches = batches_of(split, self.trainer.data_collator, self.windows, self.trainer.args.eval_batch_size)
        with evaluation(model):
            moved = ({name: value.to(model.device) for name, value in batch.items()} for batch in batches)
            losses = [(model(**batch).loss.item(), int((batch["labels"] != IGNORED).sum())) for batch in moved]
        return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)

    def penalty(self) -> Tensor:
        r"""
        `residual_norm_weight` times the mean of $(\sigma / \sigma_0 - 1)^2$ over norms and all tokens of the last
        forward pass, where the first token of a sequence counts as 0.
        """
        deviations = [norm.deviation for norm in self.norms.values() if norm.deviation is not None]
        return self.weight * torch.stack([deviation.square().mean() for deviation in deviations]).mean()
