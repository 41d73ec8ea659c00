"""A study: rows x seeds of one YAML file, each cell a run in a folder of its own, as far as it is not done yet."""

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args

from ..analysis.entropy_report import PAPER_RESULTS, EntropyReport
from ..checks import described, fits
from ..errors import RunError, SettingsError
from ..files import read_json, require_own, strict, write_json
from ..training.arguments import LNFreeTrainingArguments
from ..training.beginning import Beginning
from ..training.checkpoints import numbered
from ..training.lock import RunInUse, only_run
from ..training.log import Curve, curve, read_log
from ..training.results import ENTROPY, RESULTS, RunResults
from ..training.run import train
from ..training.settings import RunArguments, merge, parse_settings, read_settings, with_base

STUDY = "study.json"
OF_A_STUDY: dict[str, Any] = {
    **{"title": str | None, "about": str | None, "published": str | None},
    **{"rows": dict[str, str | dict] | None, "factors": dict[str, Any] | None},
    **{"scales": dict[str, dict | None] | None, "compare": list[list[str]] | None},
}
"""The fields of a study file that are not those of its rows, and what they hold."""
STUDY_FILES = (STUDY, "search.json", "rung-*/study.json", "*/seed-*")
Finish = Callable[[Path, LNFreeTrainingArguments], None]
"""What is done with a run that has ended: takes its folder and its arguments, like `hf_lnfree.pages.finish_run`."""


@dataclass(frozen=True)
class Study:
    """
    Args:
        title: of the report.
        about: what the report says first.
        rows: name -> the fields of `hf-lnfree train`, at the chosen scale.
        scale: name of that scale; "" for a file without scales.
        compare: pairs of rows (one, other) whose relative difference stands below the table.
        published: the key of the published perplexities that belong beside it.
    """

    title: str
    rows: dict[str, dict[str, Any]]
    about: str = ""
    scale: str = ""
    compare: Sequence[Sequence[str]] = ()
    published: str | None = None

    @classmethod
    def load(cls, path: Path, scale: str | None = None, changes: Mapping[str, Any] | None = None) -> "Study":
        """
        Read a study file.

        Args:
            path: YAML with `title`, `rows` (name -> a file of `hf-lnfree train`, or fields) and, if wanted, `base`
                (fields that all rows share), `about`, `compare`, `published` and `scales` (name -> fields that win).
                `factors` (field -> values, of the training or of the model's configuration) multiply the rows, or make
                them all when there are none.
            scale: one of the file's scales; the first by default.
            changes: fields that win over all others.

        Raises:
            SettingsError: no such file, scale or row, or a field or value that `hf-lnfree train` refuses.
        """
        values = read_settings(path)
        for name, hint in OF_A_STUDY.items():
            if name in values and not fits(values[name], hint):
                raise SettingsError(f"{path}: {name} must be {described(hint)}, got {values[name]!r}.")
        shared = {key: value for key, value in values.items() if key not in OF_A_STUDY}
        scales = values.get("scales") or {}
        if scale is not None and scale not in scales:
            raise SettingsError(f"{path} has no scale {scale!r}. It has: {', '.join(scales) or 'none'}.")
        scale = scale or next(iter(scales), "")
        scaled = with_base(scales.get(scale) or {}, path.parent)
        bases = values.get("rows") or ({"": {}} if values.get("factors") else None)
        if not isinstance(bases, dict):
            raise SettingsError(f"{path} is no study: `rows` must map names to files or fields, or `factors` be there.")
        rows = {}
        for (name, row), (label, chosen) in itertools.product(bases.items(), combinations(values.get("factors"), path)):
            given = row if isinstance(row, dict) else {"base": row}
            fields_ = merge(shared, with_base(given, path.parent))
            name = " ".join(filter(None, (name, label)))
            if name.startswith(".") or {"/", "\\"} & set(name):
                raise SettingsError(f"{path}: the row {name!r} becomes a folder: no / or \\ in it, and no dot first.")
            rows[name] = merge(merge(merge(fields_, scaled), chosen), changes or {})
            for place in ("out", "output_dir"):
                rows[name].pop(place, None)
            parse_settings(rows[name], f"{path}, row {name}", ["--out", "unused"])
        published, compare = values.get("published"), values.get("compare") or []
        if published is not None and published not in PAPER_RESULTS["eval_perplexity"]:
            raise SettingsError(f"published={published!r} is not known: {', '.join(PAPER_RESULTS['eval_perplexity'])}.")
        if wrong := [pair for pair in compare if len(pair) != 2]:
            raise SettingsError(f"{path}: compare must be a list of pairs like [one row, other row], got {wrong[0]!r}.")
        if unknown := {name for pair in compare for name in pair} - set(rows):
            raise SettingsError(f"{path} compares rows that it does not have: {', '.join(sorted(unknown))}.")
        title, about = values.get("title") or path.stem, values.get("about") or ""
        return cls(title, rows, about, scale, compare, published)

    def choose(self, rows: Sequence[str] | None) -> "Study":
        """With these rows only; all for None."""
        if unknown := [row for row in rows or () if row not in self.rows]:
            raise SettingsError(f"The study has no row {', '.join(unknown)}. It has: {', '.join(self.rows)}.")
        return replace(self, rows={row: fields for row, fields in self.rows.items() if rows is None or row in rows})

    def arguments(self, row: str, seed: int, folder: Path, **local: Any) -> RunArguments:
        """What `hf-lnfree train` would be told for one cell; `local` are fields that no result depends on."""
        settings = merge(self.rows[row], {"seed": seed, "resume_from_checkpoint": "auto", **local})
        return parse_settings(settings, row, ["--out", str(folder)])


