"""`hf-lnfree study`, `demo` and `compare`: a file and seeds into a study, then a table."""

from collections.abc import Callable, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console

from ..errors import SettingsError
from ..files import write_text
from ..pages.finish import finish_run
from ..pages.study import write_study_report
from ..studies.cells import Cell, cells_of
from ..studies.comparison import compare_studies
from ..studies.running import check_study, is_first_process, run_study
from ..studies.search import SEARCH, search_layers
from ..studies.study import Study
from ..tables import latex, markdown
from .tables import rich_table
from .train import DIVERGED

DEMO = Path(str(files("hf_lnfree") / "studies" / "demo.yaml"))


def announcer(console: Console) -> Callable[[str], None]:
    """Prints a line as it is, however long."""
    return partial(console.print, highlight=False, soft_wrap=True, markup=False)


def study_command(
    file: Path,
    scale: str | None,
    seeds: Sequence[int] | None,
    folder: Path,
    rows: Sequence[str] | None,
    dry_run: bool,
    change: Sequence[str] | None,
    jobs: int | Literal["auto"],
    local: dict[str, Any],
    console: Console,
) -> int:
    """One study, its tables and its page; returns the exit code."""
    study = Study.load(file, scale, parse_changes(change or ()))
    seeds = seeds or study.seeds
    local = {key: value for key, value in local.items() if value}
    announce = announcer(console)
    check_study(study, folder, **local)  # nothing is written over a study of other settings
    if dry_run:
        for cell in cells_of(study, seeds, folder, rows):
            announce(f"{cell.name}: {cell.state}")
        return 0
    try:
        run_study(study, seeds, folder, rows, announce, finish_run, jobs, **local)
    finally:  # an interrupted study shows what it has
        cells = everything(study, seeds, folder)
        table = write_study_report(study, cells, folder) if is_first_process() else None
    if table is not None:
        console.print(rich_table(table))
        announce(table.note)
        announce(f"Report: {folder / 'report.html'}")
    chosen = [cell for cell in cells if cell.seed in seeds and (rows is None or cell.row in rows)]
    diverged = [cell for cell in chosen if cell.results and cell.results.diverged]
    for cell in diverged:
        announce(f"{cell.name} {cell.state}: see {cell.folder / 'flight_recorder.json'}")
    if damaged := [cell for cell in chosen if cell.damage]:
        announce(
            f"{len(damaged)} of {len(chosen)} cells could not be read: move their folders away to train them anew."
        )
        return 1
    return DIVERGED if diverged else 0


def search_command(
    file: Path,
    scale: str | None,
    rows: Sequence[str] | None,
    pair: str,
    budget: int,
    seeds: Sequence[int] | None,
    folder: Path,
    change: Sequence[str] | None,
    jobs: int | Literal["auto"],
    local: dict[str, Any],
    console: Console,
) -> int:
    """One search; returns the exit code."""
    study = Study.load(file, scale, parse_changes(change or ())).choose(rows)
    values = [value.strip() for value in pair.split(",")]
    announce = announcer(console)
    local = {key: value for key, value in local.items() if value}
    found = search_layers(study, values, budget, seeds or study.seeds, folder, announce, finish_run, jobs, **local)
    announce(f'layer_activations: "{found["layer_activations"]}"')
    announce(f"Every rung: {folder / SEARCH}")
    return 0


def parse_seeds(text: str | None) -> list[int] | None:
    """ "0,1,2" as numbers; None for those of the file."""
    if text is None:
        return None
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise SettingsError(
            f"--seeds must be whole numbers with commas between them, like 0,1,2; got {text!r}."
        ) from None
    if len(set(seeds)) != len(seeds):
        raise SettingsError(f"--seeds names a seed twice: {text}.")
    return seeds


def parse_jobs(text: str) -> int | Literal["auto"]:
    """ "auto" or a number."""
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise SettingsError(f"--jobs must be auto or a whole number from 1 on, got {text!r}.")
    return int(text)


def everything(study: Study, seeds: Sequence[int], folder: Path) -> list[Cell]:
    """Every seed that the folder holds, whichever this command was asked for."""
    found = {int(p.name.removeprefix("seed-")) for p in folder.glob("*/seed-*")}
    return cells_of(study, sorted(found | set(seeds)), folder)


def parse_changes(changes: Sequence[str]) -> dict[str, Any]:
    """["field=value", ...] as fields and values, read as YAML."""
    parsed: dict[str, Any] = {}
    for text in changes:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise SettingsError(f"--set takes field=value, for instance --set max_steps=100; got {text!r}.")
        try:
            parsed[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SettingsError(f"--set {text!r} is not YAML after the equals sign: {error}") from error
    return parsed


def compare_command(one: Path, other: Path, out: Path | None, console: Console) -> None:
    """Print the comparison of two studies, and write it into the folder `out` if there is one."""
    table = compare_studies(one, other)
    console.print(rich_table(table))
    console.print(table.note, highlight=False, markup=False)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "comparison.md", markdown(table))
        write_text(out / "comparison.tex", latex(table))
