"""Models whose weights lie in shards on several processes (FSDP2): asked for, looked at, loaded from any checkpoint."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ..errors import RunError, listed
from .arguments import LNFreeTrainingArguments

WEIGHTS, MOMENTS = "pytorch_model_fsdp_0", "optimizer_0"  # folders of `torch.distributed.checkpoint`
WHOLE_MOMENTS = "optimizer.bin"  # by the names of parameters; optimizer.pt is by their places
UNREADABLE = (OSError, EOFError, ValueError, AttributeError, CheckpointException)


def asks_for_shards(args: LNFreeTrainingArguments) -> bool:
    """Whether `--fsdp` or the file of `accelerate launch` does; on TPUs XLA shards in a way of its own."""
    if args.fsdp:
        settings: Any = args.fsdp_config  # a mapping by now
        return not settings.get("xla", False)
    return asked("ACCELERATE_USE_FSDP")


def asked(variable: str) -> bool:
    """What `accelerate launch` tells the processes that it starts."""
    return os.environ.get(variable, "false").lower() == "true"


def shard_on_cpu(accelerator: Accelerator, args: LNFreeTrainingArguments) -> None:
    """
    Let accelerate shard what it prepares, on processes of the CPU.

    Its `AcceleratorState` reads FSDP settings for groups of accelerators alone; a group on the CPU gets DDP without a
    word. Everything after that, from `prepare` to checkpoints, works there too.
    """
    if torch.accelerator.is_available():
        raise RunError(
            "FSDP on the CPU is for machines without an accelerator: torch would put the shards on that. Leave out "
            "--device cpu, or hide the accelerator (CUDA_VISIBLE_DEVICES=)."
        )
    state = accelerator.state
    plugin = FullyShardedDataParallelPlugin(**(args.fsdp_plugin_args or {}))
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise RunError(
            "fsdp_offload_params moves weights from an accelerator to the CPU, where they are: leave it out."
        )
    if state.mixed_precision != "no":
        plugin.set_mixed_precision(state.mixed_precision)
    state.fsdp_plugin = plugin
    state.distributed_type = args.distributed_state.distributed_type = DistributedType.FSDP


def require_deepspeed(accelerator: Accelerator) -> None:
    """Raise RunError where accelerate passes over DeepSpeed without a word, as it does on the CPU."""
    if asked("ACCELERATE_USE_DEEPSPEED") and getattr(accelerator.state, "deepspeed_plugin", None) is None:
        raise RunError(
            f"DeepSpeed was asked for, and is not used on {accelerator.device.type}: drop its settings, or use FSDP2."
        )


def require_shards(accelerator: Accelerator) -> None:
    """Raise RunError unless accelerate shards weights, and in the way that this package reads."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        raise RunError(
            f"FSDP was asked for, and would not shard a run of {accelerator.num_processes} on {accelerator.device.type}"
            f" ({accelerator.distributed_type.value}): each process would hold all weights. On the CPU pass --device "
            "cpu, or drop the FSDP settings."
        )
    if plugin.fsdp_version != 2:
        raise RunError("FSDP1 flattens weights, and layers could not be looked at: set fsdp_version: 2 (FSDP2).")


def in_full_precision(policy: Any) -> Any:
    """
    Accelerate's own policy for bfloat16 and float16, with sums of gradients and what the model returns left in float32.

    It rounds the loss itself: in bfloat16 one of 5.08 is logged, and told as a perplexity, as 5.09375.
    """
    if policy is None or not policy.param_dtype == policy.reduce_dtype == policy.output_dtype:
        return policy  # none, or one that was asked for
    return replace(policy, reduce_dtype=torch.float32, output_dtype=None)


