"""The study's configuration fields, declared once and shared by every model family.

`norm`, `final_norm`, the activation and its slope, `linear_bias` and `residual_init` are plain fields of a
`PreTrainedConfig`; this file travels with every checkpoint.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args, get_origin

from transformers import PreTrainedConfig

from .activations import activation_names
from .errors import ConfigurationError
from .normalizations import normalization_names

# What people write for fields of the study whose names are spelt otherwise; near misses are found by their letters.
OTHER_NAMES = {
    **dict.fromkeys(("normalization", "normalisation", "norm_type", "norms"), "norm"),
    **dict.fromkeys(("layers_norm", "norm_layers"), "layer_norms"),
    **dict.fromkeys(("slope", "leaky_slope", "leaky_relu_slope"), "negative_slope"),
    "softcap": "attention_softcap",
    "qk_norm": "query_key_norm",
}
LONGEST_SLIP = 2  # characters that a near miss is longer or shorter by
# An activation of the other family's name, or of none.
ACTIVATION_NAMES = ("act", "activation", "activation_fn", "activation_function", "hidden_act", "hidden_activation")


DECODER_HEADS = ("CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")


def auto_map(
    modeling: str, prefix: str, heads: Sequence[str] = DECODER_HEADS, others: Mapping[str, str] | None = None
) -> dict[str, str]:
    """
    Where the Auto classes find a family in the code beside a checkpoint: all of it in the file `modeling`.

    Args:
        heads: whose Auto classes end as their own names do.
        others: end of the name of an Auto class -> end of the name of a class, where the two differ.
    """
    modeling = f"{modeling}.{prefix}"
    ends = {f"For{head}": f"For{head}" for head in heads} | dict(others or {})
    return {
        "AutoConfig": f"{modeling}Config",
        "AutoModel": f"{modeling}Model",
        **{f"AutoModel{auto}": f"{modeling}{own}" for auto, own in ends.items()},
    }


# At run time the base of the mixin is the stock class that it stands before.
if TYPE_CHECKING:
    Base = PreTrainedConfig
else:
    Base = object


@dataclass(kw_only=True, repr=False)
class LNFreeConfigMixin(Base):
    r"""
    Fields of the normalisation-free study (arXiv 2410.09637), the same for every family.

    Args:
        norm (`str`, defaults to `"none"`):
            What stands where the stock block has its norms, a name in `NORMALIZATIONS`: `"none"`, `"layernorm"`,
            `"rmsnorm"`; functions of single numbers, `"dyt"` ([`DynamicTanh`]) and `"derf"` ([`DynamicErf`]); linear
            ones, `"scale"`, `"affine"` and `"fixed_scale"`; `"rmspre"`, which only divides by the root mean square, as
            is left of a LayerNorm whose centring, gain and bias are folded into the weights; and `"removal"`, the
            stock norm on its way to a fixed scale ([`RemovalNorm`]).
        final_norm (the same, defaults to the stock family's norm):
            What stands after the last block. The paper's LayerNorm-free models keep this one.
        layer_norms (`list[str]` or `str`, *optional*):
            One entry per layer, or a rule like `"none:0-5,layernorm:6-11"`; overrides `norm`. An encoder-decoder
            counts the layers of its encoder first and goes on with those of its decoder: with 6 of each, decoder
            layers are 6 to 11. All norms of a layer are alike, that of its cross-attention included.
        layer_activations (`list[str]` or `str`, *optional*):
            The same; overrides the family's activation field (`activation_function` or `hidden_act`). With
            `"identity"` attention is the only nonlinearity; with `"identity_fused"` the MLP is one matrix, too.
        negative_slope (`float`, defaults to 0.01):
            Slope of `"leaky_relu"`, and where those of `"learnable_leaky_relu"` and `"prelu"` start.
        slope_scope (`"layer"` or `"global"`, defaults to `"layer"`):
            Whether every layer learns a slope of its own or the whole model learns one.
        linear_bias (`"all"` or `"query_key"`, defaults to `"all"`):
            `"query_key"` trains the biases of query and key only; value, attention output and both MLP projections
            keep theirs frozen at their initial zero, as the published code does.
        residual_init (`"scaled"` or `"plain"`, defaults to the stock family's own scheme):
            `"scaled"` draws the projections that write into the residual stream with a standard deviation of
            `initializer_range / sqrt(2 * num_hidden_layers)`, `"plain"` with `initializer_range`. An encoder and a
            decoder each count their own layers. T5, which draws every matrix by its inputs, has `"plain"` only.
        lm_head_bias (`bool`, defaults to `False`):
            Whether the language-model head has a bias. A final norm's bias, folded into the head, becomes one.
        norm_alpha (`float`, defaults to 0.5):
            Where the learned alpha of `"dyt"` and `"derf"` starts.
        norm_alpha_attention, norm_alpha_mlp, norm_alpha_final (`float`, *optional*):
            The same for norms that feed attention, those that feed MLPs, and the final one; `norm_alpha` by default.
            The paper trains LLaMA 7B with 0.8, 0.2 and 0.2.
        embedding_scale (`bool`, defaults to `False`):
            A learned scalar on the sum of the embeddings ([`EmbeddingScale`]), as language models with DyT have it.
        weight_norm (`"none"`, `"weight"` or `"spectral"`, defaults to `"none"`):
            A bound on the matrices instead of the activations ([`WeightNorm`], [`SpectralNorm`]).
        weight_norm_scope (`"mlp"` or `"block"`, defaults to `"mlp"`):
            Whose matrices: those of the MLPs, or all of a block.
        residual_gain (`"none"`, `"rezero"`, `"skipinit"` or `"fixed"`, defaults to `"none"`):
            A gain on what each branch adds to the residual stream ([`ResidualGain`]).
        ffn_scale (`bool`, defaults to `False`):
            Two learned scales in every MLP ([`ScaledMLP`]).
        query_key_norm (`bool`, defaults to `False`):
            Whether queries and keys are divided by their root mean squares ([`QueryKeyControl`]). Qwen3 has norms of
            its own for them, with gains, which `True`, its default, keeps and `False` takes away. Not for T5, whose
            logits are not divided by the root of a head's width.
        attention_temperature (`bool`, defaults to `False`):
            Whether every head learns a factor of its logits ([`QueryKeyControl`]).
        attention_softcap (`float`, *optional*):
            Attention logits become `softcap * tanh(logits / softcap)`; with eager attention, flash, or flex where the
            family has it, not with sdpa. The position bias of T5 is added behind the cap.

    Raises:
        ConfigurationError: for a value that is not allowed, a list whose length is not the number of layers, or an
            unknown keyword that resembles one of these fields.
    """

    activation_field: ClassVar[str]
    """What the family calls the activation of its MLPs."""
    stock_norm: ClassVar[Literal["layernorm", "rmsnorm"]] = "layernorm"
    """The norm of the stock family: under that name a model is the stock one, bit for bit."""
    stock_query_key_norm: ClassVar[bool] = False
    """Whether the stock attention normalises its queries and keys."""
    depth_fields: ClassVar[tuple[str, ...]] = ("num_hidden_layers",)
    """The number of blocks of each stack: one for a decoder, encoder and decoder for a family with both."""

    norm: str = "none"
    final_norm: str = "layernorm"
    layer_norms: list[str] | str | None = None
    layer_activations: list[str] | str | None = None
    negative_slope: float | int = 0.01
    slope_scope: Literal["layer", "global"] = "layer"
    linear_bias: Literal["all", "query_key"] = "all"
    residual_init: Literal["scaled", "plain"] = "scaled"
    lm_head_bias: bool = False
    norm_alpha: float | int = 0.5
    norm_alpha_attention: float | int | None = None
    norm_alpha_mlp: float | int | None = None
    norm_alpha_final: float | int | None = None
    embedding_scale: bool = False
    weight_norm: Literal["none", "weight", "spectral"] = "none"
    weight_norm_scope: Literal["mlp", "block"] = "mlp"
    residual_gain: Literal["none", "rezero", "skipinit", "fixed"] = "none"
    ffn_scale: bool = False
    query_key_norm: bool = False
    attention_temperature: bool = False
    attention_softcap: float | int | None = None

    # Checked here and not by @strict, whose error is no ValueError.
    def __setattr__(self, name: str, value: Any) -> None:
        if name in ALLOWED_VALUES:
            _check_name(name, value, ALLOWED_VALUES[name])
        elif name in ("norm", "final_norm"):
            _check_name(name, value, normalization_names())
        elif name == self.activation_field:
            _check_name(name, value, activation_names())
        elif name == "layer_norms":
            _check_names(name, value, normalization_names())
        elif name == "layer_activations":
            _check_names(name, value, activation_names())
        elif name in NUMBERS and not (_is_number(value) or (value is None and name in OPTIONAL_NUMBERS)):
            raise ConfigurationError(f"{name} must be a finite number, got {value!r}; float32 ends at {LARGEST:.4g}.")
        elif name == "attention_softcap" and value is not None and value <= 0:
            raise ConfigurationError(f"attention_softcap must be greater than 0, or None for no cap, got {value!r}.")
        elif isinstance(value, int) and value > MOST_LAYERS and self._is_depth(name):
            raise ConfigurationError(f"{name} must be at most {MOST_LAYERS}, got {value!r}.")
        elif name in SWITCHES and not isinstance(value, bool):
            raise ConfigurationError(f"{name} must be true or false, got {value!r}.")
        super().__setattr__(name, value)

    def _is_depth(self, name: str) -> bool:
        return name in self.depth_fields or name in (self.attribute_map.get(field) for field in self.depth_fields)

    def __post_init__(self, **kwargs: Any) -> None:
        reject_study_typos(kwargs, type(self))
        super().__post_init__(**kwargs)
        for name in ("attention_bias", "enable_bias", "qkv_bias") if self.linear_bias == "query_key" else ():
            if not getattr(self, name, True):
                raise ConfigurationError(
                    f"linear_bias='query_key' trains the biases of query and key, and {name}=False leaves none."
                )
        if self.attention_softcap is not None and getattr(self, "reorder_and_upcast_attn", False):
            raise ConfigurationError(
                "attention_softcap and reorder_and_upcast_attn are two eager attentions: choose one."
            )
        _ = self.block_norms, self.block_activations  # a wrong list length fails here, not in the model
        for name, norms in ALPHAS.items():
            if getattr(self, name) is not None and not set(WITH_ALPHA) & set(norms(self)):
                raise ConfigurationError(
                    f"{name}={getattr(self, name)!r} is where the alpha of {' or '.join(map(repr, WITH_ALPHA))} "
                    f"starts, and no norm there has one: {', '.join(map(repr, sorted(set(norms(self)))))}. Leave it at "
                    "None."
                )

    @property
    def block_norms(self) -> list[str]:
        """The norm of every block, first to last; of an encoder-decoder those of the encoder first."""
        return self._per_layer("layer_norms", self.norm)

    @property
    def block_activations(self) -> list[str]:
        """The activation of every block's MLP, in the same order."""
        return self._per_layer("layer_activations", getattr(self, self.activation_field))

    def _per_layer(self, list_field: str, default: str) -> list[str]:
        values, layers = getattr(self, list_field), sum(getattr(self, name) for name in self.depth_fields)
        if values is None:
            return [default] * layers
        if isinstance(values, str):
            return expand_rule(list_field, values, layers)
        if len(values) != layers:
            raise ConfigurationError(
                f"{list_field} needs one entry per layer: {layers} layers, {len(values)} entries given."
            )
        return list(values)


ALLOWED_VALUES = {f.name: get_args(f.type) for f in fields(LNFreeConfigMixin) if get_origin(f.type) is Literal}
SWITCHES = [f.name for f in fields(LNFreeConfigMixin) if f.type is bool]
WITH_ALPHA = ("dyt", "derf")
# Field -> the norms whose alpha starts there. What feeds the MLPs follows a norm of the same layer.
ALPHAS: dict[str, Callable[[LNFreeConfigMixin], list[str]]] = {
    "norm_alpha_attention": lambda config: config.block_norms,
    "norm_alpha_mlp": lambda config: config.block_norms,
    "norm_alpha_final": lambda config: [config.final_norm],
}
OPTIONAL_NUMBERS = (*ALPHAS, "attention_softcap")
LARGEST = 3.4028234663852886e38  # of float32; NaN is not at most that
NUMBERS = ("negative_slope", "norm_alpha", *OPTIONAL_NUMBERS)
MOST_LAYERS = 10_000  # beyond any model, and far below what fills the memory with lists of layers


def expand_rule(field_name: str, rule: str, layers: int) -> list[str]:
    """
    `"relu:0-5,gelu:6-11"` -> a name for every layer.

    Raises:
        ConfigurationError: what is no rule, a layer that is not there, or one that has two names or none.
    """
    names: list[str | None] = [None] * layers
    for part in rule.split(","):
        found = re.fullmatch(r"\s*([\w.]+)\s*:\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if found is None:
            raise ConfigurationError(
                f"{field_name} must be None, a list with one name per layer or a rule like 'relu:0-5,gelu:6-11'; got "
                f"{rule!r}."
            )
        first, last = int(found[2]), int(found[3] or found[2])
        if not first <= last < layers:
            raise ConfigurationError(f"{field_name}: {part.strip()!r} names layers that are not among 0-{layers - 1}.")
        for layer in range(first, last + 1):
            if names[layer] is not None:
                raise ConfigurationError(f"{field_name} gives layer {layer} two names: {rule!r}.")
            names[layer] = found[1]
    if None in names:
        raise ConfigurationError(f"{field_name} gives layer {names.index(None)} no name: {rule!r}.")
    return [name for name in names if name is not None]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST


def _check_name(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigurationError(f"{name}={value!r} is not known. Allowed: {', '.join(map(repr, allowed))}.")


def _check_names(name: str, values: Any, allowed: tuple[str, ...]) -> None:
    if values is None:
        return
    if isinstance(values, str):  # whether it fits the layers is seen once their number is known
        values = [part.partition(":")[0].strip() for part in values.split(",")]
    if not isinstance(values, (list, tuple)):
        raise ConfigurationError(f"{name} must be None, a list with one name per layer, or a rule; got {values!r}.")
    for index, value in enumerate(values):
        _check_name(f"{name}[{index}]", value, allowed)


def reject_study_typos(kwargs: dict[str, Any], config_class: type[LNFreeConfigMixin]) -> None:
    """Refuse unknown keywords that were meant to be study fields; `PreTrainedConfig` keeps any other."""
    study = [f.name for f in fields(LNFreeConfigMixin)] + [config_class.activation_field]
    others = OTHER_NAMES | dict.fromkeys(ACTIVATION_NAMES, config_class.activation_field)
    for name in kwargs:
        for near in get_close_matches(name, [*study, *others], n=1, cutoff=0.88):
            if abs(len(near) - len(name)) > LONGEST_SLIP:  # another library's layer_norm_eps is no layer_norms
                continue
            meant = others.get(near, near)
            raise ConfigurationError(
                f"{name!r} is not a field of {config_class.__name__}. Did you mean {meant!r}? The study's fields are: "
                f"{', '.join(study)}."
            )
