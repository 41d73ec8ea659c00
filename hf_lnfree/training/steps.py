"""What one optimiser step was made of, for those who look at steps."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class StepRecord:
    """
    Filled by `LNFreeTrainer` while it computes a step, read by callbacks before the step is taken.

    Args:
        batches: inputs and loss of every forward pass on this process; the losses, scalars on its device, add up to
            that of the step.
        grad_norm: of all parameters, before clipping.
        learning_rate: with which the step is taken.
    """

    batches: list[tuple[dict[str, Any], Tensor]] = field(default_factory=list)
    grad_norm: float = 0.0
    learning_rate: float = 0.0

    def begin(self) -> None:
        self.batches.clear()

    @property
    def inputs(self) -> Sequence[dict[str, Any]]:
        return [inputs for inputs, _ in self.batches]

    @property
    def losses(self) -> Tensor:
        """[P], the loss of each of P forward passes."""
        return torch.stack([loss for _, loss in self.batches])

    @property
    def loss(self) -> Tensor:
        return self.losses.sum()
