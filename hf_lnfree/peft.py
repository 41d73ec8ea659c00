"""PEFT's default targets for our model types: those of the stock families, whose modules have the same names."""

from peft.utils import constants

from .models import LNFreeGPT2Config, LNFreeGPTNeoXConfig

STOCK = {"gpt2": LNFreeGPT2Config.model_type, "gpt_neox": LNFreeGPTNeoXConfig.model_type}


def register_targets() -> None:
    """For every method of PEFT that has defaults for a stock family; in place, since methods import the mappings."""
    for name, mapping in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(mapping, dict):
            for stock, ours in STOCK.items():
                if stock in mapping:
                    mapping.setdefault(ours, mapping[stock])


register_targets()
