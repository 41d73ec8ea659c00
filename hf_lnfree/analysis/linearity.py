r"""Direct logit attribution, and a certificate of how exact it is.

The residual stream after the last block is a sum of components $c_k$: embeddings, heads, MLPs, biases. Without a final
norm the logits are $\sum_k W c_k$, exactly. With one, the usual attribution freezes it at its $\sigma$,
$a_k = W (g \odot P c_k / \sigma(x))$, which adds up but is not what a component does: taking it away changes the logits
by $e_k = f(x) - f(x - c_k)$, where $\sigma$ is another. Shapes: C components, B batch, T tokens, D width, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import ModelError
from ..models import LNFreeMixin
from ..models.normalizations import LINEAR, DynamicErf, DynamicTanh
from ..models.removal import RemovalNorm
from ..models.sites import Projection
from ..models.stabilizers import EmbeddingScale
from ..tables import Table, html, number
from .modes import evaluation

if TYPE_CHECKING:
    from .drawing import NotebookFigure


@dataclass
class Attribution:
    r"""
    Args:
        names: of the components; "layer 3 head 5", "layer 3 mlp", "layer 3 biases", those of the embeddings, and
            "final norm bias" and "head bias", which are constants of the logits.
        targets: [B, T] tokens whose logits are attributed.
        logits: [B, T] of the targets.
        probability: [B, T] of the targets.
        rank: [B, T] of the targets among all tokens, 1 for the one that the model predicts.
        direct: [C, B, T] $a_k$, what each component adds to the target's logit with the final norm frozen.
        removed: [C, B, T] $e_k$, by how much the logit falls when the component is taken from the stream; NaN for the
            constants.
        largest_error: of $\sum_k a_k$ against the model's logits, over the whole vocabulary.
        linear: whether no norm divides between the stream and the logits.
    """

    names: list[str]
    targets: Tensor
    logits: Tensor
    probability: Tensor
    rank: Tensor
    direct: Tensor
    removed: Tensor
    largest_error: float
    linear: bool

    def frozen_error(self, position: int | None = None) -> dict[str, float]:
        r"""
        How far frozen attributions $a$ are from the true direct effects $e$, at one position or at all of them:
        `relative` $\|a - e\| / \|e\|$ over the components, and the `largest` difference of a logit.
        """
        places = slice(None) if position is None else [position]
        direct, removed = self.direct[..., places], self.removed[..., places]
        there = ~removed.isnan()
        difference = (direct - removed)[there]
        return {
            "relative": (difference.norm() / removed[there].norm()).item(),
            "largest": difference.abs().max().item(),
        }

    def grid(self, position: int = -1, sequence: int = 0) -> tuple[Tensor, list[str]]:
        """[layers, columns] of `direct` at one position, NaN where a layer has no such component, and the columns."""
        cells = {}
        for name, value in zip(self.names, self.direct[:, sequence, position].tolist(), strict=True):
            if name.startswith("layer "):
                _, layer, column = name.split(" ", 2)
                cells[int(layer), column.removeprefix("head ")] = value
        columns = list(dict.fromkeys(column for _, column in cells))
        columns.sort(key=lambda column: (not column.isdigit(), column != "mlp"))  # heads as they come, then the MLP
        layers = range(max(layer for layer, _ in cells) + 1)
        return torch.tensor([[cells.get((i, column), torch.nan) for column in columns] for i in layers]), columns

    def at(self, position: int = -1, sequence: int = 0) -> list[tuple[str, float, float]]:
        """(component, direct, removed) at one position, the largest first."""
        columns = (self.direct[:, sequence, position].tolist(), self.removed[:, sequence, position].tolist())
        rows = zip(self.names, *columns, strict=True)
        return sorted(rows, key=lambda row: -abs(row[1]))

    def certificate(self, position: int = -1) -> str:
        """How exactly the components add up, and how far those at one position are from true direct effects."""
        several = self.logits.shape[1] > 1
        said = (
            f"The components add up to the logits with a largest error of {number(self.largest_error, '.1e')} over the "
            f"whole vocabulary{' and all positions' if several else ''}."
        )
        if self.linear:
            return f"{said} No norm divides before the logits: these are the direct effects themselves."
        errors = self.frozen_error(position), self.frozen_error()
        here, everywhere = (number(100 * error["relative"], ".1f") for error in errors)
        return (
            f"{said} The final norm was frozen at its scale. Against the logits without a component, where the norm is "
            f"computed anew, frozen attributions are off by {here} % here (root mean square over the components; up to "
            f"{number(errors[0]['largest'], '.2g')}){f' and by {everywhere} % over all positions' if several else ''}."
        )

    def verdict(self, position: int = -1, sequence: int = 0) -> str:
        """Of how many components a logit is the sum, and the certificate of that."""
        logit, token = number(self.logits[sequence, position].item(), ".4f"), int(self.targets[sequence, position])
        said = f"The logit {logit} of token {token} is the sum of {len(self.names)} components."
        return f"{said} {self.certificate(position)}"

    def largest(self, count: int = 10, position: int = -1, sequence: int = 0) -> Table:
        """
        The components with the largest shares in a logit, the sum of the others, and the logit.

        What the logit loses without a component has a column where it is something else.
        """
        components = self.at(position, sequence)
        rows = [[name, number(direct, "+.4f"), signed(removed)] for name, direct, removed in components[:count]]
        if others := [direct for _, direct, _ in components[count:]]:
            rows.append([f"the other {len(others)}", number(math.fsum(others), "+.4f"), ""])
        rows.append(["all together, the logit", number(self.logits[sequence, position].item(), "+.4f"), ""])
        columns = 2 if self.linear else 3
        header = ["component", "adds to the logit", "logit lost without it"]
        note = "Components by what they add to the logit, the largest first."
        return Table(header[:columns], [row[:columns] for row in rows], note, foot=2 if others else 1)

    def plot(self, position: int = -1, sequence: int = 0, name: str = "") -> "NotebookFigure":
        """
        What every head, MLP and bias adds to the logit at one position; a matplotlib `Figure`.

        Args:
            name: its title.
        """
        from .drawing import attribution_grid

        title = name or f"logit of token {int(self.targets[sequence, position])}"
        return attribution_grid(*self.grid(position, sequence), title)

    def __repr__(self) -> str:
        return f"<Attribution {self.verdict()}>"

    def _repr_html_(self) -> str:
        return html(self.largest(), self.verdict())


def signed(removed: float) -> str:
    """With its sign; nothing for a constant, which is not taken away."""
    return "" if math.isnan(removed) else number(removed, "+.4f")


@torch.no_grad()
def attribute(
    model: PreTrainedModel,
    input_ids: Tensor,
    targets: Tensor | None = None,
    *,
    position: int | None = None,
    **inputs: Any,
) -> Attribution:
    """
    What every component adds to the logit of a token, and how exact that is.

    Args:
        model: causal language model of this package (`conversion.load` makes one of a stock checkpoint). In
            float64 the sum is exact to about 1e-12.
        input_ids: [B, T].
        targets: [B, T] tokens; those that the model predicts by default.
        position: attribute the logits of this one alone, so that T is 1 in what is returned; all of them by default.
        inputs: more arguments of the model, like an attention mask.

    Raises:
        ModelError: a model whose places are not declared, or that has no language-model head.
    """
    head, base = model.get_output_embeddings(), model.base_model
    stacks = base.stacks if isinstance(base, LNFreeMixin) else ()
    if len(stacks) != 1 or not stacks[0].embeddings or not isinstance(head, nn.Linear):
        raise ModelError(
            f"{type(model).__name__} is no causal language model of this package. hf_lnfree.conversion.load reads "
            "a stock checkpoint as one."
        )
    norm = base.get_submodule(str(stacks[0].final_norm))
    config = model.config
    if isinstance(norm, (DynamicTanh, DynamicErf)) or config.residual_gain != "none":
        raise ModelError(
            f"A logit is no sum of what these components write (final_norm {config.final_norm!r}, residual_gain "
            f"{config.residual_gain!r}). Fold gains first (hf_lnfree.conversion.fold); a final dyt or derf cannot be "
            "attributed."
        )
    with evaluation(model):
        components, stream, logits = decompose(model, norm, input_ids, inputs)
    targets = logits.argmax(-1) if targets is None else targets
    if position is not None:
        targets, stream, logits = targets[:, [position]], stream[:, [position]], logits[:, [position]]
        components = {name: part[:, [position]] for name, part in components.items()}
    rows = head.weight[targets]  # B T D
    frozen, constant = linearised(norm, stream)
    direct, removed, total = [], [], torch.zeros_like(logits)
    for part in components.values():
        image = frozen(part)
        direct.append((image * rows).sum(-1))
        removed.append(((norm(stream) - norm(stream - part)) * rows).sum(-1))
        total += image @ head.weight.T
    names = list(components)
    for name, shift in (("final norm bias", constant), ("head bias", head.bias)):
        if shift is not None:
            names.append(name)
            in_logits = head.weight @ shift if name == "final norm bias" else shift
            direct.append(in_logits[targets])
            removed.append(torch.full_like(direct[-1], torch.nan))
            total += in_logits
    of_targets = logits.gather(-1, targets[..., None])
    return Attribution(
        names=names,
        targets=targets,
        logits=of_targets.squeeze(-1),
        probability=(of_targets - logits.logsumexp(-1, keepdim=True)).exp().squeeze(-1),
        rank=(logits > of_targets).sum(-1) + 1,
        direct=torch.stack(direct),
        removed=torch.stack(removed),
        largest_error=(total - logits).abs().max().item(),
        linear=isinstance(norm, LINEAR) or (isinstance(norm, RemovalNorm) and norm.finished),
    )


def decompose(
    model: PreTrainedModel, norm: nn.Module, input_ids: Tensor, inputs: dict[str, Any]
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The components [B, T, D] by name, their sum as the final norm is given it, and the logits [B, T, V]."""
    components, stream = Components(), []
    with ExitStack() as stack:
        for module, hook in component_hooks(model, components):
            stack.callback(module.register_forward_hook(hook).remove)
        stack.callback(norm.register_forward_pre_hook(lambda module, args: stream.append(args[0])).remove)
        logits = model(input_ids, **inputs, use_cache=False).logits
    return {name: part.expand(stream[0].shape) for name, part in components.items()}, stream[0], logits


