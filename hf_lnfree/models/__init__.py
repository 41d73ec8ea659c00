"""The models, and where they are registered with transformers' Auto classes; `registration` announces configurations.

This folder is flat and its files import each other with a single dot: save_pretrained copies them beside a checkpoint.
"""

import transformers
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from .activations import LearnableLeakyReLU, leaky_relu
from .modeling_lnfree_bert import (
    LNFreeBertConfig,
    LNFreeBertForMaskedLM,
    LNFreeBertForQuestionAnswering,
    LNFreeBertForSequenceClassification,
    LNFreeBertForTokenClassification,
    LNFreeBertModel,
)
from .modeling_lnfree_gpt2 import (
    LNFreeGPT2Config,
    LNFreeGPT2ForCausalLM,
    LNFreeGPT2ForQuestionAnswering,
    LNFreeGPT2ForSequenceClassification,
    LNFreeGPT2ForTokenClassification,
    LNFreeGPT2Model,
)
from .modeling_lnfree_gpt_neox import (
    LNFreeGPTNeoXConfig,
    LNFreeGPTNeoXForCausalLM,
    LNFreeGPTNeoXForQuestionAnswering,
    LNFreeGPTNeoXForSequenceClassification,
    LNFreeGPTNeoXForTokenClassification,
    LNFreeGPTNeoXModel,
)
from .modeling_lnfree_llama import (
    LNFreeLlamaConfig,
    LNFreeLlamaForCausalLM,
    LNFreeLlamaForQuestionAnswering,
    LNFreeLlamaForSequenceClassification,
    LNFreeLlamaForTokenClassification,
    LNFreeLlamaModel,
)
from .modeling_lnfree_opt import (
    LNFreeOPTConfig,
    LNFreeOPTForCausalLM,
    LNFreeOPTForQuestionAnswering,
    LNFreeOPTForSequenceClassification,
    LNFreeOPTModel,
)
from .modeling_lnfree_qwen3 import (
    LNFreeQwen3Config,
    LNFreeQwen3ForCausalLM,
    LNFreeQwen3ForQuestionAnswering,
    LNFreeQwen3ForSequenceClassification,
    LNFreeQwen3ForTokenClassification,
    LNFreeQwen3Model,
)
from .modeling_lnfree_t5 import (
    LNFreeT5Config,
    LNFreeT5EncoderModel,
    LNFreeT5ForConditionalGeneration,
    LNFreeT5ForQuestionAnswering,
    LNFreeT5ForSequenceClassification,
    LNFreeT5ForTokenClassification,
    LNFreeT5Model,
)
from .modeling_lnfree_vit import LNFreeViTConfig, LNFreeViTForImageClassification, LNFreeViTModel
from .modeling_lnfree_whisper import (
    LNFreeWhisperConfig,
    LNFreeWhisperForAudioClassification,
    LNFreeWhisperForConditionalGeneration,
    LNFreeWhisperModel,
)
from .normfree import LNFreeMixin, named_slopes
from .replaced import ReplacedConfig
from .sites import AttentionBranch, MLPBranch, StackSites

FAMILIES: dict[type[PreTrainedModel], tuple[type[PreTrainedModel], ...]] = {
    LNFreeGPT2Model: (
        LNFreeGPT2ForCausalLM,
        LNFreeGPT2ForSequenceClassification,
        LNFreeGPT2ForTokenClassification,
        LNFreeGPT2ForQuestionAnswering,
    ),
    LNFreeGPTNeoXModel: (
        LNFreeGPTNeoXForCausalLM,
        LNFreeGPTNeoXForSequenceClassification,
        LNFreeGPTNeoXForTokenClassification,
        LNFreeGPTNeoXForQuestionAnswering,
    ),
    LNFreeLlamaModel: (
        LNFreeLlamaForCausalLM,
        LNFreeLlamaForSequenceClassification,
        LNFreeLlamaForTokenClassification,
        LNFreeLlamaForQuestionAnswering,
    ),
    LNFreeOPTModel: (LNFreeOPTForCausalLM, LNFreeOPTForSequenceClassification, LNFreeOPTForQuestionAnswering),
    LNFreeQwen3Model: (
        LNFreeQwen3ForCausalLM,
        LNFreeQwen3ForSequenceClassification,
        LNFreeQwen3ForTokenClassification,
        LNFreeQwen3ForQuestionAnswering,
    ),
    LNFreeViTModel: (LNFreeViTForImageClassification,),
    LNFreeBertModel: (
        LNFreeBertForMaskedLM,
        LNFreeBertForSequenceClassification,
        LNFreeBertForTokenClassification,
        LNFreeBertForQuestionAnswering,
    ),
    LNFreeT5Model: (
        LNFreeT5ForConditionalGeneration,
        LNFreeT5EncoderModel,
        LNFreeT5ForSequenceClassification,
        LNFreeT5ForTokenClassification,
        LNFreeT5ForQuestionAnswering,
    ),
    LNFreeWhisperModel: (LNFreeWhisperForConditionalGeneration, LNFreeWhisperForAudioClassification),
}
"""The backbone of each family, and its heads."""

