"""The cells of a study: one row with one seed, each a run in a folder of its own."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..analysis.entropy_report import EntropyReport
from ..errors import RunError
from ..tables import Table, html, number
from ..training.beginning import Beginning
from ..training.checkpoints import numbered
from ..training.log import Curve, curve, read_log
from ..training.results import ENTROPY, RESULTS, RunResults
from .statistics import MEASURES, estimate
from .study import Study


@dataclass(repr=False)
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

    def __repr__(self) -> str:
        found = self.results
        score = "" if found is None else f", {found.measure} {formatted(found)}"
        return f"<Cell {self.name}: {self.state}{score}>"


class Cells(list[Cell]):
    """The cells of a study; shows itself as a table, in a terminal and in a notebook."""

    def verdict(self) -> str:
        """In a sentence: how many there are in each state."""
        states = Counter(cell.state.partition(":")[0].partition(" at ")[0] for cell in self)
        return f"{len(self)} cells: {', '.join(f'{count} {state}' for state, count in states.items())}."

    def table(self) -> Table:
        """A line for each cell; shares of overloaded and collapsed heads where they were measured."""
        rows = []
        for cell in self:
            texts = ["", "", ""]
            if (found := cell.results) is not None:
                shares = (found.overloaded_heads, found.collapsed_heads)
                texts = [formatted(found)]
                texts += ["" if share is None else f"{number(100 * share, '.0f')} %" for share in shares]
            rows.append([cell.row, str(cell.seed), cell.state, *texts])
        measure = next((cell.results.measure for cell in self if cell.results is not None), "perplexity")
        return Table(["row", "seed", "state", measure, "overloaded", "collapsed"], rows)

    def __repr__(self) -> str:
        return f"{self.verdict()}\n{self.table()!r}"

    def _repr_html_(self) -> str:
        return html(self.table(), self.verdict())


def formatted(found: RunResults) -> str:
    """Perplexity or accuracy of a cell."""
    return MEASURES[found.measure].format(estimate([found.score]))


def cells_of(study: Study, seeds: Sequence[int], folder: Path, rows: Sequence[str] | None = None) -> Cells:
    """The grid, seed by seed, so that whole sets of rows are done first."""
    chosen = study.choose(rows).rows
    return Cells(Cell(row, seed, folder / row / f"seed-{seed}").load() for seed in seeds for row in chosen)


def begun_with(folder: Path) -> Beginning | None:
    """What a cell was begun with, if there is something to lose: a checkpoint, or results."""
    if not (folder / RESULTS).is_file() and not numbered(folder):
        return None
    try:
        return Beginning.known(folder)
    except RunError:
        return None  # told of where the cell is loaded
