"""Qwen3 without RMSNorm: configuration, sites and classes; the rest is transformers' own."""

from dataclasses import field, replace
from typing import ClassVar, Literal

from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForQuestionAnswering,
    Qwen3ForSequenceClassification,
    Qwen3ForTokenClassification,
    Qwen3Model,
)

from .configuration_lnfree import LNFreeConfigMixin, auto_map
from .heads import CausalLMHead, QuestionAnsweringHead, SequenceClassificationHead, TokenClassificationHead
from .modeling_lnfree_llama import LNFreeLlamaMixin
from .normfree import LNFreeMixin

(LLAMA,) = LNFreeLlamaMixin.stacks


class LNFreeQwen3Config(LNFreeConfigMixin, Qwen3Config):  # noqa: D101  set in the next line
    __doc__ = "[`Qwen3Config`] with the study's fields.\n" + (LNFreeConfigMixin.__doc__ or "")

    model_type = "lnfree_qwen3"
    activation_field: ClassVar[str] = "hidden_act"
    stock_norm: ClassVar[Literal["layernorm", "rmsnorm"]] = "rmsnorm"
    stock_query_key_norm: ClassVar[bool] = True

    final_norm: str = "rmsnorm"
    residual_init: Literal["scaled", "plain"] = "plain"
    query_key_norm: bool = True
    auto_map: dict[str, str] = field(default_factory=lambda: auto_map("modeling_lnfree_qwen3", "LNFreeQwen3"))
    tokenizer_class: str | None = "Qwen2Tokenizer"


class LNFreeQwen3Mixin(LNFreeMixin):
    """Where Qwen3 keeps its branches: as Llama, with norms of its own for queries and keys."""

    config_class = LNFreeQwen3Config
    stacks = (
        replace(
            LLAMA,
            attention=replace(LLAMA.attention, query_key_norms=("self_attn.q_norm", "self_attn.k_norm")),
        ),
    )


class LNFreeQwen3Model(LNFreeQwen3Mixin, Qwen3Model):
    """[`Qwen3Model`] with the norms and activations of an [`LNFreeQwen3Config`]."""


class LNFreeQwen3ForCausalLM(CausalLMHead, LNFreeQwen3Mixin, Qwen3ForCausalLM):
    """[`Qwen3ForCausalLM`] on an [`LNFreeQwen3Model`]."""

    backbone = LNFreeQwen3Model


class LNFreeQwen3ForSequenceClassification(
    SequenceClassificationHead, LNFreeQwen3Mixin, Qwen3ForSequenceClassification
):
    """[`Qwen3ForSequenceClassification`] on an [`LNFreeQwen3Model`]."""

    backbone = LNFreeQwen3Model


class LNFreeQwen3ForTokenClassification(TokenClassificationHead, LNFreeQwen3Mixin, Qwen3ForTokenClassification):
    """[`Qwen3ForTokenClassification`] on an [`LNFreeQwen3Model`]."""

    backbone = LNFreeQwen3Model
    scores = "score"


class LNFreeQwen3ForQuestionAnswering(QuestionAnsweringHead, LNFreeQwen3Mixin, Qwen3ForQuestionAnswering):
    """[`Qwen3ForQuestionAnswering`] on an [`LNFreeQwen3Model`]."""

    backbone = LNFreeQwen3Model
