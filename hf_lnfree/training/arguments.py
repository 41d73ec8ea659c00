"""The arguments of a training run: those of transformers, and those of this package."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from ..checks import require_at_least, require_choices
from ..errors import SettingsError
from .fields import ModelArguments, TrainingFields

__all__ = ["LNFreeTrainingArguments", "ModelArguments"]

UNCHECKED = {"azure_ml", "flyte"}  # transformers does not tell whether these are there


@dataclass
class LNFreeTrainingArguments(TrainingFields, TrainingArguments):  # type: ignore[misc]  # defaults of our own
    """
    [`TrainingArguments`] with the study's own; NaN losses are logged as NaN and not as 0.

    Raises:
        SettingsError: `report_to` names something that is not installed, or a field of this package has a value that
            is not allowed.
    """

    dataloader_pin_memory: bool = field(
        default=torch.accelerator.is_available(), metadata={"help": "Pin host memory; only with an accelerator."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choices(self)
        require_at_least(self, probe_steps=0, probe_sequences=1, recorder_samples=1, attention_report_windows=0)
        here = get_available_reporting_integrations()
        if missing := sorted(set(self.report_to or ()) - {*here, *UNCHECKED}):
            raise SettingsError(
                f"report_to={', '.join(missing)} is not installed or not known. Here: {', '.join(here) or 'none'}."
            )
