r"""The loss of a causal language model in three forms that are equal in value and gradient: plain, compiled, chunked.

With logits in float32 the loss is the mean of $\mathrm{lse}(z_i) - z_{i, y_{i+1}}$ over predictions whose label is not
-100; it is transformers' `ForCausalLMLoss`. Shapes: B batch, T tokens, N = B T, D width, V vocabulary.
"""

import functools
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..data.collators import IGNORED
from ..errors import ModelError

LossForm = Literal["plain", "compiled", "chunked"]
CHUNK_BYTES = 2**26  # of one chunk of float32 logits


class _ChunkedCrossEntropy(torch.autograd.Function):
    """
    Sum of the cross entropies of `hidden @ weight.T + bias`, a chunk of rows at a time: gradients are made beside the
    loss, so no [N, V] logits are kept and no product is computed twice. `torch.nn.functional.linear_cross_entropy`
    rounds the loss itself to half precision under autocast.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        matrix = weight.to(hidden.dtype)  # V D
        needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None  # type: ignore[arg-type]
        total = hidden.new_zeros((), dtype=torch.float32)
        rows = max(1, CHUNK_BYTES // (4 * len(weight)))
        for h, y, start in zip(hidden.split(rows), labels.split(rows), range(0, len(labels), rows), strict=True):
            logits = (h @ matrix.mT).float()  # C V
            if bias is not None:
                logits += bias
            kept = y != IGNORED
            target = y.where(kept, 0)[:, None]
            lse = logits.logsumexp(-1, keepdim=True)
            total += (lse - logits.gather(-1, target)).squeeze(-1).where(kept, 0.0).sum()
            if needs_hidden or needs_weight or needs_bias:
                grad = logits.sub_(lse).exp_()  # softmax, minus one at the target
                grad.scatter_add_(-1, target, grad.new_full((), -1.0).expand_as(target))
                grad = grad.masked_fill_(~kept[:, None], 0.0)
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
                grad = grad.to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden[start : start + len(h)] = grad @ matrix
                if grad_weight is not None:
                    grad_weight += grad.mT @ h
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad).to(ctx.weight_dtype),
            None if grad_bias is None else (grad_bias * grad).to(ctx.weight_dtype),
            None,
        )


def chunked_causal_lm_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """
    The loss without [B, T, V] logits. Once differentiable.

    Args:
        hidden: [B, T, D] last hidden states.
        weight: [V, D] of the head.
        labels: [B, T], unshifted; -100 is left out.
        num_items_in_batch: what the sum is divided by; the number of predictions by default.
        bias: [V] of the head, if it has one.
    """
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    with torch.autocast(hidden.device.type, enabled=False):
        total = _ChunkedCrossEntropy.apply(hidden.flatten(0, 1), weight, bias, shifted)
    return total / ((shifted != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)


@functools.cache
def compiled_loss() -> Any:
    """The host's loss, compiled at its first call."""
    return torch.compile(ForCausalLMLoss)


def use_loss(model: PreTrainedModel, form: LossForm) -> None:
    """
    Set how a causal language model computes its loss in training mode; evaluation stays plain.

    In the chunked form the output has no logits in training mode.

    Raises:
        ModelError: the chunked form is asked of a model whose head is not one linear map.
    """
    if form == "plain":
        return
    plain = model.loss_function
    if form == "compiled":

        def loss(*args: Any, **kwargs: Any) -> Tensor:
            return (compiled_loss() if model.training else plain)(*args, **kwargs)

        model.loss_function = loss
        return
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ModelError(f"The chunked loss needs a head that is one linear map; {type(model).__name__} has {head}.")
    stock = model.forward

    @functools.wraps(stock)
    def forward(*args: Any, labels: Tensor | None = None, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        if labels is None or not model.training:
            if num_items_in_batch is not None:
                kwargs["num_items_in_batch"] = num_items_in_batch
            return stock(*args, labels=labels, **kwargs)
        outputs = model.base_model(*args, **kwargs)
        hidden = outputs[0]
        if torch.is_autocast_enabled(hidden.device.type):  # as the head would take it
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        loss = chunked_causal_lm_loss(hidden, head.weight, labels, num_items_in_batch, head.bias)
        return CausalLMOutputWithPast(loss=cast(Any, loss))

    model.forward = forward  # type: ignore[method-assign]
