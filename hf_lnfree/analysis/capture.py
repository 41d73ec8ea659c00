"""Record the attention entropies of a Transformers model while it runs, whatever attention it runs with.

Attention calls come from `attention_calls`; modules that make none may return their map (Bloom, GPT-Neo, GPT-J;
DeBERTa when asked). Each does its work unchanged, so logits are those of the implementation that was asked for;
entropies come from queries, keys and mask, or from the map before it is freed.
"""

import sys
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ..attention.calls import AttentionCall, attention_calls, recomputing
from ..attention.eager import eager_attention, returns_maps_when_asked
from ..attention.fused import RowEntropies, fused_attention_entropy
from ..attention.masks import logit_arguments
from ..choices import Method
from ..errors import AttentionError
from .maps import adds_up_to_one, entropies_of_map, map_in, visible_keys


@dataclass
class AttentionRecord:
    """What was recorded, by the name of the attention module, in the order of the model's first call."""

    calls: dict[str, list[RowEntropies]] = field(default_factory=dict)
    """Every call of every module: `generate` makes one a token, the vision tower of Qwen2-VL one a picture."""

    @property
    def entropies(self) -> dict[str, Tensor]:
        """[B, H, Q] nats, the last call of each module."""
        return {name: calls[-1].entropy for name, calls in self.calls.items()}

    @property
    def support(self) -> dict[str, Tensor]:
        """[B or 1, H or 1, Q] number of keys each query may attend to, the last call of each module."""
        return {name: calls[-1].support for name, calls in self.calls.items()}

    def clear(self) -> None:
        """Forget what was recorded so far."""
        self.calls.clear()


@contextmanager
def record_attention_entropy(model: nn.Module, method: Method = "auto") -> Iterator[AttentionRecord]:
    """
    Record exact row entropies of every self- and cross-attention of `model`.

    The model may be wrapped by PEFT or DistributedDataParallel; functions that `torch.compile` made run eagerly inside
    the context. What a gradient checkpoint runs again is recorded once. Not thread-safe.

    Args:
        model: any model of transformers with softmax attention, or one that calls `scaled_dot_product_attention`.
        method: "fused" takes queries, keys and mask and needs O(T) memory; "attentions" takes the maps of eager
            attention, which it switches on; "auto" takes the maps of those modules only that offer nothing else.

    Example:
        >>> with record_attention_entropy(model) as record:
        ...     model(**batch)
        >>> record.entropies["transformer.h.0.attn"].mean((0, 2))

    Raises:
        AttentionError: no attention of the model was recorded, a mask or a map that cannot be read.
    """
    if method not in get_args(Method):
        raise AttentionError(f"method={method!r} is not known. Allowed: {', '.join(map(repr, get_args(Method)))}.")
    recorder = _Recorder(model, method)
    with ExitStack() as stack:
        if method == "attentions":
            stack.enter_context(eager_attention(recorder.model))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(attention_calls(recorder.after, direct=method != "attentions"))
        stack.enter_context(recorder.modules())
        yield recorder.record
    if not recorder.recorded:
        raise AttentionError(
            f"No attention of {type(recorder.model).__name__} was recorded with method={method!r}: it was not called, "
            "it has no softmax attention, or its attention neither uses transformers' ALL_ATTENTION_FUNCTIONS nor "
            "returns its map [batch, heads, queries, keys]"
            + (" (try method='attentions')." if method == "fused" else " (in eval mode: dropout changes maps).")
        )


class _Recorder:
    """Tells which module a call belongs to, and keeps each call once."""

    def __init__(self, model: nn.Module, method: Method):
        while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
            model = inner  # compiled, DistributedDataParallel
        base = getattr(model, "get_base_model", None)  # PEFT
        self.model = base() if base is not None else model
        self.method = method
        self.names = weakref.WeakKeyDictionary({module: name for name, module in model.named_modules()})
        self.record = AttentionRecord()
        self.recorded = 0
        self.running: list[tuple[nn.Module, int]] = []  # outermost first, and how much was recorded before each began
        # Some classes return their maps only when asked; what the caller did not ask for is taken out again.
        self.asks = method != "fused" and returns_maps_when_asked(self.model)

    def add(self, module: nn.Module, rows: RowEntropies) -> None:
        self.record.calls.setdefault(self.names[module], []).append(rows)
        self.recorded += 1

    def after(self, call: AttentionCall) -> None:
        """Keeps a call of the model's; a direct call is that of the innermost module that runs."""
        module = self.running[-1][0] if call.module is None and self.running else call.module
        if module is not None and module in self.names and not call.recomputed:
            self.add(module, row_entropies(call, of_map=self.method == "attentions"))

    @contextmanager
    def modules(self) -> Iterator[None]:
        """Follows which modules run, and looks at what they return when nothing inside them was recorded."""

        def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.running.append((module, self.recorded))

        def ask(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            self.asks = not kwargs.get("output_attentions")
            return args, kwargs | {"output_attentions": True}

        def leave(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            # A module that raised was never left: what stands above this one is its remains.
            while self.running and self.running[-1][0] is not module:
                self.running.pop()
            recorded_before = self.running.pop()[1] if self.running else -1
            if self.recorded > recorded_before or self.method == "fused" or recomputing():
                return None
            heads = getattr(getattr(self.model, "config", None), "num_attention_heads", None)
            if (map_ := map_in(output, heads)) is None:
                return None
            self.add(module, entropies_of_map(map_, visible_keys(kwargs.get("attention_mask"), map_)))
            return type(output)(None if item is map_ else item for item in output) if self.asks else None

        handles = []
        if self.asks:
            handles.append(self.model.register_forward_pre_hook(ask, with_kwargs=True))
        for module in self.names:
            if next(module.children(), None) is not None:
                handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(module.register_forward_hook(leave, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@torch.no_grad()
def row_entropies(call: AttentionCall, *, of_map: bool = False) -> RowEntropies:
    """The entropies of one attention call, from its queries and keys or from the map that eager attention returned."""
    arguments = logit_arguments(call)
    if not of_map:
        return fused_attention_entropy(**arguments, sinks=call.sinks)
    map_ = call.result[1]
    if call.sinks is None and not adds_up_to_one(map_):
        raise AttentionError("The rows of an attention map do not add up to 1: dropout is on. Call model.eval().")
    return entropies_of_map(map_, arguments["attention_mask"])
