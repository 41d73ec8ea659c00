"""Language models without LayerNorm for Hugging Face Transformers."""

from . import models
