"""Checkpoints that are whole and finite or not there: written beside their place, moved when complete, found again."""

import json
import logging
import os
import re
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.fsdp import StateDictType
from transformers import PreTrainedModel, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import RunError
from .arguments import LNFreeTrainingArguments
from .restoring import load_weights
from .results import RESULTS
from .rollback import first_spoilt
from .shards import are_whole, load_moments, own_class, reshard

PARTIAL = ".partial-checkpoint"
BYTES_A_PARAMETER = 12  # weights and two moments, in float32
# What a resumed run needs, and the names that it may have: FSDP writes folders.
PARTS = {
    "weights": ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors", "pytorch_model*"),
    "optimizer.pt": ("optimizer.pt", "optimizer.bin", "optimizer_*"),
    "scheduler.pt": ("scheduler.pt",),
    "rng_state.pth": ("rng_state*.pth",),
    TRAINER_STATE_NAME: (TRAINER_STATE_NAME,),
}

logger = logging.getLogger(__name__)

# transformers 5.17 asks torch.load for "cpu:0" in a group of processes on the CPU, which torch knows as "cpu" only.
torch.serialization.register_package(
    100, lambda storage: None, lambda storage, place: storage if place.startswith("cpu:") else None
)


class WholeCheckpoints(Trainer):
    """
    A [`Trainer`] that can be killed at any moment without leaving half a checkpoint under a checkpoint's name.

    A state that is not finite is not saved, and what is loaded fits the model to the last tensor.
    """

    _writing = False

    @property
    def unwrapped(self) -> Any:
        """The model without what distributes or compiles it; with its adapters, if it has some."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def first_spoilt(self, moments: bool = True) -> str | None:
        """The first tensor of weights (and of the optimiser's moments) that is not finite, on any process."""
        reshard(self.unwrapped)
        name = first_spoilt(self.unwrapped, self.optimizer if moments else None)
        return next(filter(None, gather_object([name])), None)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(self.unwrapped, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        own = checkpoint is not None and Path(checkpoint, OPTIMIZER_NAME).is_file()
        if checkpoint is None or self.is_deepspeed_enabled or (own and not self.is_fsdp_enabled):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        load_moments(self.unwrapped, self.optimizer, Path(checkpoint))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the host, which saves no model of a run with SHARDED_STATE_DICT: at the end it is put together."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None or self._writing:
            super().save_model(output_dir, _internal_call)
            return
        kept, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            plugin.state_dict_type = kept

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if state_dict is not None:  # what is tied was put together as often as it has a name
            tied = getattr(self.unwrapped, "all_tied_weights_keys", {})
            state_dict = {name: tensor for name, tensor in state_dict.items() if tied.get(name) not in state_dict}
        with own_class(self.unwrapped):
            super()._save(output_dir, state_dict)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            assert self.state.best_model_checkpoint is not None
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _run_dir(self, trial: Any) -> str:
        """The folder of the run, or of one trial of a search, wherever a checkpoint is written at the moment."""
        return super()._get_output_dir(trial)

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, PARTIAL) if self._writing else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if spoilt := self.first_spoilt():
            logger.warning("Step %d is not saved: %s is not finite.", self.state.global_step, spoilt)
            return
        partial = Path(self._run_dir(trial), PARTIAL)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        final = partial.with_name(name)
        push, self.args.push_to_hub, self._writing = self.args.push_to_hub, False, True
        try:
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # each writer has an error of its own
            shutil.rmtree(partial, ignore_errors=True)
            kept = checkpoints(partial.parent)
            raise OSError(
                f"The checkpoint of step {self.state.global_step} could not be written to {partial.parent}, where "
                f"{shutil.disk_usage(partial.parent).free / 1e9:.2f} GB are free: {error}. "
                f"{f'{kept[-1].name} is whole: go on from it' if kept else 'There is none to go on from'} with "
                "--resume-from-checkpoint auto."
            ) from error
        finally:
            self.args.push_to_hub, self._writing = push, False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if self.state.best_model_checkpoint == str(partial / name):
                self.state.best_model_checkpoint = str(final)
                self.state.save_to_json(str(partial / name / TRAINER_STATE_NAME))
            shutil.rmtree(final, ignore_errors=True)
            os.rename(partial / name, final)
            partial.rmdir()
            rotate(final, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        if push:
            self._push_from_checkpoint(str(final))


def step_of(checkpoint: Path) -> int:
    """The optimiser step at which a checkpoint was saved."""
    return json.loads((checkpoint / TRAINER_STATE_NAME).read_text())["global_step"]


def rotate(newest: Path, limit: int | None, best: str | None) -> None:
    """Remove checkpoints beside the newest until `limit` are left: first what is not whole, then the earliest step."""
    if limit is None or limit <= 0:
        return
    kept = {newest.name, Path(best or newest).name}
    others = [path for path in numbered(newest.parent) if path.name not in kept]
    others.sort(key=lambda path: (is_whole(path), int(path.name.rpartition("-")[2])))
    for path in others[: max(0, len(others) + len(kept) - limit)]:
        shutil.rmtree(path, ignore_errors=True)


def numbered(folder: Path) -> list[Path]:
    """Folders that a `Trainer` names by their step, and no others."""
    name = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-[0-9]+")
    return [p for p in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if name.fullmatch(p.name) and p.is_dir()]


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a run's folder, oldest first; what is not whole is named in a warning."""
    found = numbered(folder)
    whole = [p for p in found if is_whole(p)]
    if broken := sorted(p.name for p in set(found) - set(whole)):
        warnings.warn(f"{folder} holds checkpoints that are not whole and are passed over: {broken}.", stacklevel=2)
    return sorted(whole, key=step_of)


def has_weights(folder: Path) -> bool:
    """Whether a model was saved there."""
    return any(True for pattern in PARTS["weights"] for _ in folder.glob(pattern))


def is_whole(checkpoint: Path) -> bool:
    """Whether every part that a run goes on with can be read."""
    return missing_part(checkpoint) is None


def missing_part(checkpoint: Path) -> str | None:
    """The first of `PARTS` that is not there or cut off."""
    for part, patterns in PARTS.items():
        files = [path for pattern in patterns for path in checkpoint.glob(pattern)]
        if not files or not all(map(is_readable, files)):
            return part
    return None


def is_readable(path: Path) -> bool:
    """Whether a file is whole, as far as its format tells without reading all of it."""
    if path.is_dir():
        return are_whole(path)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                return True
        if path.name == TRAINER_STATE_NAME:
            return isinstance(step_of(path.parent), int)
        if path.suffix == ".json":
            shards = set(json.loads(path.read_text())["weight_map"].values())
            return all(is_readable(path.parent / shard) for shard in shards)
    except (OSError, ValueError, KeyError, SafetensorError):
        return False
    return zipfile.is_zipfile(path)


def goes_on(wanted: str | None) -> bool:
    """Whether `resume_from_checkpoint` asks for an earlier run, if there is one."""
    return wanted is not None and str(wanted).lower() != "false"


def find_checkpoint(folder: Path, wanted: str | None) -> str | None:
    """
    The checkpoint to resume from. Never starts over on top of an earlier run.

    Args:
        folder: of the run.
        wanted: None or "false" for a new run, "last" (or "true") for the newest, "auto" for the newest or a new run
            when there is none, or the path of a checkpoint.

    Raises:
        RunError: a run is there already, or what is wanted is not there.
    """
    how = str(wanted).lower()
    if wanted is not None and goes_on(wanted) and how not in ("last", "true", "auto"):
        if part := missing_part(Path(wanted)):
            raise RunError(f"{wanted} is not a checkpoint of a run: it has no readable {part}.")
        return str(wanted)
    last = next(reversed(checkpoints(folder)), None) if folder.is_dir() else None
    if not goes_on(wanted):
        if last is not None or (folder / RESULTS).exists():
            raise RunError(
                f"{folder} holds an earlier run. Pass --resume-from-checkpoint last to go on with it, or give another "
                "--out."
            )
        return None
    if last is None and how != "auto":
        raise RunError(f"{folder} holds no checkpoint to resume from.")
    return None if last is None else str(last)


def require_room(folder: Path, model: PreTrainedModel, args: LNFreeTrainingArguments) -> None:
    """Raise OSError when not even one checkpoint would fit on the disk."""
    needed = BYTES_A_PARAMETER * model.num_parameters()
    free = shutil.disk_usage(folder).free
    if args.save_strategy != "no" and free < needed:
        raise OSError(
            f"A checkpoint takes {needed / 1e9:.2f} GB and {folder} has room for {free / 1e9:.2f} GB. Make room, give "
            "another --out, or pass --save-strategy no."
        )
