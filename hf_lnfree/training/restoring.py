"""The weights of a checkpoint put into a model in memory, to the last tensor."""

import json
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..errors import RunError, listed
from ..loading import all_finite

WEIGHTS, INDEX, PICKLED = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
ADAPTER = "adapter_model.safetensors"


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """
    Load what `save_pretrained` wrote, under the names that it has there.

    The host's Trainer takes a file's names for those of the model, and goes on with random weights where they differ,
    as for the head of GPT-NeoX, which files call embed_out.

    Raises:
        RunError: tensors are missing, unexpected, of another shape, or not finite. The model is as it was.
    """
    stored = read_weights(checkpoint, adapter=isinstance(model, PeftModel))
    if isinstance(model, PeftModel):
        compare(stored, get_peft_model_state_dict(model), checkpoint)
        set_peft_model_state_dict(model, stored)
        return
    own = model.state_dict()
    in_files = revert_weight_conversion(model, own) if isinstance(model, PreTrainedModel) else own
    compare(stored, in_files, checkpoint)
    names = {place(tensor): name for name, tensor in own.items()}
    model.load_state_dict({names[place(in_files[name])]: tensor for name, tensor in stored.items()}, strict=False)


def compare(stored: dict[str, Tensor], wanted: dict[str, Tensor], checkpoint: Path) -> None:
    """Raise RunError unless the tensors of a checkpoint are those of the model; of tied ones a file has one."""
    filled = {place(tensor) for name, tensor in wanted.items() if name in stored}
    wrong = {
        "are missing": [name for name, tensor in wanted.items() if place(tensor) not in filled],
        "are not the model's": [name for name in stored if name not in wanted],
        "have another shape": [n for n, x in stored.items() if n in wanted and x.shape != wanted[n].shape],
        "are not finite": [n for n, x in stored.items() if x.is_floating_point() and not all_finite(x)],
    }
    for what, names in wrong.items():
        if names:
            raise RunError(
                f"{checkpoint} cannot be gone on with: {len(names)} of its tensors {what} ({listed(names)}). Remove it "
                "to go on from the one before, or give another --out."
            )


def place(tensor: Tensor) -> tuple[int, torch.Size]:
    """Where a tensor lies in memory; tied ones lie in one place."""
    return tensor.data_ptr(), tensor.shape


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
