r"""A model of ours as a stock model that anyone loads without this package, where the stock class can hold it.

Stock classes have a LayerNorm in every place. One that must do nothing gets a huge $\epsilon$ and the gain
$\sqrt\epsilon$: $(x - \bar x) / \sqrt{\mathrm{var}(x) + \epsilon} \cdot \sqrt\epsilon$ is $x - \bar x$ to float32's
precision while $\mathrm{var}(x) < 10^{-7} \epsilon$; `ENCODINGS` has the pairs. Its centring does
nothing either where the mean of the stream is zero, or where nothing reads it; any other model is widened first. Stock
heads have no bias $c$: with a final bias of ones, $(W + c \mathbf 1^\top / D)(P x + \mathbf 1)$ is
$W P x + W \mathbf 1 + c$, and $W \mathbf 1$ is taken out of $W$ before.
"""

import copy
import math
from dataclasses import fields
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..choices import Encoding
from ..errors import ModelError
from ..models.activations import FUSED
from ..models.configuration_lnfree import LNFreeConfigMixin
from .families import Family, blank, family_of, own_weights, placed, require_plain, stack_of
from .folding import fold
from .norm_sites import LEFT, as_linear, beginnings, norm_sites
from .planning import eps_of
from .stabilizers import has_linear_stabilizers
from .widening import without_mean

# Epsilon and gain of a LayerNorm that does nothing. "published": of the norm-free GPT-2s on the Hub, whose loaders set
# that epsilon themselves. "power_of_two": exact in bfloat16 too, and for streams of any size.
ENCODINGS: dict[Encoding, tuple[float, float]] = {"published": (1e12, 1e6), "power_of_two": (2.0**60, 2.0**30)}
STOCK_SLOPE = 0.01  # of transformers' "leaky_relu"


@torch.no_grad()
def to_stock(
    model: PreTrainedModel, dtype: torch.dtype | None = None, encoding: Encoding | None = None
) -> PreTrainedModel:
    """
    The stock model with the outputs of one of ours.

    Args:
        model: with LayerNorm everywhere, folded norms everywhere, or none anywhere (a finished removal counts as none).
            One that was trained without norms becomes wider by one dimension a head (`without_mean`).
        dtype: of the new weights; that of the model by default.
        encoding: of LayerNorms that do nothing, see `ENCODINGS`; "published" by default in float32; bfloat16
            cannot hold its gain, and float64 is precise enough to see its epsilon.

    Raises:
        ModelError: the stock class cannot hold the model; the message lists every reason.
    """
    require_plain(model)
    model = folded_where_linear(model)
    dtype = dtype or model.dtype
    family = family_of(model.config.model_type)
    kinds = {site.kind for site in norm_sites(model)}
    encoding = encoding or ("published" if dtype == torch.float32 else "power_of_two")
    eps, gain = ENCODINGS[encoding]
    if reasons := obstacles(model, kinds, dtype):
        listed = "".join(f"\n- {reason}" for reason in reasons)
        raise ModelError(f"A stock {family.stock} cannot hold this model:{listed}")
    if dtype == torch.bfloat16 and encoding == "published" and kinds == {"none"}:
        raise ModelError("bfloat16 cannot hold the gain of 1e6: take encoding 'power_of_two', or float32.")
    centres = model.config.stock_norm == "layernorm"
    if kinds == {"none"} and centres and reads_mean(model):
        model = without_mean(model)
    sites = norm_sites(model)
    config = stock_config(model, family)
    if kinds == {"none"}:
        setattr(config, cast(str, family.eps_field), eps)
    state = model.state_dict()
    for site in sites:
        if site.kind in ("none", "rmspre"):
            ones = torch.ones(config.hidden_size)
            state[f"{site.name}.weight"] = ones * (gain if site.kind == "none" else 1.0)
            if centres:
                state[f"{site.name}.bias"] = 0 * ones
    if (bias := state.pop("lm_head.bias", None)) is not None:
        config.tie_word_embeddings = False
        weight = state["lm_head.weight"].double()
        extra = bias.double()[:, None] / config.hidden_size - weight.mean(1, keepdim=True)
        state["lm_head.weight"] = weight + extra
        state[f"{sites[-1].name}.bias"] = torch.ones(config.hidden_size)
    stock = blank(family.stock_class(type(model)), config, dtype, own_weights(model))
    stock.load_state_dict(state)
    if model.can_generate():
        stock.generation_config = copy.deepcopy(model.generation_config)
    return placed(stock, model.device).train(model.training)


