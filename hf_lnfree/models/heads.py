"""The task heads that every decoder family has. A stock head's constructor builds a stock backbone; these build ours.

Parameter names and forward passes are those of the stock class that follows in a head's bases.
"""

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


class Head:
    backbone: type[PreTrainedModel]

    def __init__(self, config: PreTrainedConfig):
        PreTrainedModel.__init__(self, config)  # past the stock head's constructor
        self.num_labels = config.num_labels
        setattr(self, self.base_model_prefix, self.backbone(config))
        self.add_head(config)
        self.post_init()


class CausalLMHead(Head):
    def add_head(self, config: PreTrainedConfig) -> None:
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)


class SequenceClassificationHead(Head):
    def add_head(self, config: PreTrainedConfig) -> None:
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)


class TokenClassificationHead(Head):
    def add_head(self, config: PreTrainedConfig) -> None:
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", 0.1))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)


class QuestionAnsweringHead(Head):
    def add_head(self, config: PreTrainedConfig) -> None:
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
