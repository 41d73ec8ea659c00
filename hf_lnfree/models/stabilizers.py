r"""What keeps a residual stream and its attention in bounds without a norm: gains, scales, temperatures.

Shapes: B batch, T tokens, D width, H heads, d width of a head.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .hooks import OutputHook

LEARNED_GAINS = ("rezero", "skipinit")


class ResidualGain(OutputHook, nn.Dropout):
    r"""
    $x + a\,F(x)$: the dropout at the end of a residual branch, times a gain $a$; on the output of the branch's last
    projection where a block has no module for the dropout.

    - "rezero" (arXiv 2003.04887): one learned gain a layer for all its branches, from 0 on.
    - "skipinit" (arXiv 2002.10444): one learned gain a branch, from 0 on.
    - "fixed": $1/\sqrt{2L}$ for L layers, not learned.

    Args:
        p: of the dropout that stood there.
        kind: one of these.
        layers: L.
        shared: the branch of the same layer whose gain this one has ("rezero").
    """

    def __init__(self, p: float, kind: str, layers: int, shared: "ResidualGain | None" = None):
        super().__init__(p)
        self.kind, self.layers = kind, layers
        self.owner = (shared,)  # in a tuple: no child, so its gain is saved once
        if kind in LEARNED_GAINS and shared is None:
            self.gain = nn.Parameter(torch.zeros(1))

    def reset_parameters(self) -> None:
        if "gain" in self._parameters:
            nn.init.zeros_(self.gain)

    @property
    def value(self) -> Tensor | float:
        """The gain $a$: a learned number [1], or the constant."""
        owner = self.owner[0] or self
        return owner.gain if self.kind in LEARNED_GAINS else 1 / math.sqrt(2 * self.layers)

    def forward(self, x: Tensor) -> Tensor:  # B T D
        return self.value * super().forward(x)

    def change(self, projection: nn.Module, args: Any, output: Tensor) -> Tensor:  # B T D
        return self.value * output

    def extra_repr(self) -> str:
        return f"p={self.p}, {self.kind}"


def gain_path(branch: str) -> str:
    """Where a block keeps the gain of a branch that has no dropout module."""
    return f"{branch}_gain"


class EmbeddingScale(nn.Dropout):
    r"""
    $a\,(e_1 + e_2 + \dots)$: the sum of the embeddings times a learned scalar $a$, in the place of the dropout behind
    it. It starts at $\sqrt D$, with which language models with DyT are trained (arXiv 2503.10622).

    Args:
        p: of the dropout that stood there.
        width: D.
    """

    def __init__(self, p: float, width: int):
        super().__init__(p)
        self.width = width
        self.scale = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.scale, math.sqrt(self.width))

    def forward(self, x: Tensor) -> Tensor:  # B T D
        return self.scale * super().forward(x)

    def extra_repr(self) -> str:
        return f"p={self.p}, scale={'meta' if self.scale.is_meta else format(self.scale.item(), '.4g')}"


class ScaledMLP(nn.Module):
    r"""
    $W_2\,\beta f(\alpha W_1 x)$ with two learned scalars a layer, from 1 on; in the place of the activation $f$,
    so the bias of $W_2$ is not scaled (after the learned FFN scales of arXiv 2410.13060).
    """

    def __init__(self, activation: nn.Module):
        super().__init__()
        self.activation = activation
        self.scales = nn.Parameter(torch.ones(2))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scales)

    def forward(self, x: Tensor) -> Tensor:  # B T 4D
        return self.scales[1] * self.activation(self.scales[0] * x)

    def extra_repr(self) -> str:
        return "scales=meta" if self.scales.is_meta else f"scales={[round(s, 4) for s in self.scales.tolist()]}"


class HeadControl(OutputHook, nn.Module):
    r"""
    $q_h \leftarrow \tau_h\,q_h / \mathrm{rms}(q_h)$: query-key norm (arXiv 2010.04245, 2302.05442; without gains, so
    that rotary embeddings commute with it) and a learned temperature a head.

    Sits on the output of the projection of queries, or of keys, or on what the stock attention has behind it; before
    rotary embeddings and the cache.

    Args:
        heads: H, of queries or of keys.
        norm: whether they are divided by their root mean squares.
        temperature: whether $\tau$ is learned, from 1 on; it is 1 otherwise.
        split: whether heads have a dimension of their own there already.
        eps: added to the mean squares.
    """

    def __init__(self, heads: int, norm: bool, temperature: bool, split: bool = False, eps: float = 1e-6):
        super().__init__()
        self.heads, self.norm, self.split, self.eps = heads, norm, split, eps
        self.temperature = nn.Parameter(torch.ones(heads)) if temperature else None

    def reset_parameters(self) -> None:
        if self.temperature is not None:
            nn.init.ones_(self.temperature)

    def change(self, projection: nn.Module, args: Any, output: Tensor) -> Tensor:  # B T Hd, or B T H d
        heads = output if self.split else output.unflatten(-1, (self.heads, -1))
        if self.norm:
            heads = self.normed(heads)
        if self.temperature is not None:
            heads = heads * self.temperature[:, None].to(heads.dtype)
        return heads.view_as(output)

    def normed(self, part: Tensor) -> Tensor:
        wide = part.float() if part.dtype in (torch.float16, torch.bfloat16) else part
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(part.dtype)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, norm={self.norm}, temperature={self.temperature is not None}"


class QueryKeyControl(HeadControl):
    r"""
    The same for queries and keys, $k_h \leftarrow k_h / \mathrm{rms}(k_h)$, in the output of one fused projection.

    Args:
        groups: how many times (q, k, v) stands in the output: once, or once a head.
    """

    def __init__(self, heads: int, groups: int, norm: bool, temperature: bool):
        super().__init__(heads, norm, temperature)
        self.groups = groups

    def change(self, projection: nn.Module, args: Any, output: Tensor) -> Tensor:  # B T 3D
        shape = (self.groups, 3, self.heads // self.groups, -1)
        query, key, value = output.unflatten(-1, shape).unbind(-3)  # B T groups H/groups d
        if self.norm:
            query, key = (self.normed(part) for part in (query, key))
        if self.temperature is not None:
            query = query * self.temperature.view(self.groups, -1, 1).to(query.dtype)
        return torch.stack((query, key, value), dim=-3).flatten(-4)
