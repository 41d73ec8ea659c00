"""Batches as a model takes them, and their hash."""

from typing import Any

import torch
from torch import Tensor, nn

from .modes import execution_device

LABELS = {"labels", "start_positions", "end_positions", "return_loss"}


def model_call(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs where the model computes; without a cache where it has one."""
    device = execution_device(model)
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    return moved | ({"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {})


def hash_inputs(data: Any, inputs: dict[str, Any]) -> None:
    """Add the tensors of a batch to a hash, in the order of their names."""
    for key, value in sorted(inputs.items()):
        if isinstance(value, Tensor):
            data.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
            data.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
