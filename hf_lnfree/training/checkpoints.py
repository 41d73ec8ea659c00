"""Checkpoints that are whole or not there: written beside their place, moved when complete, and found again."""

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ..errors import RunError
from .arguments import LNFreeTrainingArguments
from .results import RESULTS

PARTIAL = ".partial-checkpoint"
BYTES_A_PARAMETER = 12  # weights and two moments, in float32

# transformers 5.17 asks torch.load for "cpu:0" in a group of processes on the CPU, which torch knows as "cpu" only.
torch.serialization.register_package(
    100, lambda storage: None, lambda storage, place: storage if place.startswith("cpu:") else None
)


class WholeCheckpoints(Trainer):
    """A [`Trainer`] that can be killed at any moment without leaving half a checkpoint under a checkpoint's name."""

    _writing = False

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, PARTIAL) if self._writing else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        partial = Path(super()._get_output_dir(trial), PARTIAL)
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
            rotate_checkpoints(
                output_dir=str(final.parent),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()
        if push:
            self._push_from_checkpoint(str(final))


def step_of(checkpoint: Path) -> int:
    """The optimiser step at which a checkpoint was saved."""
    return json.loads((checkpoint / TRAINER_STATE_NAME).read_text())["global_step"]


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a run's folder, oldest first; what is not whole is named in a warning."""
    found = [p for p in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.name.rpartition("-")[2].isdigit()]
    whole = [p for p in found if is_whole(p)]
    if broken := sorted(p.name for p in set(found) - set(whole)):
        warnings.warn(f"{folder} holds checkpoints that are not whole and are passed over: {broken}.", stacklevel=2)
    return sorted(whole, key=step_of)


def is_whole(checkpoint: Path) -> bool:
    """Whether the file that a Trainer writes last can be read."""
    try:
        step_of(checkpoint)
    except (OSError, ValueError, KeyError):
        return False
    return True


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
    if wanted is not None and how not in ("false", "last", "true", "auto"):
        if not is_whole(Path(wanted)):
            raise RunError(f"{wanted} is not a checkpoint of a run: it has no readable {TRAINER_STATE_NAME}.")
        return str(wanted)
    last = next(reversed(checkpoints(folder)), None) if folder.is_dir() else None
    if wanted is None or how == "false":
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
