"""Record what the units of a Transformers model's MLPs do while it runs, whatever the model calls them.

An activation is looked for: a module of its kind, or one of torch's functions. Its input is the pre-activation. The
post-activation is the input of the linear layer that takes what it returned, or what it returned times the output of
another linear layer (a gate). That is checked value by value, so no family is known by name. The weights of fused
mixtures of experts are 3-D; what runs there is computed again, see `experts`.

Shapes: N rows (tokens that are no padding), F hidden units, E input features.
"""

import inspect
import re
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from ..attention.calls import recomputing
from ..errors import ModelError, listed
from .experts import close, expert_rows, has_experts
from .layers import activation_classes
from .mlp_places import places_of
from .modes import unwrapped

FUNCTIONS = {F.relu, torch.relu, Tensor.relu, F.gelu, F.silu, F.leaky_relu, F.relu6, F.elu, F.mish, F.celu, F.selu}
ACTIVATION = re.compile("gelu|relu|silu|swish|mish|activation", re.IGNORECASE)  # classes of a model's own
MLP = re.compile("mlp|feed_?forward|ffn|experts|dense_?act|layerff", re.IGNORECASE)


class MLPRows(NamedTuple):
    """
    What one MLP did with the tokens of one forward pass.

    Args:
        name: of the module that runs the activation; "….experts.3" of an expert, and "…#1" where it runs a second time
            in a pass.
        pre: [N, F] pre-activation, of a gated MLP that of its gate.
        post: [N, F] what the last linear layer takes; of a gated MLP activation times gate.
        inputs: [N, E] what its first linear layer takes; None where that is not known.
        token: [N] which row of the batch each is: token % length of sequence token // length.
        length: tokens in a sequence of the batch, with padding.
    """

    name: str
    pre: Tensor
    post: Tensor
    inputs: Tensor | None
    token: Tensor
    length: int

    @property
    def sequence(self) -> Tensor:
        """[N] which sequence of the batch a row belongs to."""
        return self.token // self.length

    @property
    def position(self) -> Tensor:
        """[N] where in its sequence a row stands, from 0, padding counted."""
        return self.token % self.length


Consumer = Callable[[MLPRows], None]