class Components(dict[str, Tensor]):
    """What was written into the residual stream, by name; what is written twice under one name is added up."""

    def add(self, name: str, part: Tensor) -> None:
        """Add a part [B, T, D] to what has that name."""
        self[name] = self.get(name, 0) + part


def component_hooks(model: PreTrainedModel, components: Components) -> Iterator[tuple[nn.Module, Callable]]:
    """Every module that writes into the stream, and the forward hook that keeps what it writes."""
    base, heads = model.base_model, model.config.num_attention_heads
    (stack,) = cast(LNFreeMixin, base).stacks
    scaled = None if stack.embedding_dropout is None else base.get_submodule(stack.embedding_dropout)
    scale = scaled.scale if isinstance(scaled, EmbeddingScale) else None
    for name in stack.embeddings:
        yield base.get_submodule(name), embedded(name, components, scale)
    for layer, block in enumerate(stack.block_list(base)):
        for name, branch in stack.branches(block).items():
            by_head = heads if name == "attention" else None
            yield branch.writer_module(block), written(f"layer {layer} {name}", layer, by_head, components)


def embedded(name: str, components: Components, scale: Tensor | None) -> Callable:
    """Keeps what an embedding adds, times the learned scale of all of them."""
    return lambda module, args, output: components.add(name, output if scale is None else scale * output)


