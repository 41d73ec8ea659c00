r"""Entropy regularisation: heads are kept near a learned share of the largest entropy, without their T x T maps.

After arXiv 2410.13060, whose penalty grows with batch and length; here it is a mean over both, so that a weight means
the same at another size.
"""

import math
from contextlib import AbstractContextManager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..analysis.nonfinite import whole
from ..attention.calls import AttentionCall, attention_calls
from ..attention.fused import attention_entropy_with_grad, head_entropy_with_grad, row_supports
from ..attention.masks import logit_arguments
from ..errors import AttentionError, SettingsError
from .arguments import LNFreeTrainingArguments
from .procedure import Procedure

Form = Literal["heads", "rows"]


class EntropyTargets(nn.Module):
    """A learned share of the largest entropy for every head; a child of the model while it is trained."""

    def __init__(self, layers: int, heads: int, start: float):
        super().__init__()
        # A vector a layer: weight decay is for matrices.
        self.shares = nn.ParameterList(torch.full((heads,), float(start)) for _ in range(layers))


class EntropyRegularization(Procedure):
    r"""
    Adds a penalty on head entropies to the training loss.

    For L layers of H heads with learned shares $\theta_{lh}$; $d$ counts where $|d|$ exceeds the tolerance $\gamma$:

    - "heads": $\frac{\lambda}{LH} \sum d_{lh}^2$, $d_{lh} = \bar H_{lh} / \bar H_{max} - \theta_{lh}$, with
      the mean $\bar H_{lh}$ over batch and rows, and that of $\ln n_i$ over the $n_i$ keys of a row, the causal bound.
    - "rows": $\frac{\lambda}{LH} \sum_{lhbi} d_{lhbi}^2$, $d_{lhbi} = H_{lhbi} - \theta_{lh} \ln T$ in nats (tolerance
      $\gamma \ln T$): a sum over rows, against a bound that a causal row does not reach, as published.

    Args:
        weight: $\lambda$.
        tolerance: $\gamma$, a share of the maximum.
        target: where each learned $\theta$ starts.
        form: one of the two.
    """

    def __init__(self, weight: float, tolerance: float = 0.1, target: float = 0.5, form: Form = "heads"):
        super().__init__()
        if form not in get_args(Form):
            raise SettingsError(f"form={form!r} is not known. Allowed: {', '.join(map(repr, get_args(Form)))}.")
        for name, value in {"weight": weight, "tolerance": tolerance, "target": target}.items():
            if not (math.isfinite(value) and value >= 0):
                raise SettingsError(f"entropy_{name} must be a finite number from 0 on, got {value}.")
        self.weight, self.tolerance, self.target, self.form = weight, tolerance, target, form
        self.terms: dict[nn.Module, Tensor] = {}
        self.targets: EntropyTargets | None = None

    @classmethod
    def of(cls, args: LNFreeTrainingArguments) -> "EntropyRegularization":
        return cls(args.entropy_weight, args.entropy_tolerance, args.entropy_target, args.entropy_form)

    def adapt(self, model: PreTrainedModel) -> PreTrainedModel:
        config = model.config
        model.entropy_targets = EntropyTargets(config.num_hidden_layers, config.num_attention_heads, self.target)
        self.targets = model.entropy_targets
        return model

    def attach(self, trainer: Any, steps: int) -> None:
        if trainer.args.torch_compile:
            raise SettingsError(
                "Entropies are taken out of attention calls, which torch_compile hides: leave it or entropy_weight out."
            )
        trainer.penalties.append(self.penalty)

    def while_training(self) -> AbstractContextManager[None]:
        return attention_calls(self.after)

    def after(self, call: AttentionCall) -> None:
        """Keeps the penalty of a call's heads."""
        if call.module is not None and call.module.training and torch.is_grad_enabled():
            term = self.term(call)  # a recomputation makes it once more: its tensors are asked for in backward
            if not call.recomputed:
                self.terms[call.module] = term

    def term(self, call: AttentionCall) -> Tensor:
        """Of one layer, before the weight: a mean over its heads, in the form "rows" of sums over batch and rows."""
        if call.sinks is not None:
            raise AttentionError(
                f"{type(call.module).__name__} has attention sinks, under which entropies carry no gradient here. "
                "Train it without --entropy_weight."
            )
        assert self.targets is not None
        share = self.targets.shares[call.module.layer_idx]  # type: ignore[union-attr, index]
        arguments = logit_arguments(call)
        if self.form == "rows":
            top = math.log(call.key.shape[2])
            deviation = attention_entropy_with_grad(**arguments) - share[:, None] * top  # B H T
            return (deviation.square() * (deviation.abs() > self.tolerance * top)).sum() / len(share)
        mask, causal = arguments["attention_mask"], arguments["is_causal"]
        support = row_supports(call.query, call.key, mask, causal)  # B or 1, H or 1, T
        bound = support[support > 0].to(share.dtype).log().mean()
        deviation = head_entropy_with_grad(**arguments) / bound - share  # H
        return (deviation.square() * (deviation.abs() > self.tolerance)).mean()

    def penalty(self) -> Tensor:
        """The penalty of the last forward pass, with its weight."""
        terms, self.terms = self.terms, {}
        return self.weight * torch.stack(list(terms.values())).mean()

    def finish(self, model: Any) -> PreTrainedModel:
        del model.entropy_targets
        return model

    def report(self) -> dict[str, Any]:
        assert self.targets is not None
        found = [[round(value, 4) for value in whole(share).tolist()] for share in self.targets.shares]
        settings = {"weight": self.weight, "tolerance": self.tolerance, "target": self.target, "form": self.form}
        return {"entropy_regularization": settings | {"targets": found}}
