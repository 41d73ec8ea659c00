"""`linear_bias="query_key"`: of a block's biases only those of query and key are trained, as in the paper's code.

The others stay parameters, so checkpoints and parameter counts are those of the stock model, but they never move.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .sites import Projection

# At run time the base of a mixin is the class that it stands before.
if TYPE_CHECKING:
    Base = nn.Linear
else:
    Base = object


class FrozenBias(Base):
    """A projection whose bias is never trained, also after loading, which assigns fresh parameters."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "bias" and param is not None:
            param.requires_grad_(False)
        super().register_parameter(name, param)


class QueryKeyBias(Base):
    """A fused projection that trains the bias of query and key; that of value is held constant."""

    value_size: int

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.T if isinstance(self, Conv1D) else self.weight
        query_key, value = self.bias.unflatten(0, (-1, 3, self.value_size)).split((2, 1), dim=1)
        return F.linear(x, weight, torch.cat((query_key, value.detach()), dim=1).flatten())

    @property
    def num_frozen(self) -> int:
        return self.bias.numel() // 3


class FrozenBiasLinear(FrozenBias, nn.Linear):
    """A Linear whose bias is never trained."""


class FrozenBiasConv1D(FrozenBias, Conv1D):  # type: ignore[misc]  # the mixin is no Linear at run time
    """A Conv1D whose bias is never trained."""


class QueryKeyBiasLinear(QueryKeyBias, nn.Linear):
    """A fused Linear that trains the bias of query and key."""


class QueryKeyBiasConv1D(QueryKeyBias, Conv1D):  # type: ignore[misc]  # the same
    """A fused Conv1D that trains the bias of query and key."""


# Stock class -> the subclass that takes its place.
FROZEN_BIAS = {nn.Linear: FrozenBiasLinear, Conv1D: FrozenBiasConv1D}
QUERY_KEY_BIAS = {nn.Linear: QueryKeyBiasLinear, Conv1D: QueryKeyBiasConv1D}


def freeze_bias(projections: Iterable[Projection]) -> None:
    """Freeze whole biases, in place. The class of a module is exchanged and not the module: weights and hooks stay."""
    for projection in projections:
        if projection.bias is not None:
            projection.__class__ = FROZEN_BIAS[type(projection)]
            projection.bias.requires_grad_(False)


def train_query_key_bias_only(fused: Projection, value_size: int) -> None:
    """
    Freeze the bias of value in a fused projection, in place, by its class as well.

    Args:
        fused: the projection to query, key and value; its bias is laid out as [groups, (q, k, v), `value_size`].
        value_size: entries of value in one group: all of them, or those of one head.
    """
    fused.__class__ = QUERY_KEY_BIAS[type(fused)]
    cast(QueryKeyBias, fused).value_size = value_size
