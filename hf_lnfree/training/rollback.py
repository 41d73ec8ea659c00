"""Weights and optimiser state of one moment, kept in the CPU's memory and put back."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..loading import all_finite


class GoodState:
    """This process's part of the weights, of the buffers that belong to them, and of the optimiser's state."""

    def __init__(self, model: nn.Module, optimizer: Optimizer):
        self.tensors = {name: tensor.to("cpu", copy=True) for name, tensor in state_tensors(model, optimizer)}

    @torch.no_grad()
    def restore(self, model: nn.Module, optimizer: Optimizer) -> None:
        for name, tensor in state_tensors(model, optimizer):
            known = self.tensors.get(name)
            tensor.zero_() if known is None else tensor.copy_(known)  # before the first step there were no moments


def state_tensors(model: nn.Module, optimizer: Any = None) -> Iterator[tuple[str, Tensor]]:
    """Weights, saved buffers and moments by name, each the part of it that this process holds."""
    for name, parameter in model.named_parameters():
        yield name, local(parameter.detach())
        for key, value in optimizer.state.get(parameter, {}).items() if optimizer is not None else ():
            if isinstance(value, Tensor):
                yield f"{key} of {name}", local(value)
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix=path, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, local(buffer)


def first_spoilt(model: nn.Module, optimizer: Any = None) -> str | None:
    """The first of these tensors that is not finite."""
    for name, tensor in state_tensors(model, optimizer):
        if tensor.is_floating_point() and not all_finite(tensor):
            return name
    return None


def scale_learning_rate(optimizer: Any, scheduler: Any, factor: float) -> None:
    """For good: now, and in all that the schedule still has to come."""
    scheduler = getattr(scheduler, "scheduler", scheduler)  # of accelerate's wrapper
    for group in optimizer.param_groups:
        group.update({key: factor * group[key] for key in ("lr", "initial_lr")})
    scheduler.base_lrs = [factor * rate for rate in scheduler.base_lrs]


def local(x: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds."""
    return x.to_local() if isinstance(x, DTensor) else x
