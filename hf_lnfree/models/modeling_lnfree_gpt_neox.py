"""GPT-NeoX (Pythia) without LayerNorm: the sites of the family and its classes; the rest is transformers' own."""

from transformers import (
    GPTNeoXForCausalLM,
    GPTNeoXForQuestionAnswering,
    GPTNeoXForSequenceClassification,
    GPTNeoXForTokenClassification,
    GPTNeoXModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention, GPTNeoXMLP

from .configuration_lnfree import LNFreeGPTNeoXConfig
from .heads import CausalLMHead, QuestionAnsweringHead, SequenceClassificationHead, TokenClassificationHead
from .normfree import DecoderSites, LNFreeMixin


class LNFreeGPTNeoXMixin(LNFreeMixin):
    config_class = LNFreeGPTNeoXConfig
    sites = DecoderSites(
        embeddings=("embed_in",),
        blocks="layers",
        block_norms={
            "input_layernorm": ("attention.query_key_value",),
            "post_attention_layernorm": ("mlp.dense_h_to_4h",),
        },
        residual_writers=("attention.dense", "mlp.dense_4h_to_h"),
        final_norm="final_layer_norm",
        activation="mlp.act",
        query_key_value="attention.query_key_value",
        query_key_value_per_head=True,
        unbiased=("attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        branch_ends=("post_attention_dropout", "post_mlp_dropout"),
        residual_projections={GPTNeoXAttention: "dense", GPTNeoXMLP: "dense_4h_to_h"},
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
