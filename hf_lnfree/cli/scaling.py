"""`hf-lnfree scaling`: runs of studies into laws and differences, a few tables, and a page."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..errors import SettingsError
from ..files import require_own
from ..pages.scaling import scaling_tables, write_scaling_page
from ..studies.scaling import by_row, read_points, scaling_summary
from .study import announcer
from .tables import rich_table

SCALING = "scaling.json"


def scaling_command(
    studies: Sequence[Path],
    pairs: Sequence[str] | None,
    target: tuple[float, float],
    replicates: int,
    out: Path | None,
    console: Console,
) -> None:
    """Prints the tables, and writes the page into the folder `out` if there is one."""
    if out is not None:
        require_own(out, "scaling", [SCALING])
    points = read_points(studies)
    chosen = [parse_pair(text, list(by_row(points))) for text in pairs or ()]
    found = scaling_summary(points, chosen, target, replicates)
    announce = announcer(console)
    for table in scaling_tables(found):
        console.print(rich_table(table))
        announce(table.note + "\n")
    if out is not None:
        write_scaling_page(out, points, found, SCALING)
        announce(f"Report: {out / 'report.html'}")


def parse_pair(text: str, rows: Sequence[str]) -> tuple[str, str]:
    """ "SM+R,SM+G" as two rows that there are."""
    names = [name.strip() for name in text.split(",")]
    if len(names) != 2 or set(names) - set(rows):
        raise SettingsError(
            f"--pair takes two of the rows {', '.join(rows)} with a comma, like SM+R,SM+G; got {text!r}."
        )
    return names[0], names[1]
