"""Model + batches -> numbers -> pictures."""

from .analyzer import AttentionEntropyAnalyzer
from .entropy import (
    attention_entropy,
    bucket_shares,
    causal_bound,
    collapsed_share,
    entropy_maximum,
    normalized_entropy,
    overloaded_share,
    row_support,
)
from .entropy_report import EntropyReport, published_reports

__all__ = [
    "AttentionEntropyAnalyzer",
    "EntropyReport",
    "attention_entropy",
    "bucket_shares",
    "causal_bound",
    "collapsed_share",
    "entropy_maximum",
    "normalized_entropy",
    "overloaded_share",
    "published_reports",
    "row_support",
]
