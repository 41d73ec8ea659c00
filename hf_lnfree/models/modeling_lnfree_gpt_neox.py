"""GPT-NeoX (Pythia) without LayerNorm: the sites of the family and its classes; the rest is transformers' own."""

from dataclasses import field
from typing import ClassVar, Literal

from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForQuestionAnswering,
    GPTNeoXForSequenceClassification,
    GPTNeoXForTokenClassification,
    GPTNeoXModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .configuration_lnfree import LNFreeConfigMixin, auto_map
from .heads import CausalLMHead, QuestionAnsweringHead, SequenceClassificationHead, TokenClassificationHead
from .normfree import LNFreeMixin
from .sites import AttentionBranch, MLPBranch, StackSites


class LNFreeGPTNeoXConfig(LNFreeConfigMixin, GPTNeoXConfig):  # noqa: D101  set in the next line
    __doc__ = "[`GPTNeoXConfig`] (Pythia) with the study's fields.\n" + (LNFreeConfigMixin.__doc__ or "")

    model_type = "lnfree_gpt_neox"
    activation_field: ClassVar[str] = "hidden_act"

    residual_init: Literal["scaled", "plain"] = "plain"
    auto_map: dict[str, str] = field(default_factory=lambda: auto_map("modeling_lnfree_gpt_neox", "LNFreeGPTNeoX"))
    tokenizer_class: str | None = "GPTNeoXTokenizer"


class LNFreeGPTNeoXMixin(LNFreeMixin):
    """Where GPT-NeoX keeps its branches."""

    config_class = LNFreeGPTNeoXConfig
    stacks = (
        StackSites(
            embeddings=("embed_in",),
            embedding_dropout="emb_dropout",
            blocks="layers",
            attention=AttentionBranch(
                norm="input_layernorm",
                readers=("attention.query_key_value",),
                fused="heads",
                module="attention",
                writer="attention.dense",
                dropout="post_attention_dropout",
            ),
            mlp=MLPBranch(
                norm="post_attention_layernorm",
                readers=("mlp.dense_h_to_4h",),
                activation="mlp.act",
                writer="mlp.dense_4h_to_h",
                dropout="post_mlp_dropout",
            ),
            final_norm="final_layer_norm",
        ),
    )


class LNFreeGPTNeoXModel(LNFreeGPTNeoXMixin, GPTNeoXModel):
    """[`GPTNeoXModel`] with the norms and activations of an [`LNFreeGPTNeoXConfig`]."""


class LNFreeGPTNeoXForCausalLM(CausalLMHead, LNFreeGPTNeoXMixin, GPTNeoXForCausalLM):
    """[`GPTNeoXForCausalLM`] on an [`LNFreeGPTNeoXModel`]."""

    backbone = LNFreeGPTNeoXModel


class LNFreeGPTNeoXForSequenceClassification(
    SequenceClassificationHead, LNFreeGPTNeoXMixin, GPTNeoXForSequenceClassification
):
    """[`GPTNeoXForSequenceClassification`] on an [`LNFreeGPTNeoXModel`]."""

    backbone = LNFreeGPTNeoXModel


class LNFreeGPTNeoXForTokenClassification(TokenClassificationHead, LNFreeGPTNeoXMixin, GPTNeoXForTokenClassification):
    """[`GPTNeoXForTokenClassification`] on an [`LNFreeGPTNeoXModel`]."""

    backbone = LNFreeGPTNeoXModel


class LNFreeGPTNeoXForQuestionAnswering(QuestionAnsweringHead, LNFreeGPTNeoXMixin, GPTNeoXForQuestionAnswering):
    """[`GPTNeoXForQuestionAnswering`] on an [`LNFreeGPTNeoXModel`]."""

    backbone = LNFreeGPTNeoXModel


# On disk the head of GPT-NeoX is called embed_out; transformers renames it by the name of the class.
register_checkpoint_conversion_mapping(
    LNFreeGPTNeoXForCausalLM.__name__, get_checkpoint_conversion_mapping(GPTNeoXForCausalLM.__name__), overwrite=True
)
