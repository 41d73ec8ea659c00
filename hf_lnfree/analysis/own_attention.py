"""Attention past the attention interface: a softmax in a module of the model, or torch's multi-head function.

Shapes: B batch, H heads, Q queries, K keys.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.fused import RowEntropies
from ..attention.visibility import keys_seen, seen
from .entropy import attention_entropy

SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}
LOG_NORMALISER = {torch.logsumexp, Tensor.logsumexp}  # Reformer's softmax is exp(logits - logsumexp(logits))
HEADS = (
    "num_attention_heads",
    "num_attn_heads",
    "num_heads",
    "n_heads",
    "n_head",
)  # what modules call their number of heads
HIDDEN = -9e3  # a logit below, of weight 0, is hidden: classes of transformers hide with -1e4 or the dtype's minimum
SAMPLING = "deformable"  # an attention over points that it samples, which are no keys


def softmax_logits(function: Any, args: tuple, kwargs: dict) -> Tensor | None:
    """The logits [..., K] of a softmax, or of its normaliser, over the last of at least three dimensions."""
    if function not in SOFTMAX and function not in LOG_NORMALISER:
        return None
    logits = args[0] if args else kwargs["input"]
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return logits if logits.dim() > 2 and dim in (-1, logits.dim() - 1) else None


def attends(module: nn.Module, logits: Tensor) -> bool:
    """Whether a softmax inside `module` is one over keys: by the name of its class, else by a shape [B, H, T, T]."""
    kind = type(module)
    square = logits.dim() == 4 and logits.shape[-1] == logits.shape[-2] > 1
    # Classes of transformers are named for what they are, and some have square softmaxes over streams.
    named = named_attention(module) or (square and not kind.__module__.startswith("transformers."))
    return named and SAMPLING not in kind.__name__.lower()


def named_attention(module: nn.Module) -> bool:
    """Whether the name of its class says that it is an attention."""
    name = type(module).__name__.lower()
    return "attention" in name or "attn" in name


def returns_maps(module: nn.Module) -> bool:
    """Whether a map among what it returns is one over keys: classes of transformers mix streams by such maps too."""
    return named_attention(module) or not type(module).__module__.startswith("transformers.")


def is_softmax(module: nn.Module) -> bool:
    """Whether it is nothing but a softmax, by the name of its class."""
    return "softmax" in type(module).__name__.lower()


def map_of(function: Any, logits: Tensor, result: Tensor) -> Tensor:
    """The weights [..., K], from the result of a softmax or of its normaliser."""
    if function in SOFTMAX:
        return result
    return (logits - (result if result.dim() == logits.dim() else result[..., None])).exp()


def heads_of(module: nn.Module) -> int | None:
    """How many heads an attention says it has."""
    counts = (getattr(owner, name, None) for owner in (module, getattr(module, "config", None)) for name in HEADS)
    return next((count for count in counts if isinstance(count, int)), None)


@torch.no_grad()
def rows_of_softmax(module: nn.Module, logits: Tensor, map_: Tensor, arguments: dict[str, Any]) -> RowEntropies | None:
    """
    The rows of a map [B, H, Q, K] or [B H, Q, K], known by the number of heads of its module, or of a map [B, T, T] in
    a module that knows of no heads; else None.

    Args:
        arguments: what the module's `forward` was given, by name.
    """
    heads = heads_of(module) or (1 if has_one_head(map_, arguments) else None)
    if heads is None:
        return None
    if map_.dim() == 3 and map_.shape[0] % heads == 0:
        logits, map_ = logits.unflatten(0, (-1, heads)), map_.unflatten(0, (-1, heads))
    if map_.dim() != 4 or map_.shape[1] != heads:
        return None
    hidden = logits <= torch.finfo(logits.dtype).min / 2  # a row may be hidden whole, and its map is uniform
    visible = (((map_ != 0) | (logits > HIDDEN)) & ~hidden).any(1, keepdim=True)  # NaN is not 0
    if (windows := window_mask(arguments.get("attention_mask"), map_)) is not None:
        visible = visible & windows
    support = visible.sum(-1)
    entropy = attention_entropy(map_).clamp_min(0.0).where(support > 0, 0.0)
    return RowEntropies(entropy, support, None, keys_seen(visible, map_.shape[-1]))


def has_one_head(map_: Tensor, arguments: dict[str, Any]) -> bool:
    """Whether a map is [B, T, T], B being the batch of the first tensor that the module was given."""
    first = next((value for value in arguments.values() if isinstance(value, Tensor) and value.dim() > 1), None)
    square = map_.dim() == 3 and map_.shape[1] == map_.shape[2] > 1
    return square and first is not None and len(first) == len(map_)


def window_mask(mask: Any, map_: Tensor) -> Tensor | None:
    """[B, 1, Q, K] what shifted windows see: Swin's mask [W, Q, K] adds -100, and its batch is W windows a picture."""
    if not (isinstance(mask, Tensor) and mask.is_floating_point() and mask.shape[1:] == map_.shape[2:]):
        return None
    repeats, rest = divmod(map_.shape[0], mask.shape[0])
    return None if rest else seen(mask).repeat(repeats, 1, 1)[:, None]


@torch.no_grad()
def rows_of_multi_head_attention(args: tuple, kwargs: dict) -> RowEntropies:
    """Of a call of `F.multi_head_attention_forward`, which is made again for its map: in float32, without dropout."""
    given = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs).arguments
    given |= {"need_weights": True, "average_attn_weights": False, "training": False}
    half = (torch.float16, torch.bfloat16)
    given = {k: v.float() if isinstance(v, Tensor) and v.dtype in half else v for k, v in given.items()}
    padding, mask = given.get("key_padding_mask"), given.get("attn_mask")
    if padding is not None and padding.dtype == torch.bool:  # torch warns where one mask is bool and one is not
        given["key_padding_mask"] = torch.zeros_like(padding, dtype=torch.float32).masked_fill_(padding, -torch.inf)
        if mask is not None and mask.dtype == torch.bool:
            given["attn_mask"] = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(mask, -torch.inf)
    with torch.autocast(given["query"].device.type, enabled=False):
        map_ = F.multi_head_attention_forward(**given)[1]
    assert map_ is not None
    map_ = map_ if map_.dim() == 4 else map_[None]  # B H Q K
    visible = map_.new_ones(1, 1, 1, map_.shape[-1], dtype=torch.bool)
    if padding is not None:
        visible = visible & shown(padding.view(-1, 1, 1, padding.shape[-1]), map_)
    if mask is not None:
        visible = visible & shown(mask if mask.dim() == 2 else mask.unflatten(0, (-1, map_.shape[1])), map_)
    support = visible.sum(-1).expand(*(map_.shape[0], -1, map_.shape[2]))
    entropy = attention_entropy(map_).clamp_min(0.0).where(support > 0, 0.0)
    return RowEntropies(entropy, support, None, keys_seen(visible, map_.shape[-1]))


def shown(mask: Tensor, map_: Tensor) -> Tensor:
    """Where a mask of torch's function, which hides with True or -inf, shows a key; keys of its own stand last."""
    visible = ~mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return F.pad(visible, (0, map_.shape[-1] - mask.shape[-1]), value=True)
