"""Read by `evaluate.load` by its path; see `hf_lnfree.metrics`."""

import evaluate

from hf_lnfree.metrics import compute_metric
from hf_lnfree.metrics import metric_info


class AttentionEntropy(evaluate.Metric):
    r"""
    Mean of $-\sum_j p_{ij} \ln p_{ij}$ over heads and rows, in nats, and the shares of heads by quarter of its maximum.

    Returns mean_entropy, mean_normalized, heads, buckets with intervals, flags.
    """

    def _info(self):
        return metric_info(self.__doc__)

    def _compute(self, predictions, model_id, **options):
        return compute_metric("entropy", predictions, model_id, **options)
