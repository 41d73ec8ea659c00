"""Language models without LayerNorm for Hugging Face Transformers, and an analyzer of attention entropy.

Importing the package registers the models with transformers' Auto classes.
"""

from . import models
from .analysis import AttentionEntropyAnalyzer, EntropyReport, published_reports
from .models import *  # noqa: F403
from .training import LNFreeTrainer, LNFreeTrainingArguments, paper_config
from .version import __version__

__all__ = [
    "AttentionEntropyAnalyzer",
    "EntropyReport",
    "LNFreeTrainer",
    "LNFreeTrainingArguments",
    "__version__",
    "paper_config",
    "published_reports",
]
__all__ += models.__all__
