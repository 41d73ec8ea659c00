"""The arguments of a training run: those of transformers, and those of this package."""

from dataclasses import dataclass, field
from typing import Any, Self, get_type_hints

import torch
from accelerate.utils import GradientAccumulationPlugin
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_pt_utils import AcceleratorConfig

from ..checks import described, fits, require_fields
from ..errors import SettingsError
from ..redaction import without_secrets
from .fields import RANGES, ModelArguments, TrainingFields
from .host_fields import HOST_RANGES

__all__ = ["LNFreeTrainingArguments", "ModelArguments"]

UNCHECKED = {"azure_ml", "flyte"}  # transformers does not tell whether these are there


@dataclass
class LNFreeTrainingArguments(TrainingFields, TrainingArguments):  # type: ignore[misc]  # defaults of our own
    """
    [`TrainingArguments`] with the study's own; NaN losses are logged as NaN and not as 0.

    Raises:
        SettingsError: `report_to` names something that is not installed, or a field has a value that is not allowed.
    """

    dataloader_pin_memory: bool = field(
        default_factory=torch.accelerator.is_available,
        metadata={"help": "Pin host memory; only with an accelerator."},
    )

    def __post_init__(self) -> None:
        require_fields(self, HOST_RANGES | RANGES)
        if self.max_steps == 0:
            raise SettingsError("max_steps must be at least 1, or -1 for num_train_epochs, got 0.")
        if isinstance(self.accelerator_config, dict):
            try:
                config = AcceleratorConfig(**self.accelerator_config)
                GradientAccumulationPlugin(**{"num_steps": 1, **(config.gradient_accumulation_kwargs or {})})
                for name, hint in get_type_hints(AcceleratorConfig).items():
                    if not fits(getattr(config, name), hint):
                        raise ValueError(f"{name} must be {described(hint)}.")
            except (TypeError, ValueError) as error:
                raise SettingsError(f"accelerator_config={self.accelerator_config!r}: {error}") from error
        super().__post_init__()
        here = get_available_reporting_integrations()
        if missing := sorted(set(self.report_to or ()) - {*here, *UNCHECKED}):
            raise SettingsError(
                f"report_to={', '.join(missing)} is not installed or not known. Here: {', '.join(here) or 'none'}."
            )

    def __getstate__(self) -> dict[str, Any]:
        """What Trainer pickles as training_args.bin, and pushes: without secrets."""
        texts = {name: without_secrets(value) for name, value in vars(self).items() if isinstance(value, str)}
        return {**vars(self), **texts, "hub_token": None}

    def __copy__(self) -> Self:
        """With the token, which a pickle lacks."""
        new = object.__new__(type(self))
        vars(new).update(vars(self))
        return new
