"""OPT without LayerNorm: configuration, sites and classes; the rest is transformers' own."""

from dataclasses import field
from typing import Any, ClassVar, Literal

from transformers import (
    OPTConfig,
    OPTForCausalLM,
    OPTForQuestionAnswering,
    OPTForSequenceClassification,
    OPTModel,
)

from .configuration_lnfree import LNFreeConfigMixin, auto_map
from .errors import ConfigurationError
from .heads import CausalLMHead, QuestionAnsweringHead, SequenceClassificationHead
from .normfree import LNFreeMixin
from .sites import AttentionBranch, MLPBranch, StackSites

HEADS = ("CausalLM", "SequenceClassification", "QuestionAnswering")


class LNFreeOPTConfig(LNFreeConfigMixin, OPTConfig):  # noqa: D101  set in the next line
    __doc__ = "[`OPTConfig`] with the study's fields.\n" + (LNFreeConfigMixin.__doc__ or "")

    model_type = "lnfree_opt"
    activation_field: ClassVar[str] = "activation_function"

    residual_init: Literal["scaled", "plain"] = "plain"
    auto_map: dict[str, str] = field(default_factory=lambda: auto_map("modeling_lnfree_opt", "LNFreeOPT", HEADS))
    tokenizer_class: str | None = "GPT2Tokenizer"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        fixed = {
            "do_layer_norm_before": True,
            "_remove_final_layer_norm": False,
            "layer_norm_elementwise_affine": True,
            "word_embed_proj_dim": self.hidden_size,
        }
        for name, value in fixed.items():
            if getattr(self, name) != value:
                raise ConfigurationError(
                    f"{name}={getattr(self, name)!r} is not supported, only {value!r}: {type(self).__name__} knows OPT "
                    "of every size but 350M, with norms before its branches and after the last block, and embeddings "
                    "as wide as the stream."
                )


class LNFreeOPTMixin(LNFreeMixin):
    """Where OPT keeps its branches."""

    config_class = LNFreeOPTConfig
    stacks = (
        StackSites(
            embeddings=("decoder.embed_tokens", "decoder.embed_positions"),
            blocks="decoder.layers",
            attention=AttentionBranch(
                norm="self_attn_layer_norm",
                readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                module="self_attn",
                writer="self_attn.out_proj",
            ),
            mlp=MLPBranch(norm="final_layer_norm", readers=("fc1",), activation="activation_fn", writer="fc2"),
            final_norm="decoder.final_layer_norm",
        ),
    )


class LNFreeOPTModel(LNFreeOPTMixin, OPTModel):
    """[`OPTModel`] with the norms and activations of an [`LNFreeOPTConfig`]."""


class LNFreeOPTForCausalLM(CausalLMHead, LNFreeOPTMixin, OPTForCausalLM):
    """[`OPTForCausalLM`] on an [`LNFreeOPTModel`]."""

    backbone = LNFreeOPTModel


class LNFreeOPTForSequenceClassification(SequenceClassificationHead, LNFreeOPTMixin, OPTForSequenceClassification):
    """[`OPTForSequenceClassification`] on an [`LNFreeOPTModel`]."""

    backbone = LNFreeOPTModel


class LNFreeOPTForQuestionAnswering(QuestionAnsweringHead, LNFreeOPTMixin, OPTForQuestionAnswering):
    """[`OPTForQuestionAnswering`] on an [`LNFreeOPTModel`]."""

    backbone = LNFreeOPTModel
