"""Read by `evaluate.load` by its path; see `hf_lnfree.metrics`."""

import evaluate

from hf_lnfree.metrics import compute_metric
from hf_lnfree.metrics import metric_info


class TokenPerplexity(evaluate.Metric):
    r"""
    $\exp(\sum_d \ell_d / \sum_d n_d)$ over documents, $\ell_d$ the negative log-likelihood of the $n_d$ tokens that
    follow the first of document $d$; documents longer than the context are read in overlapping windows.

    Returns perplexity with its interval_95 over documents, loss (nats a token) with its half_width_95.
    """

    def _info(self):
        return metric_info(self.__doc__)

    def _compute(self, predictions, model_id, **options):
        return compute_metric("perplexity", predictions, model_id, **options)
