r"""Direct logit attribution, and a certificate of how exact it is.

The residual stream after the last block is a sum of components $c_k$: embeddings, heads, MLPs, biases. Without a final
norm the logits are $\sum_k W c_k$, exactly. With one, the usual attribution freezes it at its $\sigma$,
$a_k = W (g \odot P c_k / \sigma(x))$, which adds up but is not what a component does: taking it away changes the logits
by $e_k = f(x) - f(x - c_k)$, where $\sigma$ is another. Shapes: C components, B batch, T tokens, D width, V vocabulary.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import ModelError
from ..models import LNFreeMixin
from ..models.normalizations import LINEAR, DynamicErf, DynamicTanh
from ..models.removal import RemovalNorm


@dataclass
class Attribution:
    """
    Args:
        names: of the components; "layer 3 head 5", "layer 3 mlp", "layer 3 biases", those of the embeddings, and
            "final norm bias" and "head bias", which are constants of the logits.
        targets: [B, T] tokens whose logits are attributed.
        logits: [B, T] of the targets.
        direct: [C, B, T] $a_k$, what each component adds to the target's logit with the final norm frozen.
        removed: [C, B, T] $e_k$, by how much the logit falls when the component is taken from the stream; NaN for the
            constants.
        largest_error: of $\\sum_k a_k$ against the model's logits, over the whole vocabulary.
        linear: whether no norm divides between the stream and the logits.
    """

    names: list[str]
    targets: Tensor
    logits: Tensor
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


@torch.no_grad()
def attribute(model: PreTrainedModel, input_ids: Tensor, targets: Tensor | None = None, **inputs: Any) -> Attribution:
    """
    What every component adds to the logit of a token, and how exact that is.

    Args:
        model: causal language model of this package (`conversion.load` makes one of a stock GPT-2 or Pythia). In
            float64 the sum is exact to about 1e-12.
        input_ids: [B, T].
        targets: [B, T] tokens; those that the model predicts by default.
        inputs: more arguments of the model, like an attention mask.

    Raises:
        ModelError: a model whose places are not declared, or that has no language-model head.
    """
    head = model.get_output_embeddings()
    if not isinstance(model.base_model, LNFreeMixin) or not isinstance(head, nn.Linear):
        raise ModelError(
            f"{type(model).__name__} is no causal language model of this package. hf_lnfree.conversion.load reads a "
            "stock GPT-2 or Pythia as one."
        )
    norm = model.base_model.get_submodule(model.base_model.sites.final_norm)
    config = model.config
    if isinstance(norm, (DynamicTanh, DynamicErf)) or config.residual_gain != "none":
        raise ModelError(
            f"A logit is no sum of what these components write (final_norm {config.final_norm!r}, residual_gain "
            f"{config.residual_gain!r}). Fold gains first (hf_lnfree.conversion.fold); a final dyt or derf cannot be "
            "attributed."
        )
    training = model.training
    model.eval()
    components, stream, logits = decompose(model, norm, input_ids, inputs)
    model.train(training)
    targets = logits.argmax(-1) if targets is None else targets
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
    return Attribution(
        names=names,
        targets=targets,
        logits=logits.gather(-1, targets[..., None]).squeeze(-1),
        direct=torch.stack(direct),
        removed=torch.stack(removed),
        largest_error=(total - logits).abs().max().item(),
        linear=isinstance(norm, LINEAR) or (isinstance(norm, RemovalNorm) and norm.finished),
    )


def decompose(
    model: PreTrainedModel, norm: nn.Module, input_ids: Tensor, inputs: dict[str, Any]
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The components [B, T, D] by name, their sum as the final norm is given it, and the logits [B, T, V]."""
    sites, base = model.base_model.sites, model.base_model
    components: dict[str, Tensor] = {}
    stream: list[Tensor] = []

    def add(name: str, part: Tensor) -> None:
        components[name] = components.get(name, 0) + part

    def embedded(name: str):
        return lambda module, args, output: add(name, output)

    def written(layer: int, name: str, heads: int | None):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            if module.bias is not None:
                add(f"layer {layer} biases", module.bias.expand_as(output))
            if heads is None:
                add(f"layer {layer} {name}", output if module.bias is None else output - module.bias)
                return
            matrix = module.weight if isinstance(module, Conv1D) else module.weight.T  # D D
            by_head = zip(args[0].chunk(heads, dim=-1), matrix.chunk(heads), strict=True)
            for head, (values, rows) in enumerate(by_head):
                add(f"layer {layer} head {head}", values @ rows)

        return hook

    with ExitStack() as stack:

        def watch(module: nn.Module, hook: Any) -> None:
            stack.callback(module.register_forward_hook(hook).remove)

        for name in sites.embeddings:
            watch(base.get_submodule(name), embedded(name))
        for layer in range(model.config.num_hidden_layers):
            block = base.get_submodule(f"{sites.blocks}.{layer}")
            for path, module in sites.writers(block).items():
                heads = model.config.num_attention_heads if path == sites.residual_writers[0] else None
                watch(module, written(layer, path.split(".")[0], heads))
        stack.callback(norm.register_forward_pre_hook(lambda module, args: stream.append(args[0])).remove)
        logits = model(input_ids, **inputs, use_cache=False).logits
    shape = stream[0].shape
    return {name: part.expand(shape) for name, part in components.items()}, stream[0], logits


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
