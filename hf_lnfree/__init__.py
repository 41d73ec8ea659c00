"""Language models without LayerNorm for Hugging Face Transformers, and an analyzer of attention entropy.

Importing the package registers the models with transformers' Auto classes and with PEFT.
"""

from . import models
from . import peft as _peft  # noqa: F401
from .analysis import (
    AttentionEntropyAnalyzer,
    EntropyReport,
    compare_reports,
    published_reports,
    record_attention_entropy,
)
from .models import *  # noqa: F403
from .training import LNFreeTrainer, LNFreeTrainingArguments, paper_config
from .version import __version__

__all__ = [
    "AttentionEntropyAnalyzer",
    "EntropyReport",
    "LNFreeTrainer",
    "LNFreeTrainingArguments",
    "__version__",
    "compare_reports",
    "paper_config",
    "published_reports",
    "record_attention_entropy",
]
__all__ += models.__all__