def combinations(factors: Mapping[str, Sequence[Any]] | None, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("norm=dyt, ...", fields) for every combination of values; ("", {}) without factors."""
    factors = factors or {}
    if wrong := [name for name, values in factors.items() if not isinstance(values, list) or not values]:
        raise SettingsError(f"{path}: the factor {wrong[0]} must be a list of values.")
    of_a_run = {field.name for kind in get_args(RunArguments) for field in fields(kind)}
    for values in itertools.product(*factors.values()):
        chosen = dict(zip(factors, values, strict=True))
        label = ", ".join(f"{name}={value}" for name, value in chosen.items()).replace("/", "_")
        overrides = {name: chosen.pop(name) for name in set(chosen) - of_a_run}
        yield label, chosen | ({"config_overrides": overrides} if overrides else {})


@dataclass
class Cell:
    """One row with one seed."""

    row: str
    seed: int
    folder: Path
    running: bool = False
    """Whether another process trains it."""
    damage: str | None = None
    """Which of its files is damaged, and how."""
    results: RunResults | None = None
    entropy: EntropyReport | None = None
    log: list[dict[str, Any]] = field(default_factory=list)

    def load(self) -> "Cell":
        """Read what its folder holds; nothing counts before `results.json` is there, nor where a file is damaged."""
        try:
            Beginning.known(self.folder)
            if (self.folder / RESULTS).is_file():
                results, self.log = RunResults.load(self.folder), read_log(self.folder)
                report = self.folder / ENTROPY
                self.entropy = EntropyReport.load(report) if report.is_file() else None
                self.results = results
        except RunError as error:
            self.damage = str(error)
        return self

    @property
    def state(self) -> str:
        if self.damage is not None:
            return f"not read: {self.damage}"
        if self.results is None:
            unfinished = "interrupted" if self.folder.exists() else "to do"
            return "in another process" if self.running else unfinished
        return f"diverged at step {self.results.diverged_at}" if self.results.diverged else "finished"

    @property
    def name(self) -> str:
        return f"{self.row}, seed {self.seed}"

    def curve(self, key: str) -> Curve:
        return curve(self.log, key)


def cells_of(study: Study, seeds: Sequence[int], folder: Path, rows: Sequence[str] | None = None) -> list[Cell]:
    """The grid, seed by seed, so that whole sets of rows are done first."""
    chosen = study.choose(rows).rows
    return [Cell(row, seed, folder / row / f"seed-{seed}").load() for seed in seeds for row in chosen]


def run_study(
    study: Study,
    seeds: Sequence[int],
    folder: Path,
    rows: Sequence[str] | None = None,
    announce: Callable[[str], None] = print,
    finish: Finish | None = None,
    **local: Any,
) -> list[Cell]:
    """
    Train the cells that are not finished, in `folder`/ROW/seed-N; interrupted ones go on from their checkpoint.

    Several processes may share a folder: a cell in which another one is at work is passed over.

    Args:
        rows: only these.
        announce: takes a line about every cell.
        finish: called for each cell that was trained here, on every process.
        local: fields of `hf-lnfree train` that no result depends on, like `cache_dir` or `device`.

    Raises:
        SettingsError: cells were begun with other settings than the study has now, or settings that do not fit.
        RunError: the folder is not empty and holds no study, or the data have changed since a cell was trained.
    """
    cells = cells_of(study, seeds, folder, rows)
    check_study(study, folder, **local)
    keep_settings(study, folder)
    others = [cell.folder for cell in cells if cell.damage is None]
    started, trained = time.monotonic(), 0
    for index, cell in enumerate(cells, start=1):
        number = f"[{index}/{len(cells)}] {cell.name}"
        begun, arguments = cell.folder.exists(), study.arguments(cell.row, cell.seed, cell.folder, **local)
        try:
            with only_run(arguments[2]):  # from here on nobody else changes the cell
                if cell.load().results is not None or cell.damage is not None:
                    announce(f"{number}: {cell.state}, found in {cell.folder}")
                    continue
                to_do = sum(cell.results is None for cell in cells[index - 1 :])
                left = (time.monotonic() - started) / trained * to_do / 60 if trained else None
                announce(f"{number}: {'goes on' if begun else 'starts'}"
                         + (f", about {left:.0f} min left" if left is not None else ""))  # fmt: skip
                train(*arguments, beside=others)
                trained += 1
                if finish is not None:
                    finish(cell.folder, arguments[2])
        except RunInUse:
            cell.running = True
        announce(f"{number}: {cell.load().state}")
    return cells


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


def begun_with(folder: Path) -> Beginning | None:
    """What a cell was begun with, if there is something to lose: a checkpoint, or results."""
    if not (folder / RESULTS).is_file() and not numbered(folder):
        return None
    try:
        return Beginning.known(folder)
    except RunError:
        return None  # told of where the cell is loaded


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