AUTO_CLASSES: dict[type[PreTrainedModel], str] = {
    LNFreeT5ForConditionalGeneration: "AutoModelForSeq2SeqLM",
    LNFreeT5EncoderModel: "AutoModelForTextEncoding",
    LNFreeWhisperForConditionalGeneration: "AutoModelForSpeechSeq2Seq",
}
"""Of the heads whose Auto class does not end as they do."""

for _backbone, _heads in FAMILIES.items():
    assert _backbone.config_class is not None
    _backbone.config_class.register_for_auto_class()
    _prefix = _backbone.__name__.removesuffix("Model")
    for _model in (_backbone, *_heads):
        _own = "AutoModel" + _model.__name__.removeprefix(_prefix).removesuffix("Model")
        _auto = AUTO_CLASSES.get(_model, _own)
        _model.register_for_auto_class(_auto)
        getattr(transformers, _auto).register(_model.config_class, _model, exist_ok=True)
# Entries that stock BERT, GPT-2, T5 and ViT have beside these.
transformers.AutoModelForTextEncoding.register(LNFreeBertConfig, LNFreeBertModel, exist_ok=True)
transformers.AutoModelForPreTraining.register(LNFreeGPT2Config, LNFreeGPT2ForCausalLM, exist_ok=True)
transformers.AutoModelForPreTraining.register(LNFreeT5Config, LNFreeT5ForConditionalGeneration, exist_ok=True)
modeling_auto.MODEL_FOR_IMAGE_MAPPING.register(LNFreeViTConfig, LNFreeViTModel, exist_ok=True)  # type: ignore[arg-type]

__all__ = [
    "AttentionBranch",
    "LNFreeBertConfig",
    "LNFreeBertForMaskedLM",
    "LNFreeBertForQuestionAnswering",
    "LNFreeBertForSequenceClassification",
    "LNFreeBertForTokenClassification",
    "LNFreeBertModel",
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
    "LNFreeLlamaConfig",
    "LNFreeLlamaForCausalLM",
    "LNFreeLlamaForQuestionAnswering",
    "LNFreeLlamaForSequenceClassification",
    "LNFreeLlamaForTokenClassification",
    "LNFreeLlamaModel",
    "LNFreeMixin",
    "LNFreeOPTConfig",
    "LNFreeOPTForCausalLM",
    "LNFreeOPTForQuestionAnswering",
    "LNFreeOPTForSequenceClassification",
    "LNFreeOPTModel",
    "LNFreeQwen3Config",
    "LNFreeQwen3ForCausalLM",
    "LNFreeQwen3ForQuestionAnswering",
    "LNFreeQwen3ForSequenceClassification",
    "LNFreeQwen3ForTokenClassification",
    "LNFreeQwen3Model",
    "LNFreeT5Config",
    "LNFreeT5EncoderModel",
    "LNFreeT5ForConditionalGeneration",
    "LNFreeT5ForQuestionAnswering",
    "LNFreeT5ForSequenceClassification",
    "LNFreeT5ForTokenClassification",
    "LNFreeT5Model",
    "LNFreeViTConfig",
    "LNFreeViTForImageClassification",
    "LNFreeViTModel",
    "LNFreeWhisperConfig",
    "LNFreeWhisperForAudioClassification",
    "LNFreeWhisperForConditionalGeneration",
    "LNFreeWhisperModel",
    "LearnableLeakyReLU",
    "MLPBranch",
    "ReplacedConfig",
    "StackSites",
    "leaky_relu",
    "named_slopes",
]
