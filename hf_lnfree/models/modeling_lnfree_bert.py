"""BERT without the LayerNorms of its blocks: configuration, sites and classes; the rest is transformers' own.

BERT normalises behind the sum of stream and branch: norm(x + branch(x)). Without these norms the stream is the plain
sum of all branches, and only the LayerNorm of the embeddings, which stays, bounds what it begins with. `residual_gain`
or `weight_norm` keep it from growing with depth. There is no norm after the last block.
"""

from dataclasses import field
from typing import Any, ClassVar, Literal

from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    PreTrainedConfig,
)
from transformers.models.bert.modeling_bert import BertOnlyMLMHead

from .activations import build_activation
from .configuration_lnfree import LNFreeConfigMixin, auto_map
from .errors import ConfigurationError
from .heads import Head, labels
from .normfree import LNFreeMixin
from .sites import AttentionBranch, MLPBranch, StackSites

HEADS = ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")


class LNFreeBertConfig(LNFreeConfigMixin, BertConfig):  # noqa: D101  set in the next line
    __doc__ = "[`BertConfig`] with the study's fields.\n" + (LNFreeConfigMixin.__doc__ or "")

    model_type = "lnfree_bert"
    activation_field: ClassVar[str] = "hidden_act"

    final_norm: str = "none"
    residual_init: Literal["scaled", "plain"] = "plain"
    auto_map: dict[str, str] = field(default_factory=lambda: auto_map("modeling_lnfree_bert", "LNFreeBert", HEADS))
    tokenizer_class: str | None = "BertTokenizer"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name, why in (
            ("lm_head_bias", "its head for masked tokens has one"),
            ("add_cross_attention", "it is an encoder here"),
        ):
            if getattr(self, name):
                raise ConfigurationError(f"{name}=True is not for {type(self).__name__}: {why}. Leave it at False.")


class LNFreeBertMixin(LNFreeMixin):
    """Where BERT keeps its branches."""

    config_class = LNFreeBertConfig
    stacks = (
        StackSites(
            embedding_dropout="embeddings.dropout",
            blocks="encoder.layer",
            attention=AttentionBranch(
                norm="attention.output.LayerNorm",
                readers=("attention.self.query", "attention.self.key", "attention.self.value"),
                module="attention.self",
                writer="attention.output.dense",
                dropout="attention.output.dropout",
                post_norm=True,
            ),
            mlp=MLPBranch(
                norm="output.LayerNorm",
                readers=("intermediate.dense",),
                activation="intermediate.intermediate_act_fn",
                writer="output.dense",
                dropout="output.dropout",
                post_norm=True,
            ),
        ),
    )


class LNFreeBertModel(LNFreeBertMixin, BertModel):
    """[`BertModel`] with the norms and activations of an [`LNFreeBertConfig`]."""


class Classifier(Head):
    """A dropout and scores, one a class."""

    backbone = LNFreeBertModel

    def add_head(self, config: PreTrainedConfig) -> None:
        p = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(p)
        self.classifier = nn.Linear(config.hidden_size, labels(config))


class LNFreeBertForMaskedLM(Head, LNFreeBertMixin, BertForMaskedLM):
    """[`BertForMaskedLM`] on an [`LNFreeBertModel`]; the LayerNorm of the head itself stays."""

    backbone = LNFreeBertModel
    backbone_options = {"add_pooling_layer": False}

    def add_head(self, config: PreTrainedConfig) -> None:
        self.cls = BertOnlyMLMHead(config)
        # One that a checkpoint of the backbone lacks, and whose slope begins where the others do.
        activation = build_activation(config.hidden_act, config.hidden_size, config.negative_slope)
        self.cls.predictions.transform.transform_act_fn = activation


class LNFreeBertForSequenceClassification(Classifier, LNFreeBertMixin, BertForSequenceClassification):
    """[`BertForSequenceClassification`] on an [`LNFreeBertModel`]."""


class LNFreeBertForTokenClassification(Classifier, LNFreeBertMixin, BertForTokenClassification):
    """[`BertForTokenClassification`] on an [`LNFreeBertModel`]."""

    backbone_options = {"add_pooling_layer": False}


class LNFreeBertForQuestionAnswering(Head, LNFreeBertMixin, BertForQuestionAnswering):
    """[`BertForQuestionAnswering`] on an [`LNFreeBertModel`]."""

    backbone = LNFreeBertModel
    backbone_options = {"add_pooling_layer": False}

    def add_head(self, config: PreTrainedConfig) -> None:
        self.qa_outputs = nn.Linear(config.hidden_size, labels(config))
