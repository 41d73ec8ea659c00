"""The flight recorder: what every layer does, sampled while a model trains.

Samples are logged like losses; the last of them are kept in memory, beside every step's loss and gradient norm, and
written when a run dies.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from ..analysis.analyzer import AttentionEntropyAnalyzer, Batch
from ..analysis.geometry import GeometryAnalyzer
from ..analysis.layers import decoder_blocks, record_layers
from ..analysis.nonfinite import count_nonfinite, whole
from ..analysis.parts import places
from ..files import read_json, write_json
from ..models.activations import ChannelPReLU, GELUReLU, LearnableLeakyReLU
from .log import layer_curves
from .shards import reshard
from .steps import StepRecord

RECORD = "flight_recorder.json"
STEPS_KEPT = 200
HEADS = "head_entropies"
# Of a `GeometryReport`; what needs eigenvalues would cost more than training.
PROBED = (
    "row_participation_ratio_post",
    "participation_gain",
    "frequency",
    "specialisation",
    "between_share",
    "class_selectivity",
    "within_selectivity",
    "alignment",
)
LARGEST_GROWTH = 1000.0  # of the residual stream over the blocks of a model at its first step
DECIMALS = 4  # of a nat: what is written of each head
Sample = dict[str, float]

logger = logging.getLogger(__name__)


class FlightRecorder(TrainerCallback):
    """
    Every `every` steps a sample of the held-out `batches`, in eval mode, goes to the log.

    Keys, by layer (`/layer_00`, ...; of an encoder-decoder `/encoder/layer_00`, `/decoder/layer_00`, and
    `/cross/layer_00` for entropies): `entropy` (nats), `residual_rms`, `attention_logit` (the largest), `sparsity` and
    `dead_units` of the MLP, `grad_norm` (of the training step, before clipping), `slope` (or `slope/global`) and
    `gelu_share`, where they are learned; see `LayerStatistics`. Of the model: `entropy/mean`, `entropy/overloaded` and
    `entropy/collapsed` (shares of heads against their bound), `nonfinite/attention_rows`,
    `nonfinite/activations`, `nonfinite/parameters`. `head_entropies` [layers][heads] (nats, to four decimals) goes to
    `log.jsonl` alone, not to trackers. With `geometry`, `specialisation/layer_00`, `between_share/next_token/layer_00`
    and the like, the `PROBED` metrics of a `GeometryReport`.

    Args:
        batches: the held-out inputs; without any nothing is sampled.
        model: gives the model that is looked at, without what distributes or compiles it.
        step: what the step at hand is made of.
        log: takes a sample, and what the log of the run holds besides, in the middle of a step.
        every: steps from one sample to the next; 0 for none.
        geometry: whether a sample has the geometry of the MLPs, which takes a second forward pass and sums over it.
        kept: samples that are kept in memory.
        folder: gives the folder where `flight_recorder.json` is written; None on processes that do not write.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        *,
        model: Callable[[], PreTrainedModel],
        step: StepRecord,
        log: Callable[..., None],
        every: int,
        geometry: bool = False,
        kept: int,
        folder: Callable[[], Path] | None = None,
    ):
        self.batches, self.model, self.step, self.log, self.folder = batches, model, step, log, folder
        self.every, self.geometry = every if batches else 0, geometry
        self.samples: deque[dict[str, Any]] = deque(maxlen=kept)
        self.steps: deque[dict[str, Any]] = deque(maxlen=STEPS_KEPT)
        self.first: dict[str, Any] = {}
        self.layer_grad_norms: Sample = {}

    def due(self, step: int, max_steps: int) -> bool:
        return self.every > 0 and (step % self.every == 0 or step == max_steps)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        known = [dict(entry) for entry in state.log_history if "entropy/mean" in entry]  # of a resumed run
        self.samples.clear()  # of an earlier trial
        self.steps.clear()
        self.samples.extend(known)
        self.first = known[0] if known else {}
        if state.global_step == 0 and self.every:
            self.log_sample(state.global_step)
            if state.is_world_process_zero:
                warn_of_growth(self.model().config, self.samples[-1])

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.step.begin()

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        number, step = state.global_step + 1, self.step
        self.steps.append(
            {"step": number, "loss": step.loss, "grad_norm": step.grad_norm, "learning_rate": step.learning_rate}
        )
        if self.due(number, state.max_steps) and math.isfinite(step.grad_norm):
            self.layer_grad_norms = self.grad_norms(step.grad_norm, args.max_grad_norm)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.due(state.global_step, state.max_steps):
            self.log_sample(state.global_step)

    def log_sample(self, step: int) -> None:
        sample, heads = self.look(self.batches)
        sample |= self.layer_grad_norms
        besides = {HEADS: [[round(entropy, DECIMALS) for entropy in layer] for layer in heads.tolist()]}
        self.samples.append({"step": step, **sample, **besides})
        self.first = self.first or self.samples[0]
        self.log(dict(sample), besides)

    def sample(self, batches: Sequence[Batch]) -> Sample:
        """What `look` finds, without the heads."""
        return self.look(batches)[0]

    def look(self, batches: Sequence[Batch]) -> tuple[Sample, Tensor]:
        """
        A sample of the model on these batches, and [L, H] the mean entropy of each head.

        Raises:
            LNFreeError: the layers or the attention of the model cannot be recorded.
        """
        model = self.model()
        with record_layers(model) as layers:
            report = AttentionEntropyAnalyzer(model, replicates=0).run(batches)
        units = geometry_sample(model, batches) if self.geometry else {}
        reshard(model)
        by_layer = {
            "entropy": (places(report.modules), report.layer_means()),
            "residual_rms": (layers.places, layers.residual_rms),
            "attention_logit": (layers.places, layers.largest_logit),
            "sparsity": (layers.places, layers.sparsity),
            "dead_units": (layers.places, layers.dead_units),
        }
        sample = {f"{key}/{place}": x for key, column in by_layer.items() for place, x in zip(*column, strict=True)}
        sample["entropy/mean"] = float(report.entropy[report.heads].mean())
        for part in ("", *dict.fromkeys(filter(None, report.part_names))):
            of = f"/{part}" if part else ""
            sample[f"entropy/overloaded{of}"] = report.overloaded("causal", part)
            sample[f"entropy/collapsed{of}"] = report.collapsed("causal", part)
        sample |= learned_metrics(model)
        sample["nonfinite/attention_rows"] = int(report.nonfinite_rows.sum())
        sample["nonfinite/activations"] = sum(layers.nonfinite)
        sample["nonfinite/parameters"] = sum(map(count_nonfinite, model.parameters()))
        return sample | units, report.entropy

    def grad_norms(self, total: float, largest: float = 0.0) -> Sample:
        """
        Of each layer, and of what stands outside the layers, before clipping.

        Args:
            total: gradient norm of the whole model, before clipping.
            largest: to which it was clipped; 0 if it was not.
        """
        clipped = min(1.0, largest / (total + 1e-6)) if largest else 1.0
        model = self.model()
        owner = {p: place for place, block in placed_blocks(model) for p in block.parameters()}
        inside: dict[str, list[Tensor]] = {}
        for parameter in model.parameters():
            if parameter.grad is not None:
                inside.setdefault(owner.get(parameter, "outside"), []).append(parameter.grad)
        norms = {key: torch.stack([whole(g.norm()).float() for g in grads]).norm() for key, grads in inside.items()}
        return {f"grad_norm/{key}": float(norm) / clipped for key, norm in sorted(norms.items())}

    def write(self, reason: str, events: Sequence[Mapping[str, Any]]) -> None:
        """`flight_recorder.json`: the reason, events, last steps and last samples."""
        if self.folder is not None:
            folder = self.folder()
            folder.mkdir(parents=True, exist_ok=True)
            record = {"reason": reason, "events": events, "steps": list(self.steps), "samples": list(self.samples)}
            write_json(folder / RECORD, record)


