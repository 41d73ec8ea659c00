"""Record the attention entropies of a Transformers model while it runs, whatever attention it runs with.

Attention calls come from `attention_calls`; modules that make none may return their map (Bloom, GPT-Neo, GPT-J) or
compute a softmax by themselves (DeBERTa), some in pieces (Longformer). Each does its work unchanged, so logits are
those of the implementation that was asked for; entropies come from queries, keys and mask, or from the map before it is
freed. An attention that ran beside them and cannot be recorded is an error.
"""

import inspect
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.calls import AttentionCall, attention_calls, recomputing
from ..attention.eager import eager_attention
from ..attention.fused import RowEntropies, fused_attention_entropy, rows_and_keys
from ..attention.masks import logit_arguments
from ..attention.statistics import RowStatistics, output_norm
from ..choices import Method
from ..errors import AttentionError
from .chunked import pieces_of
from .entropy import attention_entropy
from .maps import adds_up_to_one, entropies_of_map, map_in, visible_keys
from .modes import unwrapped
from .own_attention import (
    attends,
    heads_of,
    is_softmax,
    map_of,
    named_attention,
    returns_maps,
    rows_of_multi_head_attention,
    rows_of_softmax,
    softmax_logits,
)


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
    def statistics(self) -> dict[str, RowStatistics]:
        """Of the last call of each module that offers its logits, when they were asked for."""
        last = {name: calls[-1].statistics for name, calls in self.calls.items()}
        return {name: found for name, found in last.items() if found is not None}

    @property
    def support(self) -> dict[str, Tensor]:
        """[B or 1, H or 1, Q] number of keys each query may attend to, the last call of each module."""
        return {name: calls[-1].support for name, calls in self.calls.items()}

    def __repr__(self) -> str:
        calls = sum(map(len, self.calls.values()))
        return f"<AttentionRecord {len(self.calls)} attention modules, {calls} calls>"

    def clear(self) -> None:
        """Forget what was recorded so far."""
        self.calls.clear()


@contextmanager
def record_attention_entropy(
    model: nn.Module, method: Method = "auto", *, statistics: bool = False
) -> Iterator[AttentionRecord]:
    """
    Record the exact entropy of every query in each self- and cross-attention of `model`.

    The model may be wrapped by PEFT or DistributedDataParallel; functions that `torch.compile` made run eagerly inside
    the context. What a gradient checkpoint runs again is recorded once. Not thread-safe.

    In bfloat16, "fused" gives the entropy of the exact softmax of the model's queries and keys. Eager attention rounds
    its logits before the softmax, so its own map is another one: by up to 0.02 nats at logits of standard deviation 1
    and 0.1 at 10. Maps that are read are rounded themselves: their entropy is within 0.005 nats of that of the softmax.

    Args:
        model: any model of transformers with softmax attention, or one that calls `scaled_dot_product_attention`.
        method: "fused" takes queries, keys and mask and needs O(T) memory; "attentions" takes the maps of eager
            attention, which it switches on; "auto" takes the maps of those modules only that offer nothing else.
        statistics: also record `RowStatistics` of every query: logits, sinks, norms of outputs. Modules whose maps are
            taken have none.

    Example:
        >>> with record_attention_entropy(model) as record:
        ...     model(**batch)
        >>> record.entropies["transformer.h.0.attn"].mean((0, 2))

    Raises:
        AttentionError: no attention of the model was recorded, or one beside those that were; a mask or a map that
            cannot be read; an attention function of somebody else that is no softmax of its arguments; statistics
            with "attentions", whose maps do not tell logits.
    """
    if method not in get_args(Method):
        raise AttentionError(f"method={method!r} is not known. Allowed: {', '.join(map(repr, get_args(Method)))}.")
    if statistics and method == "attentions":
        raise AttentionError("statistics=True needs logits, which maps do not tell. Use method='auto' or 'fused'.")
    recorder = _Recorder(model, method, statistics)
    with ExitStack() as stack:
        if method == "attentions":
            stack.enter_context(eager_attention(recorder.model))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(attention_calls(recorder.after, direct=True, outside=recorder.outside))
        stack.enter_context(recorder.modules())
        yield recorder.record
    unseen = ", ".join(recorder.unseen)
    if recorder.recorded and unseen:
        raise AttentionError(
            f"Attention of {type(recorder.model).__name__} ran that method={method!r} cannot record: {unseen}. "
            + ("Call model.eval(), or record other parts alone." if method == "auto" else "Try method='auto'.")
        )
    if not recorder.recorded:
        raise AttentionError(
            f"No attention of {type(recorder.model).__name__} was recorded with method={method!r}: it was not called, "
            "it has no softmax attention, or its attention neither uses transformers' ALL_ATTENTION_FUNCTIONS nor "
            "returns its map [batch, heads, queries, keys]"
            + (" (try method='attentions')." if method == "fused" else " (in eval mode: dropout changes maps).")
            + (f" A softmax ran in {unseen}." if unseen else "")
        )


