"""Modules put in the place of others, with what these had learned; the model becomes one that can be loaded again."""

import copy
from dataclasses import replace
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..models.replaced import New, NewNorms, ReplacedMixin, auto_map, config_class, model_class, put, read, written

LARGE = 1e4  # beside which no epsilon counts


def install(model: PreTrainedModel, news: list[New]) -> int:
    """Put everything in its place and tell the configuration; returns how many gains or biases were dropped."""
    stock, before = type(model.config), []
    if isinstance(model, ReplacedMixin):
        stock = stock.__bases__[1]
        taken = {path for new in news for path in new.paths}
        kept = [replace(old, paths=[p for p in old.paths if p not in taken]) for old in read(model.config.replacements)]
        before = [old for old in kept if old.paths]
    config, old_config = copy.deepcopy(model.config), model.config  # others may be built from the same one
    config.__class__ = config_class(stock)
    config.replacements, config.auto_map = written([*before, *news], config), auto_map(stock)
    made = type(model) if isinstance(model, ReplacedMixin) else model_class(type(model))
    dropped = sum(put_with_gains(model, path, new) for new in news for path in new.paths)
    for module in model.modules():
        if getattr(module, "config", None) is old_config:
            module.config = config  # type: ignore[assignment]  # no child
    model.__class__ = made
    replaced = cast(ReplacedMixin, model)
    replaced.tie_slopes()
    replaced.all_tied_weights_keys = {**replaced.all_tied_weights_keys, **replaced.slope_keys}
    return dropped


def put_with_gains(model: PreTrainedModel, path: str, new: New) -> int:
    """Put one module in its place, with the gain and bias of a norm; returns how many of these it has no use for."""
    gains = gain_and_bias(model.get_submodule(path), new.width) if isinstance(new, NewNorms) else {}
    module, dropped = put(model, path, new), 0
    for name, value in gains.items():
        if isinstance(held := getattr(module, name, None), nn.Parameter):
            held.data.copy_(value)
        else:
            dropped += 1
    return dropped


def gain_and_bias(norm: nn.Module, width: int) -> dict[str, torch.Tensor]:
    """
    Gain and bias, [D] each, of a norm that has them, by what it does: some families keep the gain less 1. Nothing of a
    norm on the meta device.
    """
    parameters = list(norm.parameters())
    if not parameters or parameters[0].is_meta:
        return {}
    probe = copy.deepcopy(norm).double()
    x = torch.ones(width, dtype=torch.float64, device=parameters[0].device)  # of mean 0, as it is when it is filled
    x[1::2] = -1
    if width % 2:
        x[0] = 2
        x[-1] = -1
    x = x / x.square().mean().sqrt()
    with torch.no_grad():
        bias = probe(torch.zeros_like(x)[None])[0]
        gain = (probe(LARGE * x[None])[0] - bias) / x
    weight = getattr(norm, "weight", None)
    if weight is not None and torch.allclose(weight.double(), gain, rtol=1e-3, atol=1e-5):
        gain = weight.data  # without what was rounded
    return {"weight": gain, "bias": bias} if len(parameters) > 1 else {"weight": gain}
