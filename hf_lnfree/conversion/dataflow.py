"""What a forward pass does with the residual stream, followed tensor by tensor; on the meta device too."""

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.activations import ACT2CLS
from transformers.pytorch_utils import Conv1D

from ..models.normalizations import Feeds


class Source(NamedTuple):
    """Where a tensor comes from: a state of the stream, what a norm or a projection returned."""

    kind: Literal["stream", "norm", "projection"]
    name: str


@dataclass(frozen=True)
class Origin:
    """
    What is known of a tensor.

    Args:
        direct: what it is but for its shape, its dtype, sums and factors.
        reached: what it was computed from in whatever way.
    """

    direct: frozenset[Source] = frozenset()
    reached: frozenset[Source] = frozenset()

    def __or__(self, other: "Origin") -> "Origin":
        return Origin(self.direct | other.direct, self.reached | other.reached)


@dataclass
class SeenNorm:
    """
    What was seen of a norm.

    Args:
        given_stream: whether it was given a state of the stream, once for each kind of call.
        after_stream: whether what it was given was computed from a stream.
        joins: whether what it returned was added to the stream, or left a block.
        attended: whether that was multiplied with something in attention, as queries and keys are.
        after: the block that had ended last when it was called first.
        width: of what it was given; 0 if that was not one tensor.
        operators: what it did.
        feeds: what was computed first from what it returned.
        readers: the projections that were given that.
    """

    given_stream: set[bool] = field(default_factory=set)
    after_stream: bool = False
    joins: bool = False
    attended: bool = False
    after: str | None = None
    width: int = 0
    operators: set[str] = field(default_factory=set)
    feeds: Feeds | None = None
    readers: set[str] = field(default_factory=set)


# Operators that leave what a tensor is: views, copies, factors, sums, and tokens that are chosen or laid out.
KEEPING = {
    *("_reshape_alias", "_to_copy", "_unsafe_view", "alias", "as_strided", "clone", "contiguous", "copy_", "detach"),
    *("expand", "narrow", "permute", "reshape", "slice", "select", "split", "split_with_sizes", "chunk", "squeeze"),
    *("t", "to", "transpose", "unbind", "unfold", "unsqueeze", "view", "repeat", "roll", "cat", "stack", "pad"),
    *("constant_pad_nd", "add", "add_", "sub", "mul", "mul_", "div", "div_", "neg", "dropout", "native_dropout"),
    *("where", "index", "index_add", "index_add_", "index_copy_", "index_put", "index_put_", "index_select"),
    *("masked_scatter", "masked_scatter_", "scatter", "scatter_", "scatter_add", "scatter_add_"),
}
SUMS = ("add", "add_")
PRODUCTS = ("baddbmm", "bmm", "matmul", "mm")
NONLINEAR = ("elu", "gelu", "leaky_relu", "mish", "relu", "relu_", "sigmoid", "silu", "silu_", "softplus", "tanh")
NORMED_OTHERWISE = (nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.LocalResponseNorm)
ACTIVATIONS: tuple[Any, ...] = tuple(
    {value[0] if isinstance(value, tuple) else value for value in ACT2CLS.values()} - {nn.Sigmoid}
)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a LayerNorm or an RMSNorm of some family, by what its class is called."""
    name = type(module).__name__
    named = re.search(r"(Layer|RMS)_?Norm", name, re.IGNORECASE) or name.endswith("Norm")
    return (
        bool(named)
        and not name.startswith("_")
        and not any(True for _ in module.children())
        and not isinstance(module, NORMED_OTHERWISE)
    )


def is_activation(module: nn.Module) -> bool:
    """Whether a module is one of transformers' activations, or called like one."""
    named = re.search(r"(GELU|RELU|SiLU|Swish|Activation)$", type(module).__name__, re.IGNORECASE)
    return (isinstance(module, ACTIVATIONS) or bool(named)) and not any(True for _ in module.children())


