"""Two studies row by row, paired by seed."""

from pathlib import Path

from ..errors import RunError
from ..tables import Table
from .cells import Cell
from .statistics import estimate
from .summary import by_row, data_of, measure_of, paired, scores, share


def compare_studies(one: Path, other: Path) -> Table:
    """
    Two studies row by row, over the seeds that both have.

    Raises:
        RunError: a folder without a study, or two without a common row, or judged by different measures.
    """
    found = [finished_cells(folder) for folder in (one, other)]
    common = [row for row in found[0] if row in found[1]]
    if not common:
        raise RunError(
            f"{one} and {other} have no finished row in common: {', '.join(found[0])}; {', '.join(found[1])}."
        )
    measures = {measure_of(of_study).name for of_study in found}
    if len(measures) > 1:
        raise RunError(f"{one} and {other} are judged by {' and by '.join(sorted(measures))}, which do not compare.")
    measure = measure_of(found[0])
    lines, same_data = [], True
    for row in common:
        before, after = found[0][row], found[1][row]
        gap = paired(after, before)
        hashes = {data_of(cells)["validation"]["sha256"] for cells in (before, after)}
        same_data = same_data and len(hashes) == 1
        lines.append(
            [
                row,
                *(measure.format(estimate(list(scores(cells).values()))) for cells in (before, after)),
                "no common seed" if gap is None else f"{measure.format_gap(gap)} ({counted(gap.seeds)})",
                *(share(cells, "overloaded") for cells in (before, after)),
            ]
        )
    names = [folder.name for folder in (one, other)]
    note = "Mean ± 95 % interval over seeds; the change is paired by seed."
    if not same_data:
        note += " The held-out data differ: perplexities of different data or tokenizers do not compare."
    header = [
        "row",
        *(f"{measure.name}, {name}" for name in names),
        "change",
        *(f"overloaded, {name}" for name in names),
    ]
    return Table(header, lines, note)


def counted(seeds: int) -> str:
    """ "1 seed" or "3 seeds"."""
    return f"{seeds} seed{'s' * (seeds != 1)}"


def finished_cells(folder: Path) -> dict[str, list[Cell]]:
    """The finished cells in the folder of a study, by row; RunError if there are none."""
    seeds = sorted(folder.glob("*/seed-*"), key=lambda p: (p.parent.name, int(p.name.removeprefix("seed-"))))
    cells = by_row([Cell(p.parent.name, int(p.name.removeprefix("seed-")), p).load() for p in seeds])
    if not cells:
        raise RunError(f"{folder} holds no finished cell of a study.")
    return cells
