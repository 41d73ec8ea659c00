"""Training the cells of a study that are not done yet, one after the other or side by side."""

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback

from ..errors import RunError, SettingsError
from ..files import read_json, require_own, strict, write_json
from ..training.arguments import LNFreeTrainingArguments
from ..training.beginning import Beginning
from ..training.build import load_run_data
from ..training.lock import RunInUse, only_run
from ..training.results import RESULTS
from ..training.run import train
from ..training.settings import RunArguments
from .cells import Cell, Cells, begun_with, cells_of
from .side_by_side import Job, Report, shares, side_by_side
from .study import Study

STUDY = "study.json"
STUDY_FILES = (STUDY, "search.json", "rung-*/study.json", "*/seed-*")
Finish = Callable[[Path, LNFreeTrainingArguments], None]
"""What is done with a run that has ended: takes its folder and its arguments, like `hf_lnfree.pages.finish_run`."""
SECONDS_A_REPORT = 0.5


def run_study(
    study: Study,
    seeds: Sequence[int],
    folder: Path,
    rows: Sequence[str] | None = None,
    announce: Callable[[str], None] = print,
    finish: Finish | None = None,
    jobs: int | Literal["auto"] = 1,
    **local: Any,
) -> Cells:
    """
    Train the cells that are not finished, in `folder`/ROW/seed-N; interrupted ones resume from their checkpoint.

    Several processes may share a folder: a cell in which another one is at work is passed over.

    Args:
        rows: only these.
        announce: takes a line about every cell.
        finish: called for each cell that was trained here, on every process. With several jobs it must be a function
            of a module, since other processes call it.
        jobs: how many cells are trained at once, each in another process with an equal share of the threads; what is
            printed meanwhile stands in ROW/console-N.txt. "auto": one on an accelerator or under torchrun, else one
            a core. With 1 they are trained in this process.
        local: fields of `hf-lnfree train` that no result depends on, like `cache_dir` or `device`.

    Raises:
        SettingsError: cells were begun with other settings than the study has now, or settings that do not fit.
        RunError: the folder is not empty and holds no study, or the data have changed since a cell was trained; with
            several jobs also when cells failed for any reason, once all others are trained.
    """
    cells = cells_of(study, seeds, folder, rows)
    check_study(study, folder, **local)
    keep_settings(study, folder)
    beside = [cell.folder for cell in cells if cell.damage is None]
    to_do = [cell for cell in cells if cell.results is None and cell.damage is None]
    for cell in cells:
        if cell not in to_do:
            announce(f"{cell.name}: {cell.state}, found in {cell.folder}")
    if not to_do:
        return cells
    every = [study.arguments(cell.row, cell.seed, cell.folder, **local) for cell in to_do]
    at_once, threads = shares(jobs, len(to_do), every[0][2].device)
    if at_once == 1:
        in_turn(to_do, every, beside, finish, announce)
        return cells
    texts = {(model.model_name_or_path, repr(data)): (model, data) for model, data, _ in every}
    for model_args, data_args in texts.values():
        load_run_data(model_args, data_args)  # tokenised once, for all processes
    queue = [
        Job(
            cell.name,
            cell.folder.with_name(f"console-{cell.seed}.txt"),
            partial(train_elsewhere, study, cell, beside, finish, local),
        )
        for cell in to_do
    ]
    failed = side_by_side(queue, at_once, threads, announce)
    for cell in to_do:
        cell.load()
    if failed:
        name, why = next(iter(failed.items()))
        raise RunError(f"{len(failed)} of {len(queue)} cells failed. The first, {name}: {why}")
    return cells


def in_turn(
    cells: Sequence[Cell],
    every: Sequence[RunArguments],
    beside: Sequence[Path],
    finish: Finish | None,
    announce: Callable[[str], None],
) -> None:
    """One cell after the other, in this process."""
    started, trained = time.monotonic(), 0
    for index, (cell, arguments) in enumerate(zip(cells, every, strict=True), start=1):
        number, to_do = f"[{index}/{len(cells)}] {cell.name}", sum(cell.results is None for cell in cells[index - 1 :])
        left = f", about {(time.monotonic() - started) / trained * to_do / 60:.0f} min left" if trained else ""
        begin = partial(announce, f"{number}: {'resumes' if cell.folder.exists() else 'starts'}{left}")
        trained += train_cell(cell, arguments, beside, finish, begin)
        announce(f"{number}: {cell.load().state}")


def train_elsewhere(
    study: Study, cell: Cell, beside: Sequence[Path], finish: Finish | None, local: dict[str, Any], report: Report
) -> str:
    """A cell in another process than the study's; returns its state."""
    arguments = study.arguments(cell.row, cell.seed, cell.folder, **local)
    train_cell(cell, arguments, beside, finish, callbacks=[ReportSteps(report)])
    return cell.load().state


def train_cell(
    cell: Cell,
    arguments: RunArguments,
    beside: Sequence[Path],
    finish: Finish | None,
    begin: Callable[[], None] = lambda: None,
    callbacks: Sequence[TrainerCallback] = (),
) -> bool:
    """
    Train a cell, unless another process trains it or has just done so.

    Args:
        begin: called before the training.

    Returns:
        Whether it was trained here.
    """
    try:
        with only_run(arguments[2]):  # from here on nobody else changes the cell
            if cell.load().results is not None or cell.damage is not None:
                return False
            begin()
            train(*arguments, beside=beside, callbacks=callbacks)
            if finish is not None:
                finish(cell.folder, arguments[2])
            return True
    except RunInUse:
        cell.running = True
        return False


def check_study(study: Study, folder: Path, **local: Any) -> None:
    """
    Raises:
        RunError: the folder is not empty and holds no study.
        SettingsError: its cells, chosen or not, were begun with other settings than the study has now.
    """
    require_own(folder, "study", STUDY_FILES)
    differences: dict[str, None] = {}
    for row in study.rows:
        for place in sorted((folder / row).glob("seed-*")):
            seed = place.name.removeprefix("seed-")
            known = begun_with(place)
            if known is not None and seed.isdecimal():
                now = Beginning.planned(*study.arguments(row, int(seed), place, **local))
                finished = (place / RESULTS).is_file()
                refused = [change for change in known.changes_to(now, finished) if not change.allowed]
                differences |= dict.fromkeys(f"{row}: {change}" for change in refused)
    if differences:
        raise SettingsError(
            f"{folder} holds cells that were begun with other settings ({'; '.join(differences)}). Undo the "
            "change, or give another --out."
        )


def keep_settings(study: Study, folder: Path) -> None:
    """Write the settings down, beside those of rows that were begun and are not in the study any more."""
    path = folder / STUDY
    then = read_json(path)["rows"] if path.is_file() else {}
    begun = {row: fields for row, fields in then.items() if any((folder / row).glob("seed-*"))}
    if is_first_process():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"title": study.title, "scale": study.scale, "rows": begun | strict(study.rows)})


def is_first_process() -> bool:
    """Of those that torchrun or accelerate launched; before they know each other."""
    return os.environ.get("RANK", "0") == "0"


class ReportSteps(TrainerCallback):
    """Says every half second how far a run is."""

    def __init__(self, report: Report):
        self.report, self.last = report, 0.0

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if time.monotonic() - self.last > SECONDS_A_REPORT:
            self.last = time.monotonic()
            self.report(state.global_step, state.max_steps)
