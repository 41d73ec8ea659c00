"""Record the attention entropies of a Transformers model while it runs, whatever attention it runs with.

A call is seen in one of three places: the attention function that the model looks up (transformers'
`ALL_ATTENTION_FUNCTIONS`), a direct call of `scaled_dot_product_attention` (Falcon), or the map that an attention
module returns (Bloom, GPT-Neo, GPT-J; DeBERTa when asked). Each does its work unchanged, so logits are those of the
implementation that was asked for; entropies come from queries, keys and mask, or from the map before it is freed.
"""

import inspect
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, PreTrainedModel

from ..attention.fused import RowEntropies, fused_attention_entropy
from ..attention.masks import read_mask
from ..choices import Method
from ..errors import AttentionError
from .maps import adds_up_to_one, entropies_of_map, visible_keys


@dataclass
class AttentionRecord:
    """What was recorded, by the name of the attention module, in the order of the model's first call."""

    calls: dict[str, list[RowEntropies]] = field(default_factory=dict)
    """Every call of every module; `generate` calls each once a token."""

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
        stack.enter_context(wrapped_attention(recorder.recording))
        stack.enter_context(recorder.modules())
        stack.enter_context(_DirectCalls(recorder) if method != "attentions" else nullcontext())
        yield recorder.record
    if not recorder.found:
        raise AttentionError(
            f"No attention of {type(recorder.model).__name__} was recorded with method={method!r}: it was not called, "
            "it has no softmax attention, or its attention neither uses transformers' ALL_ATTENTION_FUNCTIONS nor "
            "returns its map [batch, heads, queries, keys]"
            + (" (try method='attentions')." if method == "fused" else " (in eval mode: dropout changes maps).")
        )


@contextmanager
def wrapped_attention(wrap: Callable[[Callable], Callable]) -> Iterator[None]:
    """Every attention function that a model looks up inside is `wrap`ped first."""
    look_up = AttentionInterface.get_interface

    def get_interface(self: AttentionInterface, implementation: str, default: Callable) -> Callable:
        return wrap(look_up(self, implementation, default))

    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        AttentionInterface.get_interface = look_up  # type: ignore[method-assign]


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Eager attention inside, what was there before outside, also after an exception."""
    if not isinstance(model, PreTrainedModel):
        raise AttentionError(f"method='attentions' needs a model of transformers, got {type(model).__name__}.")
    before = model.config._attn_implementation
    if before == "eager":
        yield
        return
    if not switchable(model):
        raise AttentionError(
            f"{type(model).__name__} cannot be switched to eager attention after it was loaded. Load it with "
            "from_pretrained(..., attn_implementation='eager'), or use method='auto'."
        )
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        model.set_attn_implementation(before)


def switchable(model: nn.Module) -> bool:
    """Whether the class looks its attention up, so that another one can be set."""
    return isinstance(model, PreTrainedModel) and model._can_set_attn_implementation()


def returns_maps_when_asked(model: nn.Module) -> bool:
    """Whether it runs an eager attention of its own and can be asked for maps without changing what it computes."""
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    can_be_asked = "output_attentions" in inspect.signature(model.forward).parameters
    return implementation == "eager" and can_be_asked and not switchable(model)


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
        self.found = False
        self.running: list[list[Any]] = []  # [module, whether a call inside it was recorded], outermost first
        self.inside_function = False
        # Some classes return their maps only when asked; what the caller did not ask for is taken out again.
        self.asks = method != "fused" and returns_maps_when_asked(self.model)

    def add(self, module: nn.Module, rows: RowEntropies) -> None:
        self.record.calls.setdefault(self.names[module], []).append(rows)
        self.found = True
        for frame in self.running:
            frame[1] = True

    @property
    def recomputing(self) -> bool:
        """Gradient checkpointing runs a layer again during the backward pass."""
        return torch._C._current_graph_task_id() != -1

    def recording(self, attend: Callable) -> Callable:
        """An attention function that is followed by a record."""

        def attend_and_record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args, **kwargs):
            self.inside_function = True
            try:
                result = attend(module, query, key, value, mask, *args, **kwargs)
            finally:
                self.inside_function = False
            if module in self.names and not self.recomputing:
                map_ = result[1] if self.method == "attentions" else None
                self.add(module, row_entropies(module, query, key, mask, map_=map_, **kwargs))
            return result

        return attend_and_record

    @contextmanager
    def modules(self) -> Iterator[None]:
        """Follows which modules run, and looks at what they return when nothing inside them was recorded."""

        def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.running.append([module, False])

        def ask(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            self.asks = not kwargs.get("output_attentions")
            return args, kwargs | {"output_attentions": True}

        def leave(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            # A module that raised was never left: what stands above this one is its remains.
            while self.running and self.running[-1][0] is not module:
                self.running.pop()
            _, recorded = self.running.pop() if self.running else (None, True)
            if recorded or self.method == "fused" or self.recomputing:
                return None
            if (map_ := self.map_of(output)) is None:
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

    def map_of(self, output: Any) -> Tensor | None:
        """The [B, H, Q, K] map in what a module returned, known by its heads and by rows that add up to 1."""
        if type(output) not in (tuple, list):
            return None
        heads = getattr(getattr(self.model, "config", None), "num_attention_heads", None)
        for item in output[1:]:
            is_map = isinstance(item, Tensor) and item.dim() == 4 and item.is_floating_point()
            if is_map and heads in (None, item.shape[1]) and adds_up_to_one(item):
                return item
        return None


class _DirectCalls(TorchFunctionMode):
    """Records `scaled_dot_product_attention` where a module of the model calls it by itself."""

    def __init__(self, recorder: _Recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        recorder = self.recorder
        direct = function is F.scaled_dot_product_attention and not recorder.inside_function
        if direct and recorder.running and not recorder.recomputing:
            recorder.add(recorder.running[-1][0], direct_call(*args, **(kwargs or {})))
        return result


@torch.no_grad()
def direct_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> RowEntropies:
    """The entropies of a call with the arguments of `F.scaled_dot_product_attention`."""
    return fused_attention_entropy(query, key, attention_mask=attn_mask, is_causal=is_causal, scale=scale)


@torch.no_grad()
def row_entropies(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Any,
    *,
    map_: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> RowEntropies:
    """The entropies of one attention call, from the arguments that transformers hands to an attention function."""
    mask, causal = read_mask(module, query, key, mask, **options)
    if map_ is not None:
        if s_aux is None and not adds_up_to_one(map_):
            raise AttentionError("The rows of an attention map do not add up to 1: dropout is on. Call model.eval().")
        return entropies_of_map(map_, mask)
    return fused_attention_entropy(
        query, key, attention_mask=mask, is_causal=causal, scale=scaling, softcap=softcap, sinks=s_aux
    )
