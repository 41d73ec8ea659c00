"""The models, and where they are registered with transformers' Auto classes; `registration` announces configurations.

This folder is flat and its files import each other with a single dot: save_pretrained copies them beside a checkpoint.
"""

import transformers

from .activations import LearnableLeakyReLU, leaky_relu
from .configuration_lnfree import LNFreeGPT2Config, LNFreeGPTNeoXConfig
from .modeling_lnfree_gpt2 import (
    LNFreeGPT2ForCausalLM,
    LNFreeGPT2ForQuestionAnswering,
    LNFreeGPT2ForSequenceClassification,
    LNFreeGPT2ForTokenClassification,
    LNFreeGPT2Model,
)
from .modeling_lnfree_gpt_neox import (
    LNFreeGPTNeoXForCausalLM,
    LNFreeGPTNeoXForQuestionAnswering,
    LNFreeGPTNeoXForSequenceClassification,
    LNFreeGPTNeoXForTokenClassification,
    LNFreeGPTNeoXModel,
)
from .normfree import LNFreeMixin, named_slopes
from .sites import AttentionBranch, MLPBranch, StackSites

AUTO_CLASSES = {
    "AutoModel": (LNFreeGPT2Model, LNFreeGPTNeoXModel),
    "AutoModelForCausalLM": (LNFreeGPT2ForCausalLM, LNFreeGPTNeoXForCausalLM),
    "AutoModelForSequenceClassification": (
        LNFreeGPT2ForSequenceClassification,
        LNFreeGPTNeoXForSequenceClassification,
    ),
    "AutoModelForTokenClassification": (LNFreeGPT2ForTokenClassification, LNFreeGPTNeoXForTokenClassification),
    "AutoModelForQuestionAnswering": (LNFreeGPT2ForQuestionAnswering, LNFreeGPTNeoXForQuestionAnswering),
}

for _config in (LNFreeGPT2Config, LNFreeGPTNeoXConfig):
    _config.register_for_auto_class()
for _auto, _classes in AUTO_CLASSES.items():
    for _model in _classes:
        _model.register_for_auto_class(_auto)
        getattr(transformers, _auto).register(_model.config_class, _model, exist_ok=True)
# As of the stock families: GPT-2 has an entry, GPT-NeoX has none.
transformers.AutoModelForPreTraining.register(LNFreeGPT2Config, LNFreeGPT2ForCausalLM, exist_ok=True)

__all__ = [
    "AttentionBranch",
    "LNFreeGPT2Config",
    "LNFreeGPT2ForCausalLM",
    "LNFreeGPT2ForQuestionAnswering",
    "LNFreeGPT2ForSequenceClassification",
    "LNFreeGPT2ForTokenClassification",
    "LNFreeGPT2Model",
    "LNFreeGPTNeoXConfig",
    "LNFreeGPTNeoXForCausalLM",
    "LNFreeGPTNeoXForQuestionAnswering",
    "LNFreeGPTNeoXForSequenceClassification",
    "LNFreeGPTNeoXForTokenClassification",
    "LNFreeGPTNeoXModel",
    "LNFreeMixin",
    "LearnableLeakyReLU",
    "MLPBranch",
    "StackSites",
    "leaky_relu",
    "named_slopes",
]
