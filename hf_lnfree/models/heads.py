"""The task heads that families have. A stock head's constructor builds a stock backbone; these build ours.

Parameter names and forward passes are those of the stock class that follows in a head's bases.
"""

from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

# At run time the bases of a head are those of the stock class.
if TYPE_CHECKING:
    Base = PreTrainedModel
else:
    Base = object


class Head(Base):
    """What builds a head: the backbone of ours, then what `add_head` adds."""

    backbone: type[PreTrainedModel]
    backbone_options: ClassVar[dict[str, Any]] = {}
    """Arguments of the backbone beside its configuration."""

    def __init__(self, config: PreTrainedConfig):
        PreTrainedModel.__init__(self, config)  # past the stock head's constructor
        self.num_labels = config.num_labels
        setattr(self, self.base_model_prefix, self.backbone(config, **self.backbone_options))
        self.add_head(config)
        self.post_init()

    def add_head(self, config: PreTrainedConfig) -> None:
        """The modules between the backbone and the outputs, named as in the stock head."""
        raise NotImplementedError


def labels(config: PreTrainedConfig) -> int:
    """How many classes a head tells apart."""
    return cast(int, config.num_labels)


class CausalLMHead(Head):
    """A language-model head, which may have a bias."""

    def add_head(self, config: PreTrainedConfig) -> None:
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)


class SequenceClassificationHead(Head):
    """One score a class, of a whole sequence."""

    def add_head(self, config: PreTrainedConfig) -> None:
        self.score = nn.Linear(config.hidden_size, labels(config), bias=False)


class TokenClassificationHead(Head):
    """One score a class, of each token."""

    scores: ClassVar[str] = "classifier"
    """What the stock head calls its projection."""

    def add_head(self, config: PreTrainedConfig) -> None:
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", 0.1))
        setattr(self, self.scores, nn.Linear(config.hidden_size, labels(config)))


class QuestionAnsweringHead(Head):
    """Scores of where an answer starts and ends."""

    def add_head(self, config: PreTrainedConfig) -> None:
        self.qa_outputs = nn.Linear(config.hidden_size, 2)


class ImageClassificationHead(Head):
    """One score a class, of an image; none where there are no classes."""

    def add_head(self, config: PreTrainedConfig) -> None:
        classes = labels(config)
        self.classifier = nn.Linear(config.hidden_size, classes) if classes > 0 else nn.Identity()