def warn_of_growth(config: Any, sample: Mapping[str, Any]) -> None:
    """Without norms, and with branches that are not scaled, every block makes the stream larger."""
    if (getattr(config, "norm", None), getattr(config, "residual_init", None)) != ("none", "plain"):
        return
    for layers in layer_curves([sample], "residual_rms").values():
        (_, first), (_, last) = layers[0][0], layers[-1][0]
        if last > LARGEST_GROWTH * first > 0:
            logger.warning(
                "Before the first step the residual stream grows %.0e-fold from the first block to the last, and the "
                "run may diverge at once. Begin with smaller branches: residual_init: scaled in config_overrides.",
                last / first,
            )


def geometry_sample(model: PreTrainedModel, batches: Sequence[Batch]) -> Sample:
    """The `PROBED` metrics of every MLP, by kind of classes where they have classes."""
    report = GeometryAnalyzer(model, groups=1).sums(batches).report(spectra=False)
    found = {name: values for name, values in report.values.items() if name.partition("/")[0] in PROBED}
    names = places(report.modules)
    return {f"{key}/{place}": x for key, xs in found.items() for place, x in zip(names, xs.tolist(), strict=True)}


def recorded_events(folder: Path) -> list[dict[str, Any]]:
    """
    Steps that were not finite in an earlier part of this run.

    Raises:
        RunError: its `flight_recorder.json` is damaged.
    """
    path = folder / RECORD
    return read_json(path)["events"] if path.is_file() else []


def placed_blocks(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """The blocks by what logs call them."""
    blocks = decoder_blocks(model)
    return zip(places(list(blocks)), blocks.values(), strict=True)


def learned_metrics(model: PreTrainedModel) -> Sample:
    """What activations learn: slopes (of "prelu" their mean over channels) and the share of GELU in "gelu_relu"."""
    sample = {}
    one = getattr(model.config, "slope_scope", "layer") == "global"
    for place, block in placed_blocks(model):
        for module in block.modules():
            if isinstance(module, LearnableLeakyReLU):
                sample["slope/global" if one else f"slope/{place}"] = whole(module.negative_slope).item()
            elif isinstance(module, ChannelPReLU):
                sample[f"slope/{place}"] = whole(module.weight).mean().item()
            elif isinstance(module, GELUReLU):
                sample[f"gelu_share/{place}"] = whole(module.weight).sigmoid().item()
    return sample
