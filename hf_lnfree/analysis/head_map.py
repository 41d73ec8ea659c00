"""The attention map of one head, made from its queries and keys: those of the other heads are not made.

Shapes: B batch, H heads, Q queries, K keys.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.calls import AttentionCall, attention_calls
from ..attention.check import visible_logits
from ..attention.masks import logit_arguments
from ..attention.visibility import Mask
from ..errors import AttentionError
from .chunked import pieces_of
from .own_attention import attends, heads_of, map_of, softmax_logits


@dataclass
class HeadMap:
    """
    Args:
        weights: [B, Q, K] probabilities, filled in when the context ends; a row that may attend to nothing is 0.
    """

    weights: Tensor | None = None


@contextmanager
def record_head_map(model: nn.Module, name: str, head: int) -> Iterator[HeadMap]:
    """
    Record the attention map of one head of one attention while `model` runs once, in eval mode.

    A module that computes its softmax by itself makes the maps of all its heads anyway, of which one is kept. Not
    thread-safe.

    Args:
        name: of the attention, as in `EntropyReport.modules`; "encoder.layer#2" is the third call of a module.
        head: counted from 0.

    Raises:
        AttentionError: there is no such module or head, or its map cannot be read.
    """
    path, _, number = name.partition("#")
    modules = dict(model.named_modules())
    if path not in modules:
        raise AttentionError(f"{type(model).__name__} has no module {path!r}.")
    module, call_number = modules[path], int(number or 0)
    maps: list[Callable[[], Tensor] | None] = []  # of the calls and softmaxes of the module, made for one of them only
    running: list[nn.Module] = []
    found = HeadMap()

    def keep(make: Callable[[], Tensor] | None) -> None:
        if len(maps) == call_number and make is not None:
            inside, running[:] = running[:], []  # the softmax of `make` is none of the module's
            found.weights = make()
            running[:] = inside
        maps.append(make)

    def after(call: AttentionCall) -> None:
        if call.module is module or (call.module is None and running):
            keep(lambda: map_of_call(call, head))

    def outside(function: Callable, args: tuple, kwargs: dict, result: Any) -> None:
        if running and (logits := softmax_logits(function, args, kwargs)) is not None and attends(module, logits):
            readable = pieces_of(module) is None
            keep((lambda: map_of_softmax(module, map_of(function, logits, result), head)) if readable else None)

    with torch.no_grad(), attention_calls(after, direct=True, outside=outside):
        handles = [
            module.register_forward_pre_hook(lambda module, args: running.append(module)),
            module.register_forward_hook(lambda module, args, output: running.clear(), always_call=True),
        ]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()
    if found.weights is None:
        raise AttentionError(f"The attention {name} of {type(model).__name__} makes no map that can be read.")


def map_of_call(call: AttentionCall, head: int) -> Tensor:
    """[B, Q, K] of one head of an attention call."""
    heads, groups = call.query.shape[1], call.key.shape[1]
    require_head(head, heads)
    arguments = logit_arguments(call)
    mask, queries, keys = arguments["attention_mask"], call.query.shape[2], call.key.shape[2]
    mask = None if mask is None else Mask.of(mask, queries, keys).of_head(head)
    group, sinks = head // (heads // groups), call.sinks
    if sinks is not None:
        sinks = sinks[head : head + 1] if sinks.dim() == 1 else sinks[:, head : head + 1]
    one = replace(call, query=call.query[:, head : head + 1], key=call.key[:, group : group + 1], sinks=sinks)
    rows = torch.arange(queries, device=call.query.device)
    logits, alive = visible_logits(one, rows, mask, arguments["is_causal"])
    return logits.softmax(-1)[..., :keys].where(alive[..., None], 0.0)[:, 0]


def map_of_softmax(module: nn.Module, map_: Tensor, head: int) -> Tensor:
    """[B, Q, K] of one head, from the map [B, H, Q, K] or [B H, Q, K] that a module made by itself."""
    heads = heads_of(module) or (map_.shape[1] if map_.dim() == 4 else 1)
    require_head(head, heads)
    if map_.dim() == 3 and map_.shape[0] % heads == 0:
        map_ = map_.unflatten(0, (-1, heads))
    if map_.dim() != 4 or map_.shape[1] != heads:
        raise AttentionError(f"{type(module).__name__} makes a map {list(map_.shape)} that cannot be read.")
    return map_[:, head].clone()


def require_head(head: int, heads: int) -> None:
    """Raise AttentionError for a head that is not there."""
    if not 0 <= head < heads:
        raise AttentionError(f"There is no head {head}: heads are 0 to {heads - 1}.")