@dataclass
class _Running:
    """A module that runs."""

    module: nn.Module
    recorded: int
    """How much was recorded before it began."""
    given: tuple[tuple, dict] = ((), {})
    """What its `forward` was called with."""
    softmaxes: list[list[RowEntropies] | None] = field(default_factory=list)
    """The rows of each of its own softmaxes over keys, None where the map cannot be read."""
    unseen: list[str] = field(default_factory=list)
    """Modules inside it whose softmax was not recorded."""

    @property
    def arguments(self) -> dict[str, Any]:
        """What its `forward` was called with, by name."""
        args, kwargs = self.given
        return inspect.signature(self.module.forward).bind(*args, **kwargs).arguments | kwargs

    def rows_of(self, logits: Tensor, map_: Tensor) -> list[RowEntropies] | None:
        """Of its next softmax: of one only, unless its class is known to cut its softmax in pieces."""
        pieces, heads = pieces_of(self.module), heads_of(self.module)
        if pieces is not None and heads is not None:
            return pieces.rows(len(self.softmaxes), logits, map_, heads, self.arguments)
        rows = None if self.softmaxes else rows_of_softmax(self.module, logits, map_, self.arguments)
        return None if rows is None else [rows]

    def calls(self, output: Any) -> list[RowEntropies]:
        """What its softmaxes make up, nothing if one of them cannot be read."""
        rows = [row for softmax in self.softmaxes for row in softmax or ()]
        if not rows or None in self.softmaxes:
            return []
        pieces = pieces_of(self.module)
        return rows if pieces is None else pieces.together(rows, self.arguments, self.module, output)


