"""Read by `evaluate.load` by its path; see `hf_lnfree.metrics`."""

import evaluate

from hf_lnfree.metrics import compute_metric
from hf_lnfree.metrics import metric_info


class ActivationSparsity(evaluate.Metric):
    """
    Share of the MLPs' activations that are exactly 0, and of units that are 0 at every token.

    Returns sparsity, and by layer: layers, dead_units.
    """

    def _info(self):
        return metric_info(self.__doc__)

    def _compute(self, predictions, model_id, **options):
        return compute_metric("sparsity", predictions, model_id, **options)
