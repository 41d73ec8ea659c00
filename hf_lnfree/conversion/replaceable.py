"""Which models can have their norms replaced, and still be saved, loaded and trained."""

from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel

from ..errors import ModelError, listed
from ..models.normfree import LNFreeMixin
from ..models.replaced import ReplacedMixin


def refuse(model: Any) -> None:
    """
    Raises:
        ModelError: what is given is no plain model of transformers.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"replace_norms takes a model of transformers, got {name}. Replace before a model is wrapped (by "
            "PEFT, torch.compile or DDP)."
        )
    if isinstance(model, LNFreeMixin):
        raise ModelError(
            f"{name} is a model of hf_lnfree: choose norm, final_norm and the activation in its configuration "
            f"({type(model.config).__name__}), or with from_pretrained(..., norm=...)."
        )
    if not isinstance(model, ReplacedMixin) and getattr(transformers, name, None) is not type(model):
        raise ModelError(
            f"{name} ({type(model).__module__}) is no public class of transformers, so what is saved of it could not "
            "be loaded by name. Use a class of transformers, or declare a family (docs/extending.md)."
        )
    if getattr(model, "is_quantized", False):
        raise ModelError(f"{name} is quantised. Replace its norms before: save that, and quantise while it is loaded.")
    if hasattr(model, "peft_config"):
        raise ModelError(f"{name} has adapters, which are put on what is there. Replace its norms first.")
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(places) > 1 or (places & {"cpu", "disk"} and model.device.type == "meta"):
        raise ModelError(f"{name} lies on several devices ({', '.join(sorted(places))}). Load it on one, and replace.")


def refuse_shared(model: nn.Module, paths: list[str]) -> None:
    """
    Raises:
        ModelError: one module serves in several places, where it could not stay one.
    """
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    for path in paths:
        if len(same := names[id(model.get_submodule(path))]) > 1:
            raise ModelError(f"One module stands at {listed(same)}, and what replaces it would not be one.")
