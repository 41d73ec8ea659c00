"""`log.jsonl`: its writer, its one reader, and the curves in it."""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from ..errors import RunError
from ..files import json_line, replace_file

LOG = "log.jsonl"
Entry = Mapping[str, Any]
Curve = list[tuple[float, float]]
"""(step, value) of every entry that has the value."""


class JsonlLog(TrainerCallback):
    """
    `log.jsonl` in the output folder: one line for each entry of log_history, written as it comes.

    A line is strict JSON; a number that is not finite is null. A resumed run begins with the history of its checkpoint,
    so no step stands there twice.

    Args:
        folder: gives the output folder; each trial of a hyperparameter search has one of its own.

    Attributes:
        besides: what the next entry holds besides its numbers. Other callbacks are not given it: a tracker draws a
            chart for each number, and refuses lists.
    """

    def __init__(self, folder: Callable[[], Path]):
        self.folder = folder
        self.besides: dict[str, Any] = {}

    @property
    def path(self) -> Path:
        return self.folder() / LOG

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.begin(state)

    def begin(self, state: TrainerState) -> None:
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.path, "".join(f"{json_line(entry)}\n" for entry in state.log_history))

    def on_log(self, args, state, control, **kwargs) -> None:
        state.log_history[-1].update(self.besides)
        self.besides = {}
        if state.is_world_process_zero and self.path.exists():
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json_line(state.log_history[-1]) + "\n")


def read_log(folder: Path) -> list[dict[str, Any]]:
    """
    The entries of a run's `log.jsonl`; null is NaN.

    Raises:
        RunError: there is no log, or one of its lines is damaged.
    """
    path = folder / LOG
    if not path.is_file():
        raise RunError(f"{folder} holds no {LOG}.")
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            entries.append({key: null_as_nan(value) for key, value in entry.items()})
        except (ValueError, AttributeError) as error:
            raise RunError(f"{path} is damaged in line {number}: {error}.") from error
    return entries


def null_as_nan(value: Any) -> Any:
    """A value of a log, or a list of them, with NaN where JSON says null."""
    if isinstance(value, list):
        return [null_as_nan(item) for item in value]
    return math.nan if value is None else value


def curve(entries: Iterable[Entry], key: str) -> Curve:
    """(step, value) of every entry that has the key."""
    return [(entry["step"], entry[key]) for entry in entries if key in entry]


def layer_curves(entries: Iterable[Entry], key: str) -> dict[str, list[Curve]]:
    """
    By part the curve of `key`/layer_00, `key`/layer_01, ... over steps. A model of one part has the part ""; an
    encoder-decoder has `key`/encoder/layer_00 and so on. Nothing where the log does not have it.
    """
    entries = list(entries)
    layers = re.compile(rf"{re.escape(key)}/(?:(.+)/)?layer_\d+")
    names: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for entry in entries for name in entry):  # parts in the order of the model
        if found := layers.fullmatch(name):
            names.setdefault(found[1] or "", []).append(name)
    return {part: [curve(entries, name) for name in sorted(of_part)] for part, of_part in names.items()}


def layer_panels(name: str, entries: Iterable[Entry], key: str) -> dict[str, list[Curve]]:
    """The same by what a panel of it is called: the name, and the part if there are several."""
    return {f"{name}, {part}" if part else name: curves for part, curves in layer_curves(entries, key).items()}
