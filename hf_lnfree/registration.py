"""What transformers and PEFT must know of our models before the models are loaded.

transformers finds a checkpoint's configuration by its model_type; the classes of a configuration are registered where
they are defined (`hf_lnfree.models`). So one entry a family is enough here: looking it up loads `hf_lnfree.models`.
"""

import sys
from types import ModuleType

from wrapt import register_post_import_hook

# model_type -> its configuration, and the stock family whose modules have the same names
MODEL_TYPES = {"lnfree_gpt2": ("LNFreeGPT2Config", "gpt2"), "lnfree_gpt_neox": ("LNFreeGPTNeoXConfig", "gpt_neox")}


def announce_models() -> None:
    """Tell the two libraries, as soon as somebody imports them."""
    register_post_import_hook(add_configurations, "transformers.models.auto.configuration_auto")
    register_post_import_hook(add_peft_targets, "peft.utils.constants")


def add_configurations(configuration_auto: ModuleType) -> None:
    """As transformers declares its own: the name of a class, and the module that has it."""
    mapping = configuration_auto.CONFIG_MAPPING
    for model_type, (configuration, _) in MODEL_TYPES.items():
        mapping._mapping.setdefault(model_type, configuration)
        mapping._modules.setdefault(model_type, sys.modules[__package__])


def add_peft_targets(constants: ModuleType) -> None:
    """For every method of PEFT that has defaults for a stock family; in place, since methods import the mappings."""
    for name, mapping in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(mapping, dict):
            for model_type, (_, stock) in MODEL_TYPES.items():
                if stock in mapping:
                    mapping.setdefault(model_type, mapping[stock])
