"""Metrics for `evaluate`, by path: no network is needed.

evaluate.load(metric_path("bits_per_byte")).compute(predictions=texts, model_id="runs/demo/SM+R/seed-0")
"""

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from datasets import Features, Value
from evaluate import MetricInfo
from transformers import PreTrainedModel

from ..choices import Metric
from ..errors import SettingsError
from ..evaluation.run import evaluate

METRICS = ("token_perplexity", "bits_per_byte", "attention_entropy", "activation_sparsity")


def metric_path(name: str) -> str:
    """
    What `evaluate.load` takes.

    Raises:
        SettingsError: no such metric.
    """
    if name not in METRICS:
        raise SettingsError(f"There is no metric {name!r}. There are: {', '.join(METRICS)}.")
    return str(files("hf_lnfree") / "metrics" / name)


def metric_info(description: str | None) -> MetricInfo:
    """What `evaluate` wants to know of a metric."""
    inputs = (
        "predictions: texts; model_id: folder or Hub name of a causal language model; other keywords are those of "
        "hf_lnfree.evaluation.evaluate."
    )
    features = Features({"predictions": Value("string")})
    return MetricInfo(description=description or "", citation="", inputs_description=inputs, features=features)


def compute_metric(
    metric: Metric, texts: Sequence[str], model_id: str | PreTrainedModel, **options: Any
) -> dict[str, Any]:
    """One metric of `hf_lnfree.evaluation.evaluate`, with the counts that it rests on."""
    results = evaluate(model_id, texts, metrics=[metric], **options)
    return results[metric] | {name: results[name] for name in ("documents", "tokens", "bytes")}
