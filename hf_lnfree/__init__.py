"""Language models without LayerNorm for Hugging Face Transformers, and an exact attention-entropy analyzer.

Importing the package registers the models with transformers' Auto classes.
"""

from .analysis import AttentionEntropyAnalyzer, EntropyReport, published_reports
from .models import (
    LNFreeGPT2Config,
    LNFreeGPT2ForCausalLM,
    LNFreeGPT2ForQuestionAnswering,
    LNFreeGPT2ForSequenceClassification,
    LNFreeGPT2ForTokenClassification,
    LNFreeGPT2Model,
    LNFreeGPTNeoXConfig,
    LNFreeGPTNeoXForCausalLM,
    LNFreeGPTNeoXForQuestionAnswering,
    LNFreeGPTNeoXForSequenceClassification,
    LNFreeGPTNeoXForTokenClassification,
    LNFreeGPTNeoXModel,
)
from .training import LNFreeTrainer, LNFreeTrainingArguments, paper_config
from .version import __version__

__all__ = [
    "AttentionEntropyAnalyzer",
    "EntropyReport",
    "LNFreeGPT2Config",
    "LNFreeGPT2ForCausalLM",
    "LNFreeGPT2ForQuestionAnswering",
    "LNFreeGPT2ForSequenceClassification",
    "LNFreeGPT2ForTokenClassification",
    "LNFreeGPT2Model",
    "LNFreeGPTNeoXConfig",
    "LNFreeGPTNeoXForCausalLM",
    "LNFreeGPTNeoXForQuestionAnswering",
    "LNFreeGPTNeoXForSequenceClassification",
    "LNFreeGPTNeoXForTokenClassification",
    "LNFreeGPTNeoXModel",
    "LNFreeTrainer",
    "LNFreeTrainingArguments",
    "__version__",
    "paper_config",
    "published_reports",
]
