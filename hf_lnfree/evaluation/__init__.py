"""Any causal language model on any text: perplexity, bits per byte, attention entropy, sparsity."""

from .evaluate import evaluate

__all__ = ["evaluate"]
