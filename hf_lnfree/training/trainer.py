"""`LNFreeTrainer`: the HF Trainer with slopes out of weight decay, a flight recorder, and whole checkpoints."""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import DistributedType
from torch import Tensor, nn
from transformers import ProgressCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput

from ..analysis.analyzer import Batch
from ..analysis.likelihood import perplexity
from ..data.collators import IGNORED
from ..data.objectives import CAUSAL, Objective
from ..errors import RunError
from ..models import named_slopes
from .arguments import LNFreeTrainingArguments
from .checkpoints import PARTIAL, WholeCheckpoints
from .divergence import DivergenceGuard
from .lock import only_run
from .log import JsonlLog
from .progress import Forecast, ReadableProgress
from .recorder import FlightRecorder
from .restoring import keep_dtypes
from .results import RESULTS
from .shards import asks_for_shards, in_full_precision, require_deepspeed, require_shards, shard_on_cpu
from .steps import StepRecord
from .weight_decay import DecayMatrices


class LNFreeTrainer(DecayMatrices, WholeCheckpoints):
    """
    [`Trainer`] for the models of this package.

    - Matrices alone get weight decay; learnable slopes too where `args.slope_weight_decay` is set.
    - Every `args.probe_steps` steps a sample of each layer is logged (`FlightRecorder`).
    - A loss or gradient that is not finite is diagnosed and stops the run, or what `args.on_nonfinite` says
      (`DivergenceGuard`).
    - `eval_perplexity`, of images `eval_accuracy`, stands beside `eval_loss`; each log entry is a line of `log.jsonl`.
    - What is in `penalties` is added to the training loss.
    - A checkpoint appears whole or not at all (`WholeCheckpoints`).

    Args:
        probe: held-out batches that the recorder looks at; None to record steps only.
        objective: what is predicted, which decides how held-out examples are judged.

    Raises:
        RunInUse, RunError: `train`, as `only_run`.
        RunError: a global slope under FSDP; or FSDP is asked for where weights would not be sharded.
    """

    args: LNFreeTrainingArguments
    objective: Objective

    def __init__(self, *args: Any, probe: Sequence[Batch] | None = None, objective: Objective = CAUSAL, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.objective = objective
        one_slope = getattr(getattr(self.model, "config", None), "slope_scope", None) == "global"
        if self.is_fsdp_enabled and one_slope:
            raise RunError(
                "FSDP shards each block by itself, and slope_scope='global' is one parameter of all blocks. Use DDP "
                "(drop the fsdp settings), or slope_scope='layer'."
            )
        found = named_slopes(self.model).values() if one_slope and self.model is not None else ()
        slopes = {id(slope) for slope in found if slope.requires_grad}
        if len(slopes) > 1:
            raise RunError(
                f"slope_scope='global' is one slope, and the model has {len(slopes)} to train: modules_to_save copies "
                "each activation. Use slope_scope='layer', or leave the slope out of modules_to_save."
            )
        self.penalties: list[Callable[[], Tensor]] = []
        self.step_record = StepRecord()
        self.recorder = FlightRecorder(
            probe or [],
            model=lambda: self.unwrapped,
            step=self.step_record,
            log=self.log_aside,
            every=self.args.probe_steps,
            geometry=self.args.probe_geometry,
            kept=self.args.recorder_samples,
            folder=self.run_folder if self.is_world_process_zero() else None,
        )
        self.guard = DivergenceGuard(
            self.recorder,
            loss=self.bare_loss,
            folder=self.run_folder,
            save=lambda: self._save_checkpoint(self.model_wrapped, self.trial),
            spoilt=self.first_spoilt,
            drop_gradients=lambda: self.model_wrapped.zero_grad(set_to_none=True),
            scaler=lambda: self.accelerator.scaler,
            skipped=lambda: self.accelerator.optimizer_step_was_skipped,
            gather=lambda losses: self.accelerator.gather(losses),
        )
        self.add_callback(self.recorder)
        self.add_callback(self.guard)
        # First of all: the file is begun anew before another callback logs at the start of training.
        self.jsonl = JsonlLog(self.run_folder)
        self.callback_handler.callbacks.insert(0, self.jsonl)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ReadableProgress())
        self.add_callback(Forecast())

    def create_accelerator_and_postprocess(self) -> None:
        """As the host, which trains with DDP on the CPU, without a word, where FSDP is asked for: here it shards."""
        super().create_accelerator_and_postprocess()
        require_deepspeed(self.accelerator)
        if asks_for_shards(self.args):
            if not self.is_fsdp_enabled and self.accelerator.distributed_type == DistributedType.MULTI_CPU:
                shard_on_cpu(self.accelerator, self.args)
                self.is_fsdp_enabled = True
            require_shards(self.accelerator)
            plugin = self.accelerator.state.fsdp_plugin
            plugin.mixed_precision_policy = in_full_precision(plugin.mixed_precision_policy)
            # Compiled as a whole the model would be a part of the sharded one, and could not be looked at by itself.
            self.accelerator.state.dynamo_plugin.use_regional_compilation = True

    @property
    def trial(self) -> Any:
        """Of a hyperparameter search, which has a folder for each; None otherwise."""
        return getattr(self, "_trial", None)

    def run_folder(self) -> Path:
        """Where log, flight recorder and checkpoints are kept."""
        return Path(self._run_dir(self.trial))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """
        The host's loss. In training `label_smoothing_factor` smooths it and `penalties` are added, each a mean over the
        forward pass; in evaluation it is plain, since perplexity is its exponential.
        """
        smoother, self.label_smoother = self.label_smoother, self.label_smoother if model.training else None
        try:
            computed: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self.label_smoother = smoother
        if not self.penalties or not model.training:
            return computed
        loss, *outputs = computed if return_outputs else (computed,)
        # A loss over the items of the whole step is summed over its batches, any other averaged by the host.
        batches = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
        loss = loss + torch.stack([penalty() for penalty in self.penalties]).sum() / batches
        return (loss, *outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        inputs = self._prepare_inputs(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.step_record.batches.append((inputs, loss))
        return loss

    def bare_loss(self, inputs: Mapping[str, Any]) -> Tensor:
        """The loss of a batch with nothing around the model, so that hooks see its modules."""
        with self.compute_loss_context_manager(), torch.compiler.set_stance("force_eager"):
            return self.unwrapped(**inputs).loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self.step_record.grad_norm = 0.0 if norm is None else float(norm)
        self.step_record.learning_rate = self._get_learning_rate()
        return norm

    def train(self, *args: Any, **kwargs: Any):
        with only_run(self.args):
            if self.args.process_index == 0:
                shutil.rmtree(Path(self.args.output_dir) / PARTIAL, ignore_errors=True)  # of a process that was killed
            return self._train(*args, **kwargs)

    def restore(self, checkpoint: str) -> None:
        """Weights and log of a checkpoint at which nothing is left to train: `train` would take one step more."""
        self.state = self.load_state(Path(checkpoint))
        self.state.init_training_references(self, self.state.max_steps, self.state.num_train_epochs, None)
        self.guard.recall(self.state.global_step)
        self.jsonl.begin(self.state)

    def load_state(self, checkpoint: Path) -> TrainerState:
        """Put the weights of a checkpoint into the model; returns its `trainer_state.json`."""
        self._load_from_checkpoint(str(checkpoint))
        return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))

    def _train(self, *args: Any, **kwargs: Any):
        try:
            return super().train(*args, **kwargs)
        except BaseException as error:
            self.recorder.write(f"{type(error).__name__}: {error}", self.guard.events)
            raise

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        model = self.model if model is None else model
        slopes = {} if model is None else {id(p): p for p in named_slopes(model).values() if p.requires_grad}
        if fresh and self.args.slope_weight_decay and slopes:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in slopes]
            optimizer.add_param_group({"params": [*slopes.values()], "weight_decay": self.args.slope_weight_decay})
        if fresh:
            keep_dtypes(optimizer)
        return optimizer

    def evaluation_loop(
        self, dataloader: Any, description: str, prediction_loss_only: bool | None = None, *args: Any, **kwargs: Any
    ) -> EvalLoopOutput:
        """
        Exact with several processes, where the host also counts the examples that fill up the last batch, and where
        examples have different numbers of labels, which the host counts alike. Images are judged by accuracy as well.
        """
        alone = self.args.world_size == 1 and self.objective is CAUSAL
        if alone or not (prediction_loss_only or self.compute_metrics is None):
            return super().evaluation_loop(dataloader, description, prediction_loss_only, *args, **kwargs)
        assert self.model is not None
        model = self._wrap_model(self.model, training=False, dataloader=dataloader)
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        sums = []
        for inputs in dataloader:
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad(), self.compute_loss_context_manager():
                sums.append(self.accelerator.gather_for_metrics(self.judged(model, inputs)))
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        loss, right, count = torch.cat(sums).double().sum(0).tolist()
        prefix = kwargs.get("metric_key_prefix", "eval")
        metrics = {f"{prefix}_loss": loss / count}
        if self.objective.metric == "accuracy":
            metrics[f"{prefix}_accuracy"] = right / count
        return EvalLoopOutput(predictions=np.empty(0), label_ids=None, metrics=metrics, num_samples=sum(map(len, sums)))

    def judged(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """[B, 3]: of each example the sum of cross entropies, how many labels are the likeliest, and how many are."""
        labels = inputs.pop("labels")
        options = {"use_cache": False} if self.objective.example != "image" else {}
        logits = model(**inputs, **options).logits.float()  # B (T) V
        if self.objective is CAUSAL:
            logits, labels = logits[:, :-1], labels[:, 1:]
        logits, labels = logits.reshape(len(labels), -1, logits.shape[-1]), labels.reshape(len(labels), -1)
        losses = F.cross_entropy(logits.mT, labels, reduction="none")
        right = logits.argmax(-1) == labels
        return torch.stack((losses.sum(-1), right.sum(-1), (labels != IGNORED).sum(-1)), dim=-1)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The host's draft; the card of a finished run stays as it is."""
        folder = Path(self.args.output_dir)
        if not ((folder / RESULTS).is_file() and (folder / "README.md").is_file()):
            super().create_model_card(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "eval_loss" in logs and self.objective.metric == "perplexity":
            logs["eval_perplexity"] = perplexity(logs["eval_loss"])
        if not math.isfinite(logs.get("loss", 0.0)):
            self._tr_loss.zero_()  # the host takes it from itself, and NaN - NaN would stay for the rest of the run
        super().log(logs, start_time)

    def log_aside(self, logs: dict[str, float], besides: Mapping[str, Any] | None = None) -> None:
        """
        Log in the middle of a step, where the host's own entry may still be due: logging clears `should_log`.

        Args:
            besides: what the log of the run holds with them, and trackers are not given; see `JsonlLog`.
        """
        should_log = self.control.should_log
        self.jsonl.besides.update(besides or {})
        self.log(logs)
        self.control.should_log = should_log
