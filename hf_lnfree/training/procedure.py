"""What a run does to its model besides training it: before the first step, at the steps, and after the last."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerState

from ..errors import ModelError


class AttachedTrainer(Protocol):
    """
    What a procedure may use of the trainer that it is attached to.

    Args:
        args: its `TrainingArguments`.
        penalties: each is called after a forward pass in training, and what it returns is added to the loss.
        train_dataset, eval_dataset: the examples.
        data_collator: makes batches of them.
        is_fsdp_enabled: whether weights are sharded.
        unwrapped: the model without what distributes or compiles it.
    """

    args: Any
    penalties: list[Callable[[], Tensor]]
    train_dataset: Any
    eval_dataset: Any
    data_collator: Any
    is_fsdp_enabled: bool

    @property
    def unwrapped(self) -> Any: ...

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None: ...

    def log_aside(self, logs: dict[str, float]) -> None:
        """Log in the middle of a step."""


class Procedure:
    """
    Plain training of all weights, or of LoRA adapters that are merged at the end.

    Args:
        lora_rank: rank of the adapters at every projection of the blocks, and of a classifier; None to train all
            weights.
        lora_alpha: their scale; twice the rank by default.
    """

    def __init__(self, lora_rank: int | None = None, lora_alpha: int | None = None):
        self.lora_rank, self.lora_alpha = lora_rank, lora_alpha

    def settings(self) -> dict[str, Any]:
        """What it was told: a run that was begun with something else is not gone on with."""
        return {"procedure": type(self).__name__, "lora_rank": self.lora_rank, "lora_alpha": self.lora_alpha}

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model to build the trainer around."""
        return model

    def adapt(self, model: PreTrainedModel) -> PreTrainedModel | PeftModel:
        """The prepared model with adapters, if any."""
        if self.lora_rank is None:
            return model
        alpha = self.lora_alpha or 2 * self.lora_rank
        # PEFT's classes for tasks ask for a model that generates.
        task = "CAUSAL_LM" if model.can_generate() and not model.config.is_encoder_decoder else None
        config = LoraConfig(r=self.lora_rank, lora_alpha=alpha, target_modules="all-linear", task_type=task)
        return get_peft_model(model, config)

    def attach(self, trainer: AttachedTrainer, steps: int) -> None:
        """
        Add callbacks and penalties to the trainer, before it trains that many steps.

        Raises:
            ModelError: weights are sharded, and whole ones are needed.
        """
        if trainer.is_fsdp_enabled and self.lora_rank is not None:
            raise ModelError("Adapters are merged into whole weights: use DDP (drop the FSDP settings), or no LoRA.")

    def while_training(self) -> AbstractContextManager[None]:
        """What is entered before the first step and left after the last, or when training raises."""
        return nullcontext()

    def resume(self, state: TrainerState) -> None:
        """The state of a checkpoint at which nothing is left to train."""

    def finish(self, model: PreTrainedModel | PeftModel) -> PreTrainedModel:
        """The model that is evaluated and saved, from the one that was trained."""
        return model.merge_and_unload() if isinstance(model, PeftModel) else model

    def report(self) -> dict[str, Any]:
        """What is added to results.json: values of its fields (`RunResults`), or keys of your own."""
        return {} if self.lora_rank is None else {"lora_rank": self.lora_rank}