def written(name: str, layer: int, heads: int | None, components: Components) -> Callable:
    """Keeps what a projection adds: the values of each head by themselves, and its bias apart."""

    def hook(module: Projection, args: tuple, output: Tensor) -> None:
        if module.bias is not None:
            components.add(f"layer {layer} biases", module.bias.expand_as(output))
        if heads is None:
            components.add(name, output if module.bias is None else output - module.bias)
            return
        matrix = module.weight if isinstance(module, Conv1D) else module.weight.T  # D D
        for head, (values, rows) in enumerate(zip(args[0].chunk(heads, dim=-1), matrix.chunk(heads), strict=True)):
            components.add(f"layer {layer} head {head}", values @ rows)

    return hook


def linearised(norm: nn.Module, stream: Tensor) -> tuple[Any, Tensor | None]:
    """A final norm as a linear map with its scale frozen at `stream`, and its constant [D]."""
    if isinstance(norm, nn.Identity):
        return (lambda part: part), None
    bias = getattr(norm, "bias", None)
    zero = torch.zeros(()) if bias is None else bias
    centres = isinstance(norm, nn.LayerNorm)
    centred = stream - stream.mean(-1, keepdim=True) if centres else stream
    gain = getattr(norm, "weight", None)
    gain = torch.ones_like(stream[0, 0]) if gain is None else gain
    # The norm's own output tells its scale, whatever it is made of: sigma, or a fixed one.
    output = norm(stream) - zero
    scale = (output * gain * centred).sum(-1, keepdim=True) / (gain * centred).square().sum(-1, keepdim=True)

    def frozen(part: Tensor) -> Tensor:
        return gain * (part - part.mean(-1, keepdim=True) if centres else part) * scale

    return frozen, bias
