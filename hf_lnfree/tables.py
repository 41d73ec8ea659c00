"""A table of texts, for a terminal, a notebook, a README or a paper; numbers and long names as texts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import chain

LARGEST_SHOWN = 24  # rows in a notebook


@dataclass(repr=False)
class Table:
    """A header, rows of texts, of which the last `foot` are sums of the others, and a note.

    Shows itself in a terminal and in a notebook.
    """

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

    def __repr__(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        texts = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        return "\n".join([*texts, *filter(None, [self.note])])

    def _repr_html_(self) -> str:
        return html(self)


def number(value: float, form: str) -> str:
    """A number in a format like ".3f"; "not finite" for NaN and infinities."""
    return format(value, form) if math.isfinite(value) else "not finite"


def shorten(name: str, length: int = 24) -> str:
    """The end of a long name, where paths differ."""
    return name if len(name) <= length else "…" + name[1 - length :]


def markdown(table: Table) -> str:
    """The table for a README."""
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"{body}\n\n{table.note}\n" if table.note else f"{body}\n"


def html(table: Table, lead: str = "") -> str:
    """The table for a notebook, a sentence above it; of many rows, the first and the last."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    rows, half = list(table.rows), LARGEST_SHOWN // 2
    if len(rows) > LARGEST_SHOWN:
        rows = [*rows[:half], ["…"] * len(table.header), *rows[-half:]]
    body = "".join(chain([line(table.header, "th")], (line(row, "td") for row in rows)))
    parts = [f"<p>{escape(lead)}</p>" if lead else "", f"<table>{body}</table>" if rows else ""]
    return "<div>" + "".join(parts) + (f"<p>{escape(table.note)}</p>" if table.note else "") + "</div>"


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
