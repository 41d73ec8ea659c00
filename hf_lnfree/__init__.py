"""Language models without LayerNorm for Hugging Face Transformers, and an analyzer of attention entropy.

Importing the package makes the models known to transformers' Auto classes and to PEFT. It loads neither: public names,
listed in `__init__.pyi`, are imported at their first use.
"""

import lazy_loader

from .registration import announce_models
from .version import __version__  # noqa: F401

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
announce_models()
