"""T5 (also FLAN-T5) without RMSNorm: configuration, sites and classes; the rest is transformers' own.

A block is a list of branches, so cross-attention comes second in a decoder's and the MLP last. T5 1.1 gates its MLPs.
"""

from dataclasses import field, replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import nn
from transformers import (
    PreTrainedConfig,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5ForQuestionAnswering,
    T5ForSequenceClassification,
    T5ForTokenClassification,
    T5Model,
)
from transformers.models.t5.modeling_t5 import T5ClassificationHead, T5DenseActDense

from .configuration_lnfree import LNFreeConfigMixin, auto_map
from .errors import ConfigurationError
from .heads import Head, TokenClassificationHead
from .normfree import LNFreeMixin
from .sites import AttentionBranch, MLPBranch, StackSites

HEADS = ("SequenceClassification", "TokenClassification", "QuestionAnswering")
OTHERS = {
    "ForSeq2SeqLM": "ForConditionalGeneration",
    "ForPreTraining": "ForConditionalGeneration",
    "ForTextEncoding": "EncoderModel",
}


class LNFreeT5Config(LNFreeConfigMixin, T5Config):  # noqa: D101  set in the next line
    __doc__ = "[`T5Config`] with the study's fields.\n" + (LNFreeConfigMixin.__doc__ or "")

    model_type = "lnfree_t5"
    activation_field: ClassVar[str] = "dense_act_fn"
    stock_norm: ClassVar[Literal["layernorm", "rmsnorm"]] = "rmsnorm"
    depth_fields: ClassVar[tuple[str, ...]] = ("num_layers", "num_decoder_layers")

    final_norm: str = "rmsnorm"
    residual_init: Literal["scaled", "plain"] = "plain"
    auto_map: dict[str, str] = field(default_factory=lambda: auto_map("modeling_lnfree_t5", "LNFreeT5", HEADS, OTHERS))
    tokenizer_class: str | None = "T5Tokenizer"

    def __post_init__(self, **kwargs: Any) -> None:
        activation = kwargs.pop(self.activation_field, None)
        super().__post_init__(**kwargs)
        if activation is not None:  # else that of feed_forward_proj
            self.dense_act_fn = activation
        for name, only, why in (
            ("residual_init", "plain", "it draws every matrix by the number of its inputs"),
            ("lm_head_bias", False, "its head has no bias"),
            ("linear_bias", "all", "it has no biases"),
            (
                "query_key_norm",
                False,
                "its logits are not divided by the root of a head's width, and would be too large",
            ),
        ):
            if getattr(self, name) != only:
                raise ConfigurationError(
                    f"{name}={getattr(self, name)!r} is not for {type(self).__name__}: {why}. Leave it at {only!r}."
                )


def stack(name: str, cross: bool) -> StackSites:
    """The encoder, or the decoder with its cross-attention."""
    last = "layer.2" if cross else "layer.1"
    crossing = AttentionBranch(
        norm="layer.1.layer_norm",
        readers=("layer.1.EncDecAttention.q",),
        encoder_readers=("layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v"),
        module="layer.1.EncDecAttention",
        writer="layer.1.EncDecAttention.o",
        dropout="layer.1.dropout",
    )
    return StackSites(
        embeddings=("shared",),
        blocks=f"{name}.block",
        attention=AttentionBranch(
            norm="layer.0.layer_norm",
            readers=("layer.0.SelfAttention.q", "layer.0.SelfAttention.k", "layer.0.SelfAttention.v"),
            module="layer.0.SelfAttention",
            writer="layer.0.SelfAttention.o",
            dropout="layer.0.dropout",
        ),
        cross_attention=crossing if cross else None,
        mlp=MLPBranch(
            norm=f"{last}.layer_norm",
            readers=(f"{last}.DenseReluDense.wi",),
            activation=f"{last}.DenseReluDense.act",
            writer=f"{last}.DenseReluDense.wo",
            dropout=f"{last}.dropout",
        ),
        final_norm=f"{name}.final_layer_norm",
    )


def gated(sites: StackSites) -> StackSites:
    """The same with the MLPs of T5 1.1."""
    (reader,) = sites.mlp.readers
    return replace(sites, mlp=replace(sites.mlp, readers=(f"{reader}_0", f"{reader}_1")))


def is_fused(module: nn.Module) -> bool:
    """Whether a module is an MLP of one matrix."""
    return isinstance(module, T5DenseActDense) and isinstance(module.wi, nn.Identity)


ENCODER, DECODER = stack("encoder", cross=False), stack("decoder", cross=True)


class LNFreeT5Mixin(LNFreeMixin):
    """Where T5 keeps its branches."""

    config_class = LNFreeT5Config
    stacks: ClassVar[tuple[StackSites, ...]] = (ENCODER, DECODER)

    def post_init(self) -> None:
        config = self.config
        if config.is_gated_act:
            self.stacks = tuple(map(gated, type(self).stacks))  # type: ignore[misc]  # those of this model
        super().post_init()
        if {*config.block_norms, config.final_norm} != {config.stock_norm}:
            # In float16 the last matrix of an MLP stays in float32, and so the stream: only stock norms take it back.
            self._keep_in_fp32_modules = set()

    def initialize_weights(self) -> None:
        for module in filter(is_fused, self.modules()):
            module._is_hf_initialized = True  # type: ignore[assignment]  # the stock rule would ask for two matrices
        super().initialize_weights()

    @torch.no_grad()
    def _init_study(self, module: nn.Module) -> bool:
        done = super()._init_study(module)
        if is_fused(module):
            assert isinstance(module, T5DenseActDense)
            std = cast(float, self.config.initializer_factor) * cast(int, self.config.d_model) ** -0.5
            self._init_writer(module.wo, std)  # the one matrix of a fused MLP
        return done


class LNFreeT5Model(LNFreeT5Mixin, T5Model):
    """[`T5Model`] with the norms and activations of an [`LNFreeT5Config`]."""


class LNFreeT5EncoderModel(LNFreeT5Mixin, T5EncoderModel):
    """[`T5EncoderModel`] with the norms and activations of an [`LNFreeT5Config`]."""

    stacks = (ENCODER,)


class LNFreeT5ForConditionalGeneration(LNFreeT5Mixin, T5ForConditionalGeneration):
    """[`T5ForConditionalGeneration`] with the norms and activations of an [`LNFreeT5Config`]."""


class LNFreeT5ForQuestionAnswering(LNFreeT5Mixin, T5ForQuestionAnswering):
    """[`T5ForQuestionAnswering`] with the norms and activations of an [`LNFreeT5Config`]."""


class LNFreeT5ForSequenceClassification(Head, LNFreeT5Mixin, T5ForSequenceClassification):
    """[`T5ForSequenceClassification`] on an [`LNFreeT5Model`]."""

    backbone = LNFreeT5Model

    def add_head(self, config: PreTrainedConfig) -> None:
        self.classification_head = T5ClassificationHead(cast(T5Config, config))


class LNFreeT5ForTokenClassification(TokenClassificationHead, LNFreeT5Mixin, T5ForTokenClassification):
    """[`T5ForTokenClassification`] on an [`LNFreeT5EncoderModel`]."""

    stacks = (ENCODER,)
    backbone = LNFreeT5EncoderModel
