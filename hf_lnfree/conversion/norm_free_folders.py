"""Models whose norms were replaced, out to a folder and in again."""

from pathlib import Path
from typing import Any, cast

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import ModelError
from ..models.normfree import PLACE
from ..models.replaced import ReplacedMixin, model_class


def save_norm_free(model: PreTrainedModel, folder: str | Path, **kwargs: Any) -> None:
    """
    `model.save_pretrained(folder, **kwargs)` for a model that `replace_norms` changed, and for no other.

    The folder has the stock weights, what was replaced in its config.json, and the code that a process without
    hf_lnfree needs to load it, with `trust_remote_code=True`.

    Raises:
        ModelError: nothing was replaced in the model.
    """
    if not isinstance(model, ReplacedMixin):
        raise ModelError(f"Nothing was replaced in {type(model).__name__}: save it with save_pretrained.")
    model.save_pretrained(folder, **kwargs)


def load_norm_free(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """
    The model in a folder, or a repository of the Hub, that `save_norm_free` wrote; of the class that was saved.

    Args:
        kwargs: as for `from_pretrained`.

    Raises:
        ModelError: nothing was replaced in what is there.
        OSError: there is no model.
    """
    place = {name: kwargs[name] for name in PLACE if name in kwargs}
    stored, _ = PreTrainedConfig.get_config_dict(folder, **place)
    if "replacements" not in stored:
        raise ModelError(
            f"{folder} is no model that replace_norms changed: its config.json says nothing of replacements. Load it "
            "with an Auto class of transformers."
        )
    stock = getattr(transformers, stored["architectures"][0])
    return cast(PreTrainedModel, model_class(stock).from_pretrained(folder, **kwargs))
