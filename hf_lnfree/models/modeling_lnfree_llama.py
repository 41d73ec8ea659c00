"""Llama (also TinyLlama, SmolLM) without RMSNorm: configuration, sites and classes; the rest is transformers' own."""

from dataclasses import field
from typing import ClassVar, Literal

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)

from .configuration_lnfree import LNFreeConfigMixin, auto_map
from .heads import CausalLMHead, QuestionAnsweringHead, SequenceClassificationHead, TokenClassificationHead
from .normfree import LNFreeMixin
from .sites import AttentionBranch, MLPBranch, StackSites


class LNFreeLlamaConfig(LNFreeConfigMixin, LlamaConfig):  # noqa: D101  set in the next line
    __doc__ = "[`LlamaConfig`] with the study's fields.\n" + (LNFreeConfigMixin.__doc__ or "")

    model_type = "lnfree_llama"
    activation_field: ClassVar[str] = "hidden_act"
    stock_norm: ClassVar[Literal["layernorm", "rmsnorm"]] = "rmsnorm"

    final_norm: str = "rmsnorm"
    residual_init: Literal["scaled", "plain"] = "plain"
    auto_map: dict[str, str] = field(default_factory=lambda: auto_map("modeling_lnfree_llama", "LNFreeLlama"))


class LNFreeLlamaMixin(LNFreeMixin):
    """Where Llama keeps its branches."""

    config_class = LNFreeLlamaConfig
    stacks = (
        StackSites(
            embeddings=("embed_tokens",),
            blocks="layers",
            attention=AttentionBranch(
                norm="input_layernorm",
                readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                module="self_attn",
                writer="self_attn.o_proj",
            ),
            mlp=MLPBranch(
                norm="post_attention_layernorm",
                readers=("mlp.gate_proj", "mlp.up_proj"),
                activation="mlp.act_fn",
                writer="mlp.down_proj",
            ),
            final_norm="norm",
        ),
    )


class LNFreeLlamaModel(LNFreeLlamaMixin, LlamaModel):
    """[`LlamaModel`] with the norms and activations of an [`LNFreeLlamaConfig`]."""


class LNFreeLlamaForCausalLM(CausalLMHead, LNFreeLlamaMixin, LlamaForCausalLM):
    """[`LlamaForCausalLM`] on an [`LNFreeLlamaModel`]."""

    backbone = LNFreeLlamaModel


class LNFreeLlamaForSequenceClassification(
    SequenceClassificationHead, LNFreeLlamaMixin, LlamaForSequenceClassification
):
    """[`LlamaForSequenceClassification`] on an [`LNFreeLlamaModel`]."""

    backbone = LNFreeLlamaModel


class LNFreeLlamaForTokenClassification(TokenClassificationHead, LNFreeLlamaMixin, LlamaForTokenClassification):
    """[`LlamaForTokenClassification`] on an [`LNFreeLlamaModel`]."""

    backbone = LNFreeLlamaModel
    scores = "score"


class LNFreeLlamaForQuestionAnswering(QuestionAnsweringHead, LNFreeLlamaMixin, LlamaForQuestionAnswering):
    """[`LlamaForQuestionAnswering`] on an [`LNFreeLlamaModel`]."""

    backbone = LNFreeLlamaModel
