"""What transformers and PEFT must know of our models before the models are loaded.

transformers finds a checkpoint's configuration by its model_type; the classes of a configuration are registered where
they are defined (`hf_lnfree.models`). So one entry a family is enough here: looking it up loads `hf_lnfree.models`.
"""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from wrapt import register_post_import_hook, wrap_function_wrapper

# model_type -> its configuration, and the stock family whose modules have the same names
MODEL_TYPES = {
    "lnfree_bert": ("LNFreeBertConfig", "bert"),
    "lnfree_gpt2": ("LNFreeGPT2Config", "gpt2"),
    "lnfree_gpt_neox": ("LNFreeGPTNeoXConfig", "gpt_neox"),
    "lnfree_llama": ("LNFreeLlamaConfig", "llama"),
    "lnfree_opt": ("LNFreeOPTConfig", "opt"),
    "lnfree_qwen3": ("LNFreeQwen3Config", "qwen3"),
    "lnfree_t5": ("LNFreeT5Config", "t5"),
    "lnfree_vit": ("LNFreeViTConfig", "vit"),
    "lnfree_whisper": ("LNFreeWhisperConfig", "whisper"),
}

REPLACED = "lnfree_replaced"
"""The model_type on disk of models of other families whose norms were replaced; they are loaded as their stock type."""


def announce_models() -> None:
    """Tell the two libraries, as soon as somebody imports them."""
    register_post_import_hook(add_configurations, "transformers.models.auto.configuration_auto")
    register_post_import_hook(add_awq_scales, "transformers.integrations.awq")
    register_post_import_hook(add_peft_targets, "peft.utils.constants")
    register_post_import_hook(choose_norms, "peft.tuners.ln_tuning.model")
    register_post_import_hook(recognise_speech, "transformers.pipelines.automatic_speech_recognition")


def add_configurations(configuration_auto: ModuleType) -> None:
    """As transformers declares its own: the name of a class, and the module that has it."""
    mapping = configuration_auto.CONFIG_MAPPING
    names = {model_type: configuration for model_type, (configuration, _) in MODEL_TYPES.items()}
    for model_type, configuration in {REPLACED: "ReplacedConfig", **names}.items():
        mapping._mapping.setdefault(model_type, configuration)
        mapping._modules.setdefault(model_type, sys.modules[__package__])


def as_stock(mapping: dict[str, Any]) -> None:
    """Give our model types what a mapping has for the stock families; in place, since others import the mapping."""
    for model_type, (_, stock) in MODEL_TYPES.items():
        if stock in mapping:
            mapping.setdefault(model_type, mapping[stock])


def add_awq_scales(awq: ModuleType) -> None:
    """Which activation of an MLP has scales of its own in a checkpoint of AWQ."""
    as_stock(awq.AWQ_SCALES_MAPPINGS)


def add_peft_targets(constants: ModuleType) -> None:
    """For every method of PEFT that has defaults for a stock family."""
    for name, mapping in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(mapping, dict):
            as_stock(mapping)


def choose_norms(ln_tuning: ModuleType) -> None:
    """LNTuning takes every module with the name of a norm; a model of ours says which of them can be trained."""
    wrap_function_wrapper(ln_tuning, "LNTuningModel._prepare_adapter_config", prepare_norms)


def recognise_speech(recognition: ModuleType) -> None:
    """The pipeline knows Whisper by its model_type, and gives no other model time stamps and languages."""
    name = "AutomaticSpeechRecognitionPipeline._sanitize_parameters"
    wrap_function_wrapper(recognition, name, read_settings_of_whisper)


def read_settings_of_whisper(read: Callable[..., Any], pipeline: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What stands for the pipeline's reading of its settings, the first thing that asks what kind of model it has."""
    if pipeline.model.config.model_type == "lnfree_whisper":
        pipeline.type = "seq2seq_whisper"
    return read(*args, **kwargs)


def prepare_norms(prepare: Callable[..., Any], tuner: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What stands for LNTuning's choice of target modules; of other models it is LNTuning's own."""
    choose = getattr(tuner.model, "norms_to_tune", None)
    if choose is None:
        return prepare(*args, **kwargs)
    asked = args[0] if args else kwargs["peft_config"]
    chosen = choose(asked)
    for name, known in tuner.peft_config.items():
        if known is asked:
            tuner.peft_config[name] = chosen
    return chosen