def reshard(model: nn.Module) -> None:
    """Free what a forward pass without a backward one leaves gathered, so that parameters are the optimiser's."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def own_class(model: nn.Module) -> Iterator[None]:
    """While it is saved a model has the class that it had before it was sharded: its code is what goes with it."""
    kind = type(model)
    if isinstance(model, FSDPModule):
        model.__class__ = next(base for base in kind.__bases__ if base is not FSDPModule)
    try:
        yield
    finally:
        model.__class__ = kind


def like(whole: Tensor, known: Tensor) -> Tensor:
    """A tensor that every process has in full, spread as another is."""
    if not isinstance(known, DTensor):
        return whole
    whole = whole.to(known.device)
    return distribute_tensor(whole, known.device_mesh, known.placements, src_data_rank=None)


# Checkpoints in shards


def are_whole(folder: Path) -> bool:
    """Whether the files that its metadata, which are written last, tell of are there in their full length."""
    try:
        ends: dict[str, int] = {}
        for place in read_metadata(folder).storage_data.values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        return all((folder / name).stat().st_size >= end for name, end in ends.items())
    except UNREADABLE:
        return False


def read_metadata(folder: Path) -> Metadata:
    """Which tensors there are, and where they lie."""
    return dcp.FileSystemReader(folder).read_metadata()


def load_sharded_weights(model: nn.Module, checkpoint: Path) -> None:
    """
    The weights of a checkpoint in shards, whatever number of processes wrote it, into a model that is sharded or not.

    Raises:
        RunError: tensors are missing, unexpected or of another shape. The model is as it was.
    """
    kept = StateDictOptions(ignore_frozen_params=isinstance(model, PeftModel), strict=not isinstance(model, PeftModel))
    weights: dict[str, Any] = get_model_state_dict(model, options=kept)
    stored: dict[str, Any] = read_metadata(checkpoint / WEIGHTS).state_dict_metadata
    stored = {name.removeprefix("model."): about for name, about in stored.items()}
    wrong = {
        "are missing": sorted(weights.keys() - stored.keys()),
        "are not the model's": sorted(stored.keys() - weights.keys()),
        "have another shape": [n for n in weights if n in stored and stored[n].size != weights[n].shape],
    }
    refuse(checkpoint, wrong)
    read(checkpoint / WEIGHTS, {"model": weights})
    set_model_state_dict(model, weights, options=kept)


def load_moments(model: nn.Module, optimizer: Optimizer, checkpoint: Path) -> None:
    """The optimiser's state of a checkpoint in any form, into the optimiser of a model that is sharded or not."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # of accelerate's wrapper
    reshard(model)
    if (checkpoint / MOMENTS).is_dir():
        stored = read_metadata(checkpoint / MOMENTS).state_dict_metadata
        if not any(name.startswith("optimizer.state.") for name in stored):
            return  # saved before the first step
        state = get_optimizer_state_dict(model, optimizer)
        read(checkpoint / MOMENTS, {"optimizer": state})
        set_optimizer_state_dict(model, optimizer, state)
        return
    name = WHOLE_MOMENTS if (checkpoint / WHOLE_MOMENTS).is_file() else "optimizer.pt"
    state = torch.load(checkpoint / name, map_location="cpu", weights_only=True)
    if name != WHOLE_MOMENTS:
        state = by_name(state, model, optimizer)
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))


def by_name(state: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """A state whose parameters are numbered, as an optimiser saves it, with their names."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    groups = [group | {"params": [ordered[number] for number in group["params"]]} for group in state["param_groups"]]
    return {"state": {ordered[number]: value for number, value in state["state"].items()}, "param_groups": groups}


def read(folder: Path, into: dict[str, Any]) -> None:
    """Fill tensors, each of them with what this process needs of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # said to every single process
        dcp.load(into, checkpoint_id=folder, no_dist=not dist.is_initialized())


def refuse(checkpoint: Path, wrong: dict[str, list[str]]) -> None:
    """Raise RunError for what is wrong with tensors of a checkpoint -> their names."""
    for what, names in wrong.items():
        if names:
            raise RunError(
                f"{checkpoint} cannot be gone on with: {len(names)} of its tensors {what} ({listed(names)}). Remove it "
                "to go on from the one before, or give another --out."
            )
