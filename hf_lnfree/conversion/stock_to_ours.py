"""A stock checkpoint as a model of ours: written shard by shard, or loaded."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..errors import ModelError
from ..files import atomic_folder
from ..loading import load_model
from ..models import LNFreeMixin
from .beside import copy_beside
from .checkpoint import Checkpoint
from .families import FAMILIES, blank, family_of, own_weights, placed, require_plain
from .planning import Plan, our_config, plan

FINITE_AT_A_TIME = 2**20  # entries looked at, which takes memory of their size


def convert_checkpoint(checkpoint: Checkpoint, out: Path, progress: bool = False, planned: Plan | None = None) -> Plan:
    """
    Write a stock checkpoint as one of ours: the same tensors, shard by shard, so that memory holds one of them.

    Raises:
        ModelError: as `plan`; or a tensor that is not finite or of no floating dtype. Nothing is written then.
    """
    result = planned or plan(checkpoint)
    with atomic_folder(out) as folder:
        write_checkpoint(checkpoint, result, folder, progress)
    return result


def write_checkpoint(checkpoint: Checkpoint, planned: Plan, folder: Path, progress: bool) -> None:
    """Weights, code, configuration and what lies beside, into a folder that is there."""
    weight_map: dict[str, str] = {}
    total = 0
    for number, file in enumerate(tqdm(checkpoint.files, desc="shards", disable=not progress), start=1):
        name = SAFE_WEIGHTS_NAME
        if len(checkpoint.files) > 1:
            name = f"model-{number:05d}-of-{len(checkpoint.files):05d}.safetensors"
        sizes = write_shard(checkpoint, file, planned, folder / name)
        weight_map |= dict.fromkeys(sizes, name)
        total += sum(sizes.values())
    if len(checkpoint.files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    save_code_and_config(planned.model_class, planned.config, folder)
    copy_beside(checkpoint.folder, folder)


def write_shard(checkpoint: Checkpoint, file: str, result: Plan, path: Path) -> dict[str, int]:
    """One shard under our names; returns the bytes of its tensors. Nothing of it is in memory afterwards."""
    tensors = {}
    for stored, tensor in checkpoint.shard(file).items():
        if stored in result.names:
            require_finite(stored, tensor)
            tensors[result.names[stored]] = tensor.contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    return {name: tensor.nbytes for name, tensor in tensors.items()}


def require_finite(name: str, tensor: Tensor) -> None:
    """Raise ModelError for a stored tensor that holds NaN or infinities, or no floating-point numbers at all."""
    if not tensor.is_floating_point():
        raise ModelError(f"{name} is stored as {tensor.dtype}, and a weight has floating-point numbers.")
    bad = sum(int((~part.isfinite()).sum()) for part in tensor.flatten().split(FINITE_AT_A_TIME))
    if not bad:
        return
    hint = ""
    if tensor.dtype == torch.float16:
        hint = (
            " float16 ends at 65504, and gains that were scaled to disable LayerNorm lie beyond: take float32 weights."
        )
    raise ModelError(f"{name} holds {bad} values that are not finite ({tensor.dtype}).{hint}")


def save_code_and_config(model_class: type[PreTrainedModel], config: PreTrainedConfig, folder: Path) -> None:
    """What `save_pretrained` writes beside the weights."""
    config = copy.deepcopy(config)
    config.architectures = [model_class.__name__]
    with torch.device("meta"):
        settings: Any = config  # transformers' annotation says dict, its own calls pass configurations
        custom_object_save(model_class(config), folder, config=settings)
    config.save_pretrained(folder)


def ours(model: PreTrainedModel) -> PreTrainedModel:
    """
    A stock model in memory as one of ours, a model of this package as it is.

    Raises:
        ModelError: another family, or a head that no class of ours has.
    """
    require_plain(model)
    if isinstance(model.base_model, LNFreeMixin):
        return model
    family = family_of(model.config.model_type)
    if type(model).__name__ not in family.classes:
        raise ModelError(f"There is no class of ours for {type(model).__name__}, only for {', '.join(family.classes)}.")
    config = our_config(family, model.config.to_dict())
    new = blank(family.classes[type(model).__name__], config, model.dtype, own_weights(model))
    new.load_state_dict(model.state_dict())
    if model.can_generate():
        new.generation_config = copy.deepcopy(model.generation_config)
    return placed(new, model.device).train(model.training)


def is_ours(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint's configuration is one of this package."""
    return checkpoint.config.get("model_type") in {family.config.model_type for family in FAMILIES.values()}


def load(checkpoint: Checkpoint) -> tuple[PreTrainedModel, list[str]]:
    """
    The model of a checkpoint, of ours or stock, as one of ours in the dtype of its weights, and what is to be said.

    Raises:
        ModelError: as `convert_checkpoint`.
    """
    if is_ours(checkpoint):
        family = family_of(checkpoint.config["model_type"])
        model_class = family.class_of(checkpoint.config.get("architectures"), checkpoint.shapes)
        return load_model(checkpoint.folder, model_class), []
    result = plan(checkpoint)
    tensors = {}
    for file in checkpoint.files:
        for stored, tensor in checkpoint.shard(file).items():
            if stored in result.names:
                require_finite(stored, tensor)
                tensors[result.names[stored]] = tensor
    model = blank(result.model_class, result.config, next(iter(tensors.values())).dtype, result.own)
    model.load_state_dict(tensors | result.values, strict=False)  # a tied head is not there, and norms that are none
    return model.eval(), result.notes