class _Recorder:
    """Tells which module a call belongs to, and keeps each call once."""

    def __init__(self, model: nn.Module, method: Method, statistics: bool = False):
        model = unwrapped(model)
        base = getattr(model, "get_base_model", None)  # PEFT
        self.model = base() if base is not None else model
        self.method, self.statistics = method, statistics
        self.names = weakref.WeakKeyDictionary({module: name for name, module in model.named_modules()})
        self.record = AttentionRecord()
        self.recorded = 0
        self.running: list[_Running] = []  # outermost first
        self.unseen: dict[str, None] = {}  # names of modules whose attention ran and was not recorded, in order

    def add(self, module: nn.Module, rows: RowEntropies) -> None:
        self.record.calls.setdefault(self.names[module], []).append(rows)
        self.recorded += 1

    def after(self, call: AttentionCall) -> None:
        """Keeps a call of the model's; a direct call is that of the innermost module that runs."""
        module = self.running[-1].module if call.module is None and self.running else call.module
        if module is not None and module in self.names and not call.recomputed:
            of_map = self.method == "attentions" and call.module is not None  # sdpa itself makes no map
            self.add(module, row_entropies(call, of_map=of_map, statistics=self.statistics))

    def outside(self, function: Callable, args: tuple, kwargs: dict, result: Any) -> None:
        """Notes what the innermost module computes by itself; it is looked at when the module has run."""
        if not self.running or recomputing():
            return
        # A softmax may be a module of its own (I-BERT).
        running = next((r for r in reversed(self.running) if not is_softmax(r.module)), self.running[0])
        if (logits := softmax_logits(function, args, kwargs)) is not None and attends(running.module, logits):
            readable = self.method != "fused"
            running.softmaxes.append(
                running.rows_of(logits.detach(), map_of(function, logits, result).detach()) if readable else None
            )
        elif function is F.multi_head_attention_forward and self.method != "fused":
            self.add(running.module, rows_of_multi_head_attention(args, kwargs))
        elif function is F.multi_head_attention_forward:
            running.softmaxes.append(None)

    def left(self, running: _Running, output: Any, mask: Any) -> None:
        """Looks at what a module that made no call returned, then at its softmax."""
        module, own, before = running.module, running.softmaxes, running.recorded
        if self.recorded == before and self.method != "fused":
            found = running.calls(output)
            heads = getattr(getattr(self.model, "config", None), "num_attention_heads", None)
            # No map would tell of two softmaxes.
            if len(own) < 2 and returns_maps(module) and (map_ := map_in(output, heads)) is not None:
                rows = entropies_of_map(map_, visible_keys(mask, map_))
                # Only logits tell a key of weight 0 from one that is hidden.
                if found and found[0].entropy.shape == rows.entropy.shape:
                    rows = found[0]._replace(entropy=rows.entropy)
                self.add(module, rows)
                return
            if not module.training:  # else dropout may follow
                for rows in found:
                    self.add(module, rows)
        if own and self.recorded == before:
            running.unseen.append(f"{self.names[module] or 'the model'} ({type(module).__name__})")
        if self.running:
            self.running[-1].unseen += running.unseen
        else:
            self.unseen |= dict.fromkeys(running.unseen)

    @contextmanager
    def modules(self) -> Iterator[None]:
        """Follows which modules run, and looks at what they return when nothing inside them was recorded."""

        def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.running.append(_Running(module, self.recorded, (args, kwargs)))

        def leave(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            if self.running and self.running[-1].module is module:  # else the context was entered while it ran
                running = self.running.pop()
                if output is not None and not recomputing():  # None when it raised
                    self.left(running, output, kwargs.get("attention_mask"))

        handles = []
        for module in self.names:
            if next(module.children(), None) is not None or named_attention(module):
                handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(module.register_forward_hook(leave, with_kwargs=True, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@torch.no_grad()
def row_entropies(call: AttentionCall, *, of_map: bool = False, statistics: bool = False) -> RowEntropies:
    """The entropies of one attention call, from its queries and keys or from the map that eager attention returned."""
    arguments = logit_arguments(call)
    if of_map and not adds_up_to_one(call.result[1]) and call.sinks is None:
        raise AttentionError("The rows of an attention map do not add up to 1: dropout is on. Call model.eval().")
    # Granite scales its output by what a sink leaves, and returns a map that knows nothing of it.
    if not of_map or (call.sinks is not None and adds_up_to_one(call.result[1])):
        rows = fused_attention_entropy(**arguments, sinks=call.sinks, statistics=statistics)
        if rows.statistics is None:
            return rows
        norm = output_norm(call.result[0].transpose(1, 2), rows.support)  # B H Q
        return rows._replace(statistics=rows.statistics._replace(output_norm=norm))
    # A key of weight 0 is hidden only if the mask hides it.
    support, keys = rows_and_keys(*(arguments[name] for name in ("query", "key", "attention_mask", "is_causal")))
    entropy = attention_entropy(call.result[1]).clamp_min(0.0).where(support > 0, 0.0)
    return RowEntropies(entropy, support, None, keys)