class StreamWatch(TorchDispatchMode):
    """Follows every tensor of a forward pass by the memory that it lies in, on whatever device, "meta" too."""

    def __init__(self, blocks: dict[str, int]):
        super().__init__()
        self.blocks = blocks
        self.origins: dict[int, Origin] = {}
        self.alive: list[Tensor] = []  # a place in memory means one tensor as long as that lives
        self.states = 0
        self.norms: dict[str, SeenNorm] = defaultdict(SeenNorm)
        self.added: set[int | None] = set()  # layers that add to a stream
        self.widths: dict[str, int] = {}  # of activations that were called
        self.streams: dict[str, int] = {}  # width of the stream, by block
        self.writers: dict[int, set[str]] = defaultdict(set)
        self.functions: dict[int, set[str]] = defaultdict(set)  # norms that are no modules, by layer
        self.layer: int | None = None
        self.ended: str | None = None
        self.inside: SeenNorm | None = None

    # Tensors

    def origin(self, tensor: Tensor) -> Origin:
        return self.origins.get(tensor.untyped_storage()._cdata, Origin())

    def mark(self, tensor: Tensor, origin: Origin) -> None:
        self.alive.append(tensor)
        self.origins[tensor.untyped_storage()._cdata] = origin

    def stream(self, reached: frozenset[Source] = frozenset()) -> Origin:
        self.states += 1
        state = frozenset({Source("stream", str(self.states))})
        return Origin(state, reached | state)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if self.inside is not None:
            self.inside.operators.add(name)
        given = [self.origin(t) for t in floats((args, kwargs))]
        if not any(origin.reached for origin in given):
            return out
        if name in ("native_layer_norm", "_fused_rms_norm") and self.inside is None and self.layer is not None:
            self.functions[self.layer].add(name)
        made = self.combine(name, given)
        for tensor in floats(out):
            shared = any(tensor.untyped_storage()._cdata == t.untyped_storage()._cdata for t in floats((args, kwargs)))
            if not shared or func._schema.is_mutable:
                self.mark(tensor, made)
        if func._schema.is_mutable and not floats(out):
            self.mark(floats((args, kwargs))[0], made)
        return out

    def combine(self, name: str, given: list[Origin]) -> Origin:
        """What an operator makes of what it is given."""
        reached = frozenset().union(*(origin.reached for origin in given))
        if name in NONLINEAR:
            self.read_by("mlp", reached)
        with_origin = [origin for origin in given if origin.reached]
        if len(with_origin) > 1 and (name in PRODUCTS or "attention" in name or "flash" in name):
            self.read_by("attention", reached)
            for source in frozenset().union(*(origin.direct for origin in given)):
                if source.kind == "norm":
                    self.norms[source.name].attended = True
        if name in SUMS and len(given) == 2:
            for stream, branch in (given, given[::-1]):
                if any(s.kind != "projection" and s in branch.reached - branch.direct for s in stream.direct):
                    self.joined(stream.direct | branch.direct, branch.direct)
                    self.added.add(self.layer)
                    return self.stream(reached)
        direct = frozenset().union(*(origin.direct for origin in given)) if name in KEEPING else frozenset()
        return Origin(direct, reached)

    def read_by(self, feeds: Feeds, reached: frozenset[Source]) -> None:
        for source in reached if self.layer is not None else ():
            if source.kind == "norm":
                self.norms[source.name].feeds = self.norms[source.name].feeds or feeds

    def joined(self, direct: frozenset[Source], branch: frozenset[Source] = frozenset()) -> None:
        for source in direct:
            if source.kind == "norm":
                self.norms[source.name].joins = True
        if self.layer is not None:
            self.writers[self.layer] |= {source.name for source in branch if source.kind == "projection"}

    # Modules

    @contextmanager
    def hooked(self, model: nn.Module) -> Iterator[None]:
        """The hooks are there as long as the context lasts."""
        with ExitStack() as stack:
            for path, module in model.named_modules():
                pairs: tuple[Any, ...] = ()
                if path in self.blocks:
                    pairs = self.enter_block, self.leave_block
                elif is_norm(module):
                    pairs = self.enter_norm, self.leave_norm
                elif isinstance(module, (nn.Linear, Conv1D)):
                    pairs = self.enter_projection, self.leave_projection
                elif is_activation(module):
                    pairs = self.enter_activation, None
                for before, hook in zip((True, False), pairs, strict=False):
                    if hook is None:
                        continue
                    register = module.register_forward_pre_hook if before else module.register_forward_hook
                    stack.callback(register(bound(hook, path, before), with_kwargs=True).remove)
            yield

    def enter_block(self, path: str, given: list[Tensor]) -> None:
        self.layer = self.blocks[path]
        if given:
            self.streams[path] = given[0].shape[-1]
            self.mark(given[0], self.stream(self.origin(given[0]).reached))

    def leave_block(self, path: str, made: list[Tensor]) -> None:
        if made:
            origin = self.origin(made[0])
            self.joined(origin.direct)
            self.mark(made[0], self.stream(origin.reached))
        self.layer, self.ended = None, path

    def enter_norm(self, path: str, given: list[Tensor]) -> None:
        first = path not in self.norms
        seen = self.inside = self.norms[path]
        seen.after = self.ended if first else seen.after
        if len(given) == 1:
            origin = self.origin(given[0])
            seen.width = given[0].shape[-1]
            seen.given_stream.add(any(source.kind == "stream" for source in origin.direct))
            seen.after_stream |= any(source.kind == "stream" for source in origin.reached)

    def leave_norm(self, path: str, made: list[Tensor]) -> None:
        self.inside = None
        own = frozenset({Source("norm", path)})
        for tensor in made:
            self.mark(tensor, Origin(own, self.origin(tensor).reached | own))

    def enter_projection(self, path: str, given: list[Tensor]) -> None:
        for source in self.origin(given[0]).direct if given else ():
            if source.kind == "norm":
                self.norms[source.name].readers.add(path)

    def leave_projection(self, path: str, made: list[Tensor]) -> None:
        own = frozenset({Source("projection", path)})
        for tensor in made:
            self.mark(tensor, Origin(own, self.origin(tensor).reached | own))

    def enter_activation(self, path: str, given: list[Tensor]) -> None:
        if given:
            self.widths[path] = given[0].shape[-1]
            self.read_by("mlp", self.origin(given[0]).reached)


def floats(values: Any) -> list[Tensor]:
    """The tensors of floating-point numbers in whatever holds them."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def bound(hook: Any, path: str, before: bool) -> Any:
    """A hook of a module that is told the module's path, and the tensors that it is given or returns."""
    if before:
        return lambda module, args, kwargs: hook(path, floats((args, kwargs)))
    return lambda module, args, kwargs, out: hook(path, floats(out))
