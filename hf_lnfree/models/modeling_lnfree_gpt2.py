"""GPT-2 without LayerNorm: the sites of the family and its classes; everything else is transformers' own."""

from transformers import (
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention

from .configuration_lnfree import LNFreeGPT2Config
from .heads import CausalLMHead, QuestionAnsweringHead, SequenceClassificationHead, TokenClassificationHead
from .normfree import DecoderSites, LNFreeMixin


class LNFreeGPT2Mixin(LNFreeMixin):
    config_class = LNFreeGPT2Config
    sites = DecoderSites(
        embeddings=("wte", "wpe"),
        blocks="h",
        block_norms={"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",), "ln_cross_attn": ("crossattention.q_attn",)},
        residual_writers=("attn.c_proj", "mlp.c_proj", "crossattention.c_proj"),
        final_norm="ln_f",
        activation="mlp.act",
        query_key_value="attn.c_attn",
        query_key_value_per_head=False,
        unbiased=("attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        branch_ends=("attn.resid_dropout", "mlp.dropout", "crossattention.resid_dropout"),
        residual_projections={GPT2Attention: "c_proj", GPT2MLP: "c_proj"},
    )


class LNFreeGPT2Model(LNFreeGPT2Mixin, GPT2Model):
    """[`GPT2Model`] with the norms and activations of an [`LNFreeGPT2Config`]."""


class LNFreeGPT2ForCausalLM(CausalLMHead, LNFreeGPT2Mixin, GPT2LMHeadModel):
    """
    [`GPT2LMHeadModel`] on an [`LNFreeGPT2Model`].

    Its loss is the mean over the S-1 predictions; under Trainer that of the stock `*LMHeadModel` is divided by S,
    because transformers chooses the loss by the name of the class.
    """

    backbone = LNFreeGPT2Model


class LNFreeGPT2ForSequenceClassification(SequenceClassificationHead, LNFreeGPT2Mixin, GPT2ForSequenceClassification):
    """[`GPT2ForSequenceClassification`] on an [`LNFreeGPT2Model`]."""

    backbone = LNFreeGPT2Model


class LNFreeGPT2ForTokenClassification(TokenClassificationHead, LNFreeGPT2Mixin, GPT2ForTokenClassification):
    """[`GPT2ForTokenClassification`] on an [`LNFreeGPT2Model`]."""

    backbone = LNFreeGPT2Model


class LNFreeGPT2ForQuestionAnswering(QuestionAnsweringHead, LNFreeGPT2Mixin, GPT2ForQuestionAnswering):
    """[`GPT2ForQuestionAnswering`] on an [`LNFreeGPT2Model`]."""

    backbone = LNFreeGPT2Model
