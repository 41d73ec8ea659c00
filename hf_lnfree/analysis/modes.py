"""A model looked at without what it is wrapped in, in eval mode, where it computes, and left as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that `torch.compile` or DistributedDataParallel stands around."""
    while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        model = inner
    return model


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, the mode of every module as it was outside, also after an exception."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def execution_device(model: nn.Module) -> torch.device:
    """Where a model computes: where its parameters are, or where accelerate brings those that it offloaded."""
    for module in model.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(model.parameters()).device