@dataclass
class MLPRecord:
    """Which MLPs were seen so far, in the order of their first call, and how many rows of each."""

    rows: dict[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<MLPRecord {len(self.rows)} MLPs, {sum(self.rows.values())} rows>"


@contextmanager
def record_mlp(model: nn.Module, each: Consumer) -> Iterator[MLPRecord]:
    """
    Hand the pre- and post-activations of every MLP of `model` to `each`, as they come; nothing is kept.

    Padding is left out: the `attention_mask` that the model is called with, and `decoder_attention_mask`, say which
    rows are tokens. The model may be wrapped by PEFT or DistributedDataParallel, and its linear layers by LoRA;
    functions that `torch.compile` made run eagerly inside the context. What a gradient checkpoint runs again is handed
    over once. Not thread-safe.

    Args:
        model: any model of transformers with MLPs: linear layer, activation, linear layer, gated or not; also fused
            mixtures of experts, expert by expert.
        each: called with `MLPRows` inside the model's forward pass, without gradient.

    Example:
        >>> shares = {}
        >>> def count(rows):
        ...     shares[rows.name] = (rows.pre > 0).float().mean()
        >>> with record_mlp(model, count):
        ...     model(**batch)

    Raises:
        ModelError: no MLP of the model was seen, or one ran beside those that were; rows that do not fit the batch.
    """
    recorder = _Recorder(model, each)
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(recorder.modules())
        stack.enter_context(_Functions(recorder))
        yield recorder.record
    kind, seen = type(recorder.model).__name__, recorder.record.rows
    hint = (
        "An activation must be a module or a function of torch, and the linear layer behind it take what it returns, "
        "times another one's output if gated; in eval mode: dropout changes it (model.eval())."
    )
    if recorder.unseen:
        raise ModelError(f"MLPs of {kind} ran that cannot be recorded: {listed(recorder.unseen)}. {hint}")
    if not seen:
        raise ModelError(f"No MLP of {kind} was recorded: it was not called, or its MLPs cannot be seen. {hint}")


@dataclass
class _Activated:
    """An activation that has run, and whose linear layer has not."""

    frame: "_Frame"
    pre: Tensor
    result: Tensor


@dataclass
class _Frame:
    """A module that runs."""

    module: nn.Module
    recorded: int
    """How many MLPs had been recorded when it began."""
    given: tuple[tuple, dict]
    linear: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Input and output of each linear layer that it has run."""
    pending: list[_Activated] = field(default_factory=list)
    before: Tensor | None = None
    """The input of an activation that works in place."""

    @property
    def arguments(self) -> dict[str, Any]:
        """What its `forward` was called with, by name."""
        args, kwargs = self.given
        return inspect.signature(self.module.forward).bind_partial(*args, **kwargs).arguments | kwargs


def is_activation(module: nn.Module) -> bool:
    """One of transformers' activations or torch's, or a module without others in it whose class is named for one."""
    if next(module.children(), None) is not None:
        return False
    return isinstance(module, activation_classes()) or bool(ACTIVATION.search(type(module).__name__))


def is_linear(module: nn.Module) -> bool:
    """A linear layer, or one in an adapter's wrapper."""
    return isinstance(module, (nn.Linear, Conv1D)) or isinstance(getattr(module, "base_layer", None), nn.Module)


class _Recorder:
    """Follows which modules run, and finds the linear layer behind each activation."""

    def __init__(self, model: nn.Module, each: Consumer):
        model = unwrapped(model)
        base = getattr(model, "get_base_model", None)  # PEFT
        self.model: Any = base() if base is not None else model
        self.each = each
        self.names = weakref.WeakKeyDictionary({module: name for name, module in model.named_modules()})
        self.in_list = {
            item
            for holder in model.modules()
            if isinstance(holder, nn.ModuleList)
            for block in holder
            if block is not None  # Informer
            for item in block.modules()
        }
        self.record = MLPRecord()
        self.recorded = 0
        self.calls: Counter[str] = Counter()  # in this forward pass
        self.frames: list[_Frame] = []  # outermost first
        self.unseen: dict[str, None] = {}
        self.paused = False

    def hand_over(self, name: str, pre: Tensor, post: Tensor, inputs: Tensor | None, tokens: Tensor | None) -> None:
        """Rows [..., F] of all tokens of the batch, or [N, F] of some `tokens` [N] among them."""
        arguments = self.frames[0].arguments
        sides = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        shape = tuple(pre.shape[:-1]) if tokens is None else (len(next(iter(self.frames[-1].arguments.values()))),)
        kept, length = places_of(name, shape, arguments, sides and "decoder" in name.split("."))
        kept = kept.to(pre.device)
        number = self.calls[name]
        self.calls[name] += 1
        name = f"{name}#{number}" if number else name
        pre, post = (x.detach().reshape(-1, x.shape[-1]) for x in (pre, post))
        inputs = None if inputs is None else inputs.detach().reshape(-1, inputs.shape[-1])
        chosen = kept if tokens is None else kept[tokens]
        token = kept.nonzero().flatten() if tokens is None else tokens[chosen]
        if inputs is not None and len(inputs) != len(pre):
            inputs = None
        if not chosen.all():
            pre, post, inputs = pre[chosen], post[chosen], None if inputs is None else inputs[chosen]
        self.record.rows[name] = self.record.rows.get(name, 0) + len(pre)
        self.recorded += 1
        with torch.no_grad(), self.pause():
            self.each(MLPRows(name, pre, post, inputs, token, length))

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Inside, nothing is looked at."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def activated(self, pre: Tensor, result: Any) -> None:
        """An activation has run in the innermost module."""
        frame = self.frames[-1]
        if isinstance(result, Tensor) and result.shape == pre.shape and not has_experts(frame.module):
            frame.pending.append(_Activated(frame, pre.detach(), result.detach()))

    @torch.no_grad()
    def before_linear(self, x: Tensor) -> None:
        """Looks whether the layer takes what an activation left."""
        for frame in reversed(self.frames):
            for found in reversed(frame.pending):
                linear = found.frame.linear
                if takes(x, found.result, [output for _, output in linear]):
                    frame.pending.remove(found)
                    width = found.pre.shape[-1]
                    inputs = next((i for i, o in reversed(linear) if o.shape[-1] in (width, 2 * width)), None)
                    self.hand_over(self.names[found.frame.module], found.pre, x, inputs, None)
                    return

    def left(self, frame: _Frame, output: Any) -> None:
        """What is left to do when a module has run: its experts, and activations that wait for a layer outside it."""
        module, name = frame.module, self.names[frame.module]
        if has_experts(module):
            with self.pause():
                self.frames.append(frame)
                called = list(frame.arguments.values())
                for expert, token, inputs, pre, post in expert_rows(name, module, called, output):
                    self.hand_over(f"{name}.{expert}", pre, post, inputs, token)
                self.frames.pop()
        if self.frames and self.frames[-1].module in self.in_list:
            self.frames[-1].pending += frame.pending
        if MLP.search(type(module).__name__) and self.recorded == frame.recorded and holds_two_layers(module):
            self.unseen[f"{name or 'the model'} ({type(module).__name__})"] = None

    @contextmanager
    def modules(self) -> Iterator[None]:
        """Follows modules that hold others, activations and linear layers."""

        def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if self.paused:
                return
            if not self.frames:
                self.calls.clear()
            frame = _Frame(module, self.recorded, (args, kwargs))
            if is_activation(module) and getattr(module, "inplace", False):
                frame.before = args[0].detach().clone()
            self.frames.append(frame)

        def leave(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            if self.paused or not self.frames or self.frames[-1].module is not module:
                return  # the context was entered while it ran
            frame = self.frames.pop()
            if output is None or recomputing():  # None when it raised
                return
            if not is_activation(module):
                self.left(frame, output)
            elif self.frames and args:
                self.activated(args[0] if frame.before is None else frame.before, output)

        def before_linear(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if self.frames and not self.paused and not recomputing() and isinstance(x, Tensor):
                self.before_linear(x)

        def after_linear(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if self.frames and not self.paused and isinstance(output, Tensor) and isinstance(x, Tensor):
                self.frames[-1].linear.append((x.detach(), output.detach()))

        handles = []
        for module in self.names:
            if is_linear(module):
                handles.append(module.register_forward_pre_hook(before_linear, with_kwargs=True))
                handles.append(module.register_forward_hook(after_linear, with_kwargs=True))
            elif next(module.children(), None) is not None or is_activation(module) or holds_two_layers(module):
                handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(module.register_forward_hook(leave, with_kwargs=True, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Functions(TorchFunctionMode):
    """Shows the recorder activations that are functions and no modules."""

    def __init__(self, recorder: _Recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        frames, kwargs = self.recorder.frames, kwargs or {}
        watched = function in FUNCTIONS and frames and not self.recorder.paused and not recomputing()
        if not watched or is_activation(frames[-1].module):
            return function(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        before = x.detach().clone() if kwargs.get("inplace") else x
        result = function(*args, **kwargs)
        self.recorder.activated(before, result)
        return result


def takes(x: Tensor, result: Tensor, outputs: list[Tensor]) -> bool:
    """Whether `x` is what an activation returned, or that times the output, or half of the output, of a layer."""
    if x.shape[-1] != result.shape[-1] or x.numel() != result.numel():
        return False
    x, result = (y.detach().reshape(-1, y.shape[-1]) for y in (x, result))
    if same(x, result):
        return True
    width = result.shape[-1]
    for output in outputs:
        halves = (output,) if output.shape[-1] == width else (*output.chunk(2, -1), output[..., ::2], output[..., 1::2])
        for gate in halves:
            if gate.shape[-1] == width and gate.numel() == result.numel():
                gate = gate.reshape(-1, width)
                if close(x[:1], result[:1] * gate[:1]) and close(x, result * gate):
                    return True
    return False


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one, or hold the same."""
    if one.data_ptr() == other.data_ptr() and one.stride() == other.stride() and one.dtype == other.dtype:
        return True
    return close(one[:1], other[:1]) and close(one, other)


def holds_two_layers(module: nn.Module) -> bool:
    """Whether it holds two linear layers, or two weights of experts."""
    layers = sum(map(is_linear, module.modules()))
    return layers > 1 or sum(parameter.dim() == 3 for parameter in module.parameters()) > 1
