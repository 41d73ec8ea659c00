"""Read by `evaluate.load` by its path; see `hf_lnfree.metrics`."""

import evaluate

from hf_lnfree.metrics import compute_metric
from hf_lnfree.metrics import metric_info


class BitsPerByte(evaluate.Metric):
    r"""
    $\sum_d \ell_d / (\ln 2 \sum_d b_d)$ over documents, with $b_d$ the bytes of UTF-8 that are predicted. Comparable
    between tokenizers.

    Returns bits_per_byte with its half_width_95 over documents.
    """

    def _info(self):
        return metric_info(self.__doc__)

    def _compute(self, predictions, model_id, **options):
        return compute_metric("bits_per_byte", predictions, model_id, **options)
