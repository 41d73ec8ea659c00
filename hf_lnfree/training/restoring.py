"""The weights of a checkpoint put into a model in memory, to the last tensor; states of an optimiser as they were."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..loading import all_finite
from .shards import WEIGHTS as SHARDS
from .shards import like, load_sharded_weights, own_class, refuse

WEIGHTS, INDEX, PICKLED = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
ADAPTER = "adapter_model.safetensors"


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """
    Load what `save_pretrained` wrote, under the names that it has there, or the shards of a run that saved such.

    The host's Trainer takes a file's names for those of the model, and goes on with random weights where they differ,
    as for the head of GPT-NeoX, which files call embed_out.

    Raises:
        RunError: tensors are missing, unexpected, of another shape, or not finite. The model is as it was.
    """
    if (checkpoint / SHARDS).is_dir():
        load_sharded_weights(model, checkpoint)
        return
    stored = read_weights(checkpoint, adapter=isinstance(model, PeftModel))
    if isinstance(model, PeftModel):
        compare(stored, get_peft_model_state_dict(model), checkpoint)  # whole: shards have no adapters (`Procedure`)
        set_peft_model_state_dict(model, stored)
        return
    own = model.state_dict(keep_vars=True)  # tied ones are one object, whatever a process holds of it
    with own_class(model):  # names are reverted by the name of the class
        in_files = revert_weight_conversion(model, own) if isinstance(model, PreTrainedModel) else own
    compare(stored, in_files, checkpoint)
    names = {id(tensor): name for name, tensor in own.items()}
    spread = {names[id(in_files[name])]: like(tensor, in_files[name]) for name, tensor in stored.items()}
    model.load_state_dict(spread, strict=False)


def keep_dtypes(optimizer: torch.optim.Optimizer) -> None:
    """
    Let `load_state_dict` leave every state in the dtype that it was saved in.

    torch casts them to that of their parameter: float32 moments of bfloat16 weights, as Adafactor has them, would come
    back rounded, and the run go on as another one.
    """
    saved: dict[str, Any] = {}

    def before(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        saved.update(state)

    def after(optimizer: torch.optim.Optimizer) -> None:
        ids, parameters = (
            [parameter for group in groups for parameter in group["params"]]
            for groups in (saved["param_groups"], optimizer.param_groups)
        )
        for number, parameter in zip(ids, parameters, strict=True):
            for name, value in saved["state"].get(number, {}).items():
                if isinstance(value, Tensor) and value.dtype != optimizer.state[parameter][name].dtype:
                    optimizer.state[parameter][name] = value.to(parameter.device, copy=True)
        saved.clear()

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(after)


def compare(stored: dict[str, Tensor], wanted: dict[str, Tensor], checkpoint: Path) -> None:
    """Raise RunError unless the tensors of a checkpoint are those of the model; of tied ones a file has one."""
    filled = {id(tensor) for name, tensor in wanted.items() if name in stored}
    wrong = {
        "are missing": [name for name, tensor in wanted.items() if id(tensor) not in filled],
        "are not the model's": [name for name in stored if name not in wanted],
        "have another shape": [n for n, x in stored.items() if n in wanted and x.shape != wanted[n].shape],
        "are not finite": [n for n, x in stored.items() if x.is_floating_point() and not all_finite(x)],
    }
    refuse(checkpoint, wrong)


def read_weights(checkpoint: Path, adapter: bool = False) -> dict[str, Tensor]:
    """The tensors of a checkpoint as its files name them."""
    if adapter:
        return load_file(checkpoint / ADAPTER)
    if (checkpoint / WEIGHTS).is_file():
        return load_file(checkpoint / WEIGHTS)
    if (checkpoint / INDEX).is_file():
        shards = set(json.loads((checkpoint / INDEX).read_text())["weight_map"].values())
        return {name: tensor for shard in sorted(shards) for name, tensor in load_file(checkpoint / shard).items()}
    return torch.load(checkpoint / PICKLED, map_location="cpu", weights_only=True)
