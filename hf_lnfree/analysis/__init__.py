"""Model + batches -> numbers -> pictures."""

from .analyzer import AttentionEntropyAnalyzer
from .capture import AttentionRecord, record_attention_entropy
from .comparison import EntropyComparison, compare_reports
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
from .fused import RowEntropies, attention_entropy_with_grad, fused_attention_entropy, head_entropy_with_grad

__all__ = [
    "AttentionEntropyAnalyzer",
    "AttentionRecord",
    "EntropyComparison",
    "EntropyReport",
    "RowEntropies",
    "attention_entropy",
    "attention_entropy_with_grad",
    "bucket_shares",
    "causal_bound",
    "collapsed_share",
    "compare_reports",
    "entropy_maximum",
    "fused_attention_entropy",
    "head_entropy_with_grad",
    "normalized_entropy",
    "overloaded_share",
    "published_reports",
    "record_attention_entropy",
    "row_support",
]
