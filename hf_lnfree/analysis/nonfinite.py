"""Which tensor of a model became NaN or infinite first, and what the layers were doing when it happened."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..tables import number

GROWN = 100.0  # times its first value: a residual stream that explodes
HALF, MOST = 0.5, 0.75  # shares of heads

Verdict = Literal["entropy collapse", "entropic overload", "overflow", "sudden"]
Sample = Mapping[str, float]


@dataclass(frozen=True)
class NonFinite:
    """
    Args:
        kind: "parameter", "input", "output" or "gradient".
        module: name of the module that holds, received or made it; "" is the model itself.
        tensor: the parameter's name, or what of the module it is.
        layer: index of its block; None outside the blocks.
        count, size: entries that are NaN or infinite, of how many.
    """

    kind: Literal["parameter", "input", "output", "gradient"]
    module: str
    tensor: str
    layer: int | None
    count: int
    size: int

    def __str__(self) -> str:
        where = f"layer {self.layer}, " if self.layer is not None else ""
        return f"{where}{self.tensor} of {self.module or 'the model'}: {self.count} of {self.size} entries not finite"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def count_nonfinite(x: Any) -> int:
    """Entries of a tensor that are NaN or infinite; of all its shards if it has some, which all processes must ask."""
    return int(whole((~x.detach().isfinite()).sum())) if isinstance(x, Tensor) and x.is_floating_point() else 0


def whole(x: Tensor) -> Tensor:
    """A sharded tensor put together."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def tensors(value: Any) -> Iterator[Tensor]:
    """Those in a module's inputs or output."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, Mapping):
        yield from tensors(list(value.values()))


def first_nonfinite(
    model: nn.Module, run: Callable[[], Tensor], anywhere: Callable[[bool], bool] = bool
) -> NonFinite | None:
    """
    Find what is not finite and comes before everything else that is not.

    Parameters are looked at first, then the outputs of modules in the order in which they are made, then gradients in
    the order of the backward pass. Gradients of `model` are left as they were.

    Args:
        model: without wrappers.
        run: a forward pass of `model` that returns the loss.
        anywhere: whether something is so on any process: those that share weights go the same way, or wait forever.
    """
    kept = {p: p.grad for p in model.parameters()}  # before a forward pass puts whole parameters in place of shards
    for name, parameter in model.named_parameters():
        if count := count_nonfinite(parameter):
            module, _, tensor = name.rpartition(".")
            return _found("parameter", module, tensor, count, parameter.numel())
    found: list[NonFinite] = []
    with _watched(model, found):
        loss = run()
        if not anywhere(bool(found)) and loss.requires_grad:
            try:
                for parameter in kept:
                    parameter.grad = None
                loss.backward()
                if not anywhere(bool(found)):
                    found += _parameter_gradients(model)
            finally:
                for parameter, grad in kept.items():
                    parameter.grad = grad
    return found[0] if found else None


def _parameter_gradients(model: nn.Module) -> Iterator[NonFinite]:
    for name, parameter in reversed(list(model.named_parameters())):
        if count := count_nonfinite(parameter.grad):
            module, _, tensor = name.rpartition(".")
            yield _found("gradient", module, f"gradient of {tensor}", count, parameter.numel())


@contextmanager
def _watched(model: nn.Module, found: list[NonFinite]) -> Iterator[None]:
    """Appends what is not finite as it appears; a module is left after those inside it."""

    def leave(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            for x in tensors(output):
                if count := count_nonfinite(x):
                    made = not any(count_nonfinite(y) for y in tensors([args, kwargs]))
                    kind: Literal["input", "output"] = "output" if made or found else "input"
                    found.append(_found(kind, name, kind, count, x.numel()))
                elif x.requires_grad:
                    x.register_hook(lambda grad: backward(name, grad))

        return hook

    def backward(name: str, grad: Tensor) -> None:
        if count := count_nonfinite(grad):
            found.append(_found("gradient", name, "gradient of the output", count, grad.numel()))

    handles = [m.register_forward_hook(leave(name), with_kwargs=True) for name, m in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _found(kind: Any, module: str, tensor: str, count: int, size: int) -> NonFinite:
    layer = next((int(part) for part in module.split(".") if part.isdigit()), None)
    return NonFinite(kind, module, tensor, layer, count, size)


def judge(first: Sample, last: Sample) -> tuple[Verdict, str]:
    """
    What led to a divergence, from two samples of a flight recorder, and the figures that say so.

    - "entropy collapse": at least half of the heads at or below 1/4 of the largest possible entropy, and more of them
      than at first: attention logits grew.
    - "overflow": the residual stream is a hundred times its first size somewhere.
    - "entropic overload": at least three quarters of the heads above 3/4 of the largest possible entropy, and more of
      them than at first (heads of an untrained model are all there), and the residual stream in bounds.
    - "sudden": nothing of these; look at the data, the kernel and the machine.

    Args:
        first, last: as `FlightRecorder` logs them; `last` is the newest. Values that are not finite do not count.
    """

    def largest(sample: Sample, key: str) -> float:
        values = (value for name, value in sample.items() if name.startswith(f"{key}/"))
        return max((value for value in values if math.isfinite(value)), default=math.nan)

    collapsed, before = last.get("entropy/collapsed", 0.0), first.get("entropy/collapsed", 0.0)
    overloaded, overloaded_before = last.get("entropy/overloaded", 0.0), first.get("entropy/overloaded", 0.0)
    size, size_before = largest(last, "residual_rms"), largest(first, "residual_rms")
    grown = size / size_before if size_before else math.inf if size > 0 else math.nan
    logit, logit_before = (number(largest(sample, "attention_logit"), ".3g") for sample in (last, first))
    figures = (
        f"heads collapsed {collapsed:.0%} (at first {before:.0%}), overloaded {overloaded:.0%} (at first "
        f"{overloaded_before:.0%}); "
        f"residual stream {number(grown, '.3g')} times its first size; largest attention logit {logit} "
        f"(at first {logit_before})"
    )
    if collapsed >= HALF and collapsed > before:
        return "entropy collapse", figures
    if grown > GROWN:
        return "overflow", figures
    if overloaded >= MOST and overloaded > overloaded_before:
        return "entropic overload", figures
    return "sudden", figures
