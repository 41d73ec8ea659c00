r"""Matrices whose size is bound, for blocks that no norm keeps in check: the weight is computed from what is trained.

A projection keeps its keys and shapes: only its class is exchanged for one whose `weight` is a property. So stock
checkpoints load, and adapters see the weight that counts.

Shapes: weight [O, I] of `nn.Linear`, [I, O] of transformers' `Conv1D`.
"""

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.pytorch_utils import Conv1D

from .biases import FROZEN_BIAS, QUERY_KEY_BIAS
from .errors import ConfigurationError
from .sites import Projection

EPS = 1e-12


class Computed(Tensor):
    """A weight that is computed anew at every use: writing into it would be lost, so it is an error."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch documents it

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise ConfigurationError(
            "This weight is computed (weight_norm), so an adapter cannot be merged into it. Fold first "
            "(hf_lnfree.conversion.fold, or `hf-lnfree convert --to folded`), and adapt what comes out."
        )


# At run time the base of a mixin is the class that it stands before.
if TYPE_CHECKING:
    Base = nn.Module
else:
    Base = object


class NormedWeight(Base):
    """Mixin before a projection; `plain` is the class that it had."""

    plain: type[nn.Module]

    @property
    def trained(self) -> Tensor:
        """What the optimiser moves and a checkpoint holds."""
        weight = self._parameters["weight"]
        assert weight is not None
        return weight

    @property
    def weight(self) -> Tensor:
        if self.trained.is_meta:  # a checkpoint is being loaded: what else the norm needs may be there already
            return self.trained
        weight = self.normed(self.trained)
        return weight if torch.compiler.is_compiling() else weight.as_subclass(Computed)

    @property
    def rows(self) -> int:
        """Which dimension of the weight counts the outputs."""
        return 1 if issubclass(self.plain, Conv1D) else 0

    def normed(self, trained: Tensor) -> Tensor:
        """The weight that counts, from what is trained."""
        raise NotImplementedError

    def reset_norm(self) -> None:
        """Begin the norm's own parameters and buffers anew, from what is trained."""
        raise NotImplementedError


class WeightNorm(NormedWeight):
    r"""
    $W_o = g_o\, V_o / \lVert V_o \rVert$ for every output $o$ (arXiv 1602.07868); $g$ starts as the sizes that $V$ has.

    Parameters: weight is $V$; weight_scale [O] is $g$.
    """

    weight_scale: nn.Parameter

    def begin(self) -> None:
        size = self.trained.shape[self.rows]
        self.weight_scale = nn.Parameter(self.trained.new_empty(size))
        self.reset_norm()

    def sizes(self, trained: Tensor) -> Tensor:
        return torch.linalg.vector_norm(trained, dim=1 - self.rows).clamp_min(EPS)

    @torch.no_grad()
    def reset_norm(self) -> None:
        init.copy_(self.weight_scale, self.sizes(self.trained))

    def normed(self, trained: Tensor) -> Tensor:
        return trained * (self.weight_scale / self.sizes(trained)).unsqueeze(1 - self.rows)


class SpectralNorm(NormedWeight):
    r"""
    $W = V / \sigma(V)$ with the largest singular value $\sigma$ (arXiv 1802.05957): exact, except in the forward passes
    of training, each of which takes one step of power iteration. What a gradient checkpoint computes again is no step.

    Parameters: weight is $V$. Buffers: weight_u [O], the left singular vector; not saved, weight_v [I], the right one.
    """

    weight_u: Tensor
    weight_v: Tensor

    def begin(self) -> None:
        self.register_buffer("weight_u", self.trained.new_empty(self.trained.shape[self.rows]))
        self.register_buffer("weight_v", self.trained.new_empty(self.trained.shape[1 - self.rows]), persistent=False)
        self.exact: tuple[Any, Tensor] | None = None
        self.estimated = False  # while a forward pass of training reads the weight
        self.reset_norm()

    @torch.no_grad()
    def reset_norm(self) -> None:
        size = self.weight_u.numel()
        # Not parallel to any vector that a structured matrix is likely to have, and without random numbers.
        start = torch.sin(torch.arange(1, size + 1, dtype=torch.float64) * 1.618).float()
        init.copy_(self.weight_u, (start / start.norm()).to(self.weight_u.dtype))
        init.zeros_(self.weight_v)

    def matrix(self, trained: Tensor) -> Tensor:
        """[O, I]."""
        return trained.T if self.rows else trained

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self.training:
            return super().forward(*args, **kwargs)
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            self.step(self.matrix(self.trained))
        self.estimated = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.estimated = False

    def normed(self, trained: Tensor) -> Tensor:
        matrix = self.matrix(trained)
        if not self.estimated:
            return trained / self.exact_sigma(matrix)
        # Copies: the next step changes the buffers, and a backward pass still needs these.
        return trained / torch.dot(self.weight_u.clone(), matrix @ self.weight_v.clone())

    @torch.no_grad()
    def step(self, matrix: Tensor) -> None:
        """Move both singular vectors by one step of power iteration."""
        self.weight_v.copy_(nn.functional.normalize(matrix.T @ self.weight_u, dim=0, eps=EPS))
        self.weight_u.copy_(nn.functional.normalize(matrix @ self.weight_v, dim=0, eps=EPS))

    def exact_sigma(self, matrix: Tensor) -> Tensor:
        """Kept until the weight changes."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return torch.linalg.matrix_norm(matrix.float(), 2).to(matrix.dtype)
        version = (matrix.data_ptr(), matrix._version, matrix.dtype)
        if self.exact is None or self.exact[0] != version:
            self.exact = (version, torch.linalg.matrix_norm(matrix.float(), 2).to(matrix.dtype))
        return self.exact[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "exact": None}


def _subclasses(mixin: type) -> dict[type, type]:
    """Stock class, or one with frozen biases -> the same with a normed weight; by name in this module, for pickle."""
    made = {}
    for plain in (nn.Linear, Conv1D, *FROZEN_BIAS.values(), *QUERY_KEY_BIAS.values()):
        name = f"{mixin.__name__}{plain.__name__}"
        made[plain] = type(name, (mixin, plain), {"__module__": __name__, "plain": plain})
        globals()[name] = made[plain]
    return made


WEIGHT_NORMS = {"weight": _subclasses(WeightNorm), "spectral": _subclasses(SpectralNorm)}


def can_be_normed(projection: nn.Module) -> bool:
    """Whether there is a class with a normed weight for it."""
    return type(projection) in WEIGHT_NORMS["weight"]


def norm_weight(projection: Projection, kind: str) -> None:
    """Exchange the class of a projection for that with a normed weight, in place."""
    projection.__class__ = WEIGHT_NORMS[kind][type(projection)]
    cast(WeightNorm | SpectralNorm, projection).begin()


@torch.no_grad()
def plain_weight(projection: NormedWeight) -> None:
    """Write the normed weight in the place of what was trained, and give the projection its class back; in place."""
    weight = projection.normed(projection.trained).detach().clone()
    for name in ("weight_scale", "weight_u", "weight_v"):
        if hasattr(projection, name):
            delattr(projection, name)
    plain = cast(nn.Module, projection)
    plain.__class__ = projection.plain
    plain.register_parameter("weight", nn.Parameter(weight))
