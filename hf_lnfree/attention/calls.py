"""Every attention call of a model, whichever attention it runs with, in one form.

A model of transformers looks its attention function up in `AttentionInterface` and hands it its arguments, some by
position and some by name. `attention_calls` lets the function do its work and shows the call once it has returned.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface

FIRST = ("module", "query", "key", "value", "attention_mask")  # what every attention function takes, in this order


def recomputing() -> bool:
    """Whether gradient checkpointing is running a part of the model again, during the backward pass."""
    return torch._C._current_graph_task_id() != -1


@dataclass(eq=False)
class AttentionCall:
    """
    One attention call that has been made.

    B batch, H query heads, G key/value heads (H a multiple of G), Q queries, K keys, D and Dv head dimensions.

    Args:
        module: the attention module that made it; None for a direct call of `scaled_dot_product_attention`, which does
            not tell.
        query, key, value: [B, H, Q, D], [B, G, K, D], [B, G, K, Dv].
        mask: in the form that `implementation` takes; `read_mask` reads them all.
        function: what was called.
        implementation: the name under which the model looked `function` up: "eager", "sdpa", "flash_attention_2" ...
        is_causal: None leaves it to the module.
        scaling: of the logits; None for 1/sqrt(D).
        softcap: logits become `softcap * tanh(logits / softcap)` before mask and bias.
        sinks: [H] or [B, H, Q, 1] logits that take part in the softmax and stand for no key.
        options: all other arguments, by the host's names: sliding_window, position_bias, dropout ...
        result: what `function` returned: the output [B, Q, H, Dv] and, from eager attention, the map [B, H, Q, K].
        recomputed: whether gradient checkpointing makes this call once more, during the backward pass.
    """

    module: nn.Module | None
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any = None
    function: Callable = F.scaled_dot_product_attention
    implementation: str | None = None
    is_causal: bool | None = None
    scaling: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)
    result: Any = None
    recomputed: bool = field(default_factory=recomputing)


@contextmanager
def attention_calls(
    after: Callable[[AttentionCall], None],
    *,
    direct: bool = False,
    outside: Callable[[Callable, tuple, dict, Any], None] | None = None,
) -> Iterator[None]:
    """
    Inside, `after(call)` follows every call of an attention function that any model looks up.

    One context may stand inside another; the outer `after` then comes first. What was there before is restored, also
    after an exception. Not thread-safe.

    Args:
        after: what it raises is raised in the model's forward pass.
        direct: whether it also follows each `scaled_dot_product_attention` that is called outside such a function.
        outside: `outside(function, args, kwargs, result)` follows every other function of torch that is called there.
    """
    look_up = AttentionInterface.get_interface
    seam = _Seam(after, direct, outside)

    def get_interface(self: AttentionInterface, attn_implementation: str, default: Callable) -> Callable:
        return seam.follow(look_up(self, attn_implementation, default), attn_implementation)

    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign]
    try:
        with seam if direct or outside else nullcontext():
            yield
    finally:
        AttentionInterface.get_interface = look_up  # type: ignore[method-assign]


class _Seam(TorchFunctionMode):
    """Follows attention functions, and while it is entered as a mode, what is called outside them."""

    def __init__(self, after: Callable[[AttentionCall], None], direct: bool, outside: Callable | None):
        super().__init__()
        self.after, self.direct, self.outside = after, direct, outside
        self.inside_function = False

    def follow(self, attend: Callable, implementation: str | None) -> Callable:
        # The model's function, however many contexts stand around it, and not what that may wrap in turn.
        function = getattr(attend, "followed", attend)

        @functools.wraps(attend)
        def attend_and_follow(*args: Any, **kwargs: Any) -> Any:
            before, self.inside_function = self.inside_function, True
            try:
                result = attend(*args, **kwargs)
            finally:
                self.inside_function = before
            self.after(call_of(function, implementation, result, args, kwargs))
            return result

        attend_and_follow.followed = function  # type: ignore[attr-defined]
        return attend_and_follow

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if self.inside_function:
            return result
        if self.direct and function is F.scaled_dot_product_attention:
            self.after(direct_call(result, *args, **(kwargs or {})))
        elif self.outside is not None:
            self.outside(function, args, kwargs or {}, result)
        return result


def call_of(function: Callable, implementation: str | None, result: Any, args: tuple, kwargs: dict) -> AttentionCall:
    """From arguments that came by position or by name, as the function's signature allows; sinks have two names."""
    names = FIRST if len(args) <= len(FIRST) else FIRST + parameters(function)[len(FIRST) :]
    options = dict(zip(names[: len(args)], args, strict=True)) | kwargs
    module, query, key, value, mask = (options.pop(name, None) for name in FIRST)
    sinks, s_aux = options.pop("sinks", None), options.pop("s_aux", None)
    return AttentionCall(
        module,
        query,
        key,
        value,
        mask,
        function=function,
        implementation=implementation,
        is_causal=options.pop("is_causal", None),
        scaling=options.pop("scaling", None),
        softcap=options.pop("softcap", None),
        sinks=s_aux if sinks is None else sinks,
        options=options,
        result=result,
    )


def direct_call(
    result: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall:
    """From the arguments of `scaled_dot_product_attention`."""
    output = result.transpose(-3, -2) if result.dim() > 2 else result
    return AttentionCall(None, query, key, value, attn_mask, is_causal=is_causal, scaling=scale, result=(output, None))


@functools.lru_cache(maxsize=64)
def parameters(function: Callable) -> tuple[str, ...]:
    """The names in a function's signature, without `*args` and `**kwargs`."""
    collecting = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(name for name, p in inspect.signature(function).parameters.items() if p.kind not in collecting)