def folded_where_linear(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or with everything folded that is one linear map."""
    linear = set(LEFT) - {model.config.stock_norm}
    before = [site for site in norm_sites(model) if not site.behind]
    norms = any(site.fixed_scale is not None or site.kind in linear for site in before)
    return fold(model)[0] if norms or model.config.lm_head_bias or has_linear_stabilizers(model.config) else model


def stock_config(model: PreTrainedModel, family: Family):
    """The fields of the stock configuration."""
    ours = {f.name for f in fields(LNFreeConfigMixin)} | {"auto_map", "model_type", "architectures"}
    values = {name: value for name, value in model.config.to_dict().items() if name not in ours}
    activation = model.config.block_activations[0]
    values[model.config.activation_field] = "linear" if activation == "identity" else activation
    config = family.stock_config(**values)
    for name, value in family.read_elsewhere(config).items():
        setattr(config, name, value)
    return config


def reading_recipe(stock: PreTrainedModel) -> str | None:
    """How others read a stock model whose LayerNorms do nothing; None for one whose norms normalise."""
    eps = eps_of(family_of(stock.config.model_type), stock.config)
    if eps not in [pair[0] for pair in ENCODINGS.values()]:
        return None
    recipe = f"Its LayerNorms do nothing: their epsilon is {eps:g} and their gain {math.sqrt(eps):g}. It loads as it is"
    if eps == ENCODINGS["published"][0]:
        return f"{recipe}, and by loaders that set ln.eps = 1e12, or divide gains by 1e6 and put identities in place."
    return f"{recipe}; loaders that set another epsilon, or divide gains by 1e6, read it wrongly: --encoding published."


def obstacles(model: PreTrainedModel, kinds: set[str], dtype: torch.dtype) -> list[str]:
    """Every reason why the stock class cannot hold the model."""
    config, reasons = model.config, []
    activations = set(config.block_activations)
    if len(activations) > 1:
        reasons.append(f"its layers have different activations ({', '.join(sorted(activations))}); stock has one field")
    if unknown := activations & {"learnable_leaky_relu", "prelu", "gelu_relu"}:
        reasons.append(f"{', '.join(sorted(unknown))} is no activation of transformers, or a different one")
    norm = {"layernorm": "a LayerNorm", "rmsnorm": "an RMSNorm"}[config.stock_norm]
    if unknown := kinds - {"none", config.stock_norm, "rmspre", "removal"}:
        reasons.append(f"{', '.join(sorted(unknown))} is nothing that {norm} can be")
    if kinds == {"none"} and (family_of(config.model_type).eps_field is None or config.stock_query_key_norm):
        reasons.append("its norms do nothing, and the stock class has no epsilon that would disable these alone")
    if config.lm_head_bias and config.stock_norm == "rmsnorm":
        reasons.append("its head has a bias")
    if FUSED in activations:
        reasons.append("an MLP of it is one matrix")
    if config.query_key_norm != config.stock_query_key_norm:
        reasons.append(f"its queries and keys are {'' if config.query_key_norm else 'not '}normalised")
    if config.attention_softcap is not None:
        reasons.append("its attention logits are capped")
    if "leaky_relu" in activations and config.negative_slope != STOCK_SLOPE:
        reasons.append(f"leaky_relu has slope {config.negative_slope} here and {STOCK_SLOPE} in transformers")
    if len(kinds) > 1:
        reasons.append(f"its norms differ ({', '.join(sorted(kinds))}); stock has one epsilon for all of them")
    if kinds == {"removal"}:
        reasons.append("the removal of its norms has begun and is not finished")
    if kinds == {"rmspre"} and config.stock_norm == "layernorm" and reads_mean(model, writers_only=True):
        reasons.append("'rmspre' divides by the root mean square, stock by the deviation, and the stream has a mean")
    if kinds == {"none"} and dtype == torch.float16:
        reasons.append(
            "float16 ends at 65504, and a LayerNorm that does nothing needs gains of 1e6 or more: take bfloat16"
        )
    return reasons


def reads_mean(model: PreTrainedModel, writers_only: bool = False) -> bool:
    """Whether the outputs depend on the mean of the residual stream: it is not zero, and something reads it."""
    sites = norm_sites(model)
    readers = [as_linear(reader) for site in sites for reader in site.readers]
    if not writers_only and all(no_mean(weight, dim=1) for weight in readers):
        return False
    base, stack = model.base_model, stack_of(model)
    written = [start.reshape(-1, start.shape[-1]).T for start in beginnings(model, stack)]
    biases = []
    for block in stack.block_list(base):
        for branch in stack.branches(block).values():
            writer = branch.writer_module(block)
            written.append(as_linear(writer))
            biases += [] if writer.bias is None else [writer.bias[:, None]]
    return not all(no_mean(weight, dim=0) for weight in written + biases)


def no_mean(weight: Tensor, dim: int) -> bool:
    """Whether the sums are zero, but for rounding to float32, or to what the weights are in."""
    sums, sizes = weight.double().sum(dim).abs(), weight.double().abs().sum(dim)
    rounding = 16 * max(torch.finfo(dtype).eps for dtype in (weight.dtype, torch.float32))
    return bool((sums <= rounding * sizes).all())
