"""A causal language model as an ONNX graph with dynamic batch and length, with or without a key-value cache.

Needs the extra `onnx` (onnx, onnxscript); names of inputs and outputs are those of transformers' own exports.
"""

import copy
import logging
import warnings
from collections import Counter
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import DynamicCache, GPT2LMHeadModel, PreTrainedModel

from ..errors import ModelError
from .families import stack_of
from .norm_sites import norm_sites

# Operators that are no linear map of the activations; a Div counts where its divisor is computed.
NONLINEAR = {
    *("Softmax", "Relu", "LeakyRelu", "PRelu", "Elu", "Gelu", "Erf", "Tanh", "Sigmoid", "Softplus", "Exp", "Log"),
    *("Pow", "Sqrt", "Reciprocal", "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"),
}


# Of the argument that transformers 5.24 renamed.
CACHE = next(name for name in ("cache", "past_key_values") if name in signature(GPT2LMHeadModel.forward).parameters)


class _Plain(nn.Module):
    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        kept = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": False}
        return self.model(input_ids=input_ids, **kept).logits


class _Cached(_Plain):
    def forward(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        cache = DynamicCache(ddp_cache_data=list(past))
        kept = {"attention_mask": attention_mask, "position_ids": position_ids, CACHE: cache, "use_cache": True}
        out = self.model(input_ids=input_ids, **kept)
        layers: Any = cache.layers
        return out.logits, [(layer.keys, layer.values) for layer in layers]


def export_onnx(model: PreTrainedModel, path: str | Path, with_cache: bool = False) -> Counter[str]:
    """
    Write `path` (an .onnx file; weights beyond 2 GB stand in a file beside it).

    Inputs are `input_ids` [B, T], `attention_mask` [B, P + T], `position_ids` [B, T] and with a cache
    `past_key_values.N.key` and `.value` [B, H, P, d], where P may be 0; outputs `logits` [B, T, V] and
    `present.N.key` and `.value` [B, H, P + T, d].

    Args:
        model: causal language model in float32 or float64; half precision is exported as float32.
        with_cache: one token, or several, after P that stand in a cache.

    Returns:
        How many of which nonlinear operators the graph has.

    Raises:
        ModelError: another kind of model, the packages are not there, or a norm is half removed.
    """
    if not type(model).__name__.endswith("ForCausalLM"):
        raise ModelError(f"Only causal language models are exported to ONNX, and this is a {type(model).__name__}.")
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ModelError(f"ONNX needs packages of its own: pip install 'hf_lnfree[onnx]' ({error}).") from error
    stack_of(model)  # of an encoder-decoder there are two
    if removed := [site.name for site in norm_sites(model) if site.kind == "removal"]:
        raise ModelError(
            f"{removed[0]} is being removed: finish its schedule and fold the model before it is exported."
        )
    model = copy.deepcopy(model).eval()
    if model.dtype in (torch.float16, torch.bfloat16):
        model.float()
    arguments, names, axes = inputs(model, with_cache)
    layers = range(model.config.num_hidden_layers) if with_cache else ()
    parts = [(index, part) for index in layers for part in ("key", "value")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        for name in ("torch.onnx._internal.exporter._registration", "onnxscript.optimizer._constant_folding"):
            logging.getLogger(name).setLevel(logging.ERROR)
        program = torch.onnx.export(
            (_Cached if with_cache else _Plain)(model).eval(),
            arguments,
            dynamo=True,
            verbose=False,
            input_names=names + [f"past_key_values.{index}.{part}" for index, part in parts],
            output_names=["logits"] + [f"present.{index}.{part}" for index, part in parts],
            dynamic_shapes=axes,
        )
    assert program is not None
    program.save(path)
    return nonlinear_operators(onnx.load(path, load_external_data=False))


def inputs(model: PreTrainedModel, with_cache: bool) -> tuple[tuple, list[str], dict[str, Any]]:
    """Example arguments, their names and their dynamic axes."""
    batch, length, past, total = Dim("batch"), Dim("length"), Dim("past"), Dim("total")
    config = model.config
    before, ids = 5 if with_cache else 0, torch.ones(2, 4, dtype=torch.long)
    arguments: list[Any] = [
        ids,
        torch.ones(2, before + 4, dtype=torch.long),
        torch.arange(before, before + 4) + 0 * ids,
    ]
    names = ["input_ids", "attention_mask", "position_ids"]
    axes: dict[str, Any] = {name: {0: batch, 1: length} for name in names}
    if with_cache:
        heads, layers = config.num_attention_heads, config.num_hidden_layers
        shape = (2, heads, before, config.hidden_size // heads)
        # No tensor twice: the exporter would take two inputs for one.
        arguments.append([tuple(torch.zeros(shape, dtype=model.dtype) for _ in range(2)) for _ in range(layers)])
        axes["attention_mask"] = {0: batch, 1: total}
        axes["past"] = [({0: batch, 2: past}, {0: batch, 2: past})] * layers
    return tuple(arguments), names, axes


def nonlinear_operators(graph: Any) -> Counter[str]:
    """The nonlinear operators of an ONNX model by name."""
    nodes = graph.graph.node
    constant = {tensor.name for tensor in graph.graph.initializer}
    constant |= {name for node in nodes if node.op_type == "Constant" for name in node.output}
    counted = (
        n.op_type for n in nodes if n.op_type in NONLINEAR or (n.op_type == "Div" and n.input[1] not in constant)
    )
    return Counter(sorted(counted))
