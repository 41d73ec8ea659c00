r"""A LayerNorm or RMSNorm on its way to a fixed scale, and what it must know of the model around it.

Shapes: B batch, T tokens, D width.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .hooks import OutputHook

FIRST, OTHERS = 0, 1  # entries of sigma
MAIN, VALUE = 0, 1  # entries of gate
MOMENTUM = 0.1  # of the running average, once it rests on 1 / MOMENTUM batches


class FirstPosition:
    """
    Which of the tokens that a stack is given are the first of their sequence, and which are no padding; one for all its
    norms.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None  # B or 1, T, 1
        self.there: Tensor | None = None  # B T 1; None where all are there

    def locate(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """
        A forward pre-hook: padding on the left and tokens that stand in a cache already are counted, and every
        sequence that `position_ids` begin anew in a row has a first token of its own.
        """
        self.there = None
        tokens = args[0] if args else kwargs.get("input_ids")
        images = tokens is None and kwargs.get("inputs_embeds") is None
        if images or (tokens is not None and tokens.dim() == 4):  # each is one sequence, which the class token begins
            self.mask = None
            return
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        length = tokens.shape[1]
        padding, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        begins = None if positions is None else positions == 0
        if padding is not None and padding.dim() == 2:
            there = padding != 0
            first = (there & (there.cumsum(-1) == 1))[:, -length:]
            first = first if begins is None else first | (begins & there[:, -length:])
            self.mask, self.there = first[..., None], there[:, -length:, None]
        elif begins is not None:
            self.mask = begins[..., None]
        else:
            cache = kwargs.get("cache", kwargs.get("past_key_values"))
            before = 0 if cache is None else cache.get_seq_length()
            self.mask = (torch.arange(length, device=tokens.device) + before == 0)[None, :, None]


def fitting(mask: Tensor | None, live: Tensor) -> Tensor | None:
    """A mask of the tokens that a norm is given; None if there is none, or it is of others: the norm is used alone."""
    if mask is not None and live.dim() == 2:  # OPT gives its MLPs the tokens of all sequences as one list
        return mask.expand(len(live) // mask.shape[1], -1, -1).flatten(0, 1)
    return None if mask is None or mask.shape[1] != live.shape[1] else mask


# At run time the base of the mixin is the norm that it stands before.
if TYPE_CHECKING:
    Base = nn.LayerNorm
else:
    Base = object


class RemovalNorm(OutputHook, Base):
    r"""
    $y = g \odot c(x) / s + b$ with $s = (1 - \gamma)\,\sigma(x) + \gamma\,\sigma_0$: a norm at gate $\gamma = 0$,
    linear at $\gamma = 1$ (arXiv 2409.13710, 2507.02559). [`RemovalLayerNorm`] and [`RemovalRMSNorm`] say what $c$ is.

    $\sigma(x) = \sqrt{\mathrm{mean}(c(x)^2) + \epsilon}$ is that of a token, $\sigma_0$ a running average of it over
    the data; the first position has one of its own, since its residual stream is many times larger. Of an image the
    first position is the class token.

    Buffers:
        sigma: [2], $\sigma_0$ at the first position and at all others.
        gate: [2], $\gamma$ of the output, and of the output that values are made of where the norm feeds attention.
        first_gate: [], how much of its own $\sigma_0$ the first position has given up for that of the others; at 1 the
            whole norm is one linear map.
        batches: [], how many batches the average has seen; it moves only while `observing` is set.
    """

    sigma: Tensor
    gate: Tensor
    first_gate: Tensor
    batches: Tensor

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for name, value in self.fresh_state().items():
            self.register_buffer(name, value)
        self.first = FirstPosition()
        self.observing = False
        self.deviation: Tensor | None = None
        self.groups = 1
        self.value_input: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For a copy: what a forward pass left behind belongs to its graph."""
        return {**self.__dict__, "value_input": None, "deviation": None}

    @staticmethod
    def fresh_state() -> dict[str, Tensor]:
        zero = torch.zeros(())
        return {"sigma": torch.ones(2), "gate": torch.zeros(2), "first_gate": zero, "batches": zero.clone()}

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for name, value in self.fresh_state().items():
            if name in self._buffers:  # not yet, when nn.LayerNorm calls this
                init.copy_(getattr(self, name), value)

    @property
    def finished(self) -> bool:
        """Whether the norm is one linear map of its input."""
        return bool((self.gate == 1).all() and self.first_gate == 1)

    def forward(self, x: Tensor) -> Tensor:  # B T D
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        centred = self.centred(wide)
        live = (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()  # B T 1
        first = self.first_tokens(live)
        if self.observing:
            self.observe(live.detach(), first)
        others = self.sigma[OTHERS].to(live.dtype)
        fixed = others.lerp(self.sigma[FIRST].to(live.dtype), (1 - self.first_gate.to(live.dtype)) * first)
        self.deviation = (live / fixed - 1).where(~first, 0.0) if self.observing else None

        bias = getattr(self, "bias", None)

        def normed(gate: Tensor) -> Tensor:
            scaled = centred / live.lerp(fixed, gate.to(live.dtype)) * self.weight
            return (scaled if bias is None else scaled + bias).to(x.dtype)

        split = self.path is not None and bool(self.gate[MAIN] != self.gate[VALUE])
        self.value_input = normed(self.gate[VALUE]) if split else None
        return normed(self.gate[MAIN])

    def centred(self, x: Tensor) -> Tensor:
        """What is divided."""
        raise NotImplementedError

    def first_tokens(self, live: Tensor) -> Tensor:
        mask = fitting(self.first.mask, live)
        return (torch.arange(live.shape[1], device=live.device) == 0)[:, None] if mask is None else mask

    @torch.no_grad()
    def observe(self, live: Tensor, first: Tensor) -> None:
        """Move the running averages by one batch without its padding, until the norm begins to be removed."""
        if self.gate.any():
            return
        there = fitting(self.first.there, live)
        first = first.expand_as(live)
        rate = (1 / (self.batches + 1)).clamp(min=MOMENTUM)
        for entry, here in ((FIRST, first), (OTHERS, ~first)):
            here = here if there is None else here & there
            mean = live.where(here, 0.0).sum() / here.sum()
            self.sigma[entry] += torch.where(mean.isnan(), 0.0, rate * (mean - self.sigma[entry]))
        self.batches += 1

    def read_by(self, block: nn.Module, projection: str, groups: int) -> None:
        """The norm feeds this projection of a block, whose rows are [`groups`, (q, k, v)], or v alone with 0 groups."""
        self.groups = groups
        self.attach(block, projection)

    def change(self, projection: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Values are made of an input of their own while query and key are ahead of them on the schedule."""
        if self.value_input is None:
            return None
        if self.groups == 0:
            return projection.forward(self.value_input)
        shape = (-1, (self.groups, 3, output.shape[-1] // (3 * self.groups)))
        query_key, _ = output.unflatten(*shape).split((2, 1), dim=-2)
        value = projection.forward(self.value_input).unflatten(*shape)[..., 2:, :]
        return torch.cat((query_key, value), dim=-2).flatten(-3)

    def extra_repr(self) -> str:
        state = "meta" if self.gate.is_meta else f"gate={self.gate.tolist()}, sigma={self.sigma.tolist()}"
        return f"{super().extra_repr()}, {state}"


class RemovalLayerNorm(RemovalNorm, nn.LayerNorm):
    r"""[`RemovalNorm`] with $c(x) = x - \bar x$."""

    def centred(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True)


class RemovalRMSNorm(RemovalNorm, nn.RMSNorm):  # type: ignore[misc]  # the mixin is no LayerNorm at run time
    r"""[`RemovalNorm`] with $c(x) = x$, and no $b$."""

    def centred(self, x: Tensor) -> Tensor:
        return x
