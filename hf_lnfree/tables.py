"""A table of texts, for a terminal, a README or a paper; and numbers as texts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Table:
    """A header, rows of texts, and a note; the last `foot` rows are sums of the others."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    foot: int = 0

    @property
    def body(self) -> Sequence[Sequence[str]]:
        return self.rows[: len(self.rows) - self.foot]

    @property
    def sums(self) -> Sequence[Sequence[str]]:
        return self.rows[len(self.rows) - self.foot :]


def number(value: float, form: str) -> str:
    """A number in a format like ".3f"; "not finite" for NaN and infinities."""
    return format(value, form) if math.isfinite(value) else "not finite"


def markdown(table: Table) -> str:
    """The table for a README."""
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"{body}\n\n{table.note}\n" if table.note else f"{body}\n"


LATEX = {"\\": r"\textbackslash{}", "±": r"$\pm$", "≤": r"$\leq$", ">": "$>$", "<": "$<$"}
LATEX |= {character: f"\\{character}" for character in "%&_#${}"}


def latex(table: Table) -> str:
    """The table for a paper: a booktabs `tabular`, the note as a comment."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join("".join(LATEX.get(c, c) for c in cell) for cell in cells) + r" \\"

    note = "".join(f"% {text}\n" for text in table.note.splitlines())
    columns = "l" + "r" * (len(table.header) - 1)
    body = "\n".join([r"\toprule", line(table.header), r"\midrule", *map(line, table.rows), r"\bottomrule"])
    return f"{note}\\begin{{tabular}}{{{columns}}}\n{body}\n\\end{{tabular}}\n"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.0f} h"
