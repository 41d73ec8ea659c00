"""What arguments with a few values may be, said once for functions and for the command line, which reads them early.

Nothing heavy is imported here: `hf-lnfree --help` needs it.
"""

from typing import Literal, get_args

Method = Literal["auto", "fused", "attentions"]
"""Where attention entropies come from: queries, keys and mask, the maps of eager attention, or what there is."""

Maximum = Literal["observed", "causal", "log_length"]
"""The entropy that counts as 100 %."""
MAXIMA: tuple[Maximum, ...] = get_args(Maximum)

Metric = Literal["perplexity", "bits_per_byte", "entropy", "sparsity"]
"""What `evaluate` measures."""

Target = Literal["lnfree", "folded", "fused", "stock", "onnx"]
"""What `convert` writes."""

Encoding = Literal["published", "power_of_two"]
"""Of LayerNorms that do nothing in a stock model: an epsilon of 1e12, or of 2^60."""

Dtype = Literal["float32", "float64", "bfloat16", "float16"]
"""Of converted weights, as torch names it."""

Precision = Literal["float64", "float32"]
"""Of an attribution, as torch names it."""
