"""GPT-2 without LayerNorm: the sites of the family and its classes; everything else is transformers' own."""

from dataclasses import field
from typing import ClassVar

from transformers import (
    GPT2Config,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)

from .configuration_lnfree import LNFreeConfigMixin, auto_map
from .heads import CausalLMHead, QuestionAnsweringHead, SequenceClassificationHead, TokenClassificationHead
from .normfree import LNFreeMixin
from .sites import AttentionBranch, MLPBranch, StackSites


class LNFreeGPT2Config(LNFreeConfigMixin, GPT2Config):  # noqa: D101  set in the next line
    __doc__ = "[`GPT2Config`] with the study's fields.\n" + (LNFreeConfigMixin.__doc__ or "")

    model_type = "lnfree_gpt2"
    activation_field: ClassVar[str] = "activation_function"

    # The formula of the stock default, "gelu_new", in one kernel: a ninth of the time. Stock checkpoints name theirs.
    activation_function: str = "gelu_pytorch_tanh"
    auto_map: dict[str, str] = field(default_factory=lambda: auto_map("modeling_lnfree_gpt2", "LNFreeGPT2"))
    tokenizer_class: str | None = "GPT2Tokenizer"  # of a folder that names none; transformers goes by its model types


class LNFreeGPT2Mixin(LNFreeMixin):
    """Where GPT-2 keeps its branches."""

    config_class = LNFreeGPT2Config
    stacks = (
        StackSites(
            embeddings=("wte", "wpe"),
            embedding_dropout="drop",
            blocks="h",
            attention=AttentionBranch(
                norm="ln_1",
                readers=("attn.c_attn",),
                fused="parts",
                module="attn",
                writer="attn.c_proj",
                dropout="attn.resid_dropout",
            ),
            cross_attention=AttentionBranch(
                norm="ln_cross_attn",
                readers=("crossattention.q_attn",),
                encoder_readers=("crossattention.c_attn",),
                module="crossattention",
                writer="crossattention.c_proj",
                dropout="crossattention.resid_dropout",
            ),
            mlp=MLPBranch(
                norm="ln_2", readers=("mlp.c_fc",), activation="mlp.act", writer="mlp.c_proj", dropout="mlp.dropout"
            ),
            final_norm="ln_f",
        ),
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
