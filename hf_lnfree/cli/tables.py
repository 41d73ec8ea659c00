"""Tables in a terminal: no number and no word of a header is broken where the terminal is narrow."""

from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table as RichTable
from rich.text import Text

from ..tables import Table


@dataclass
class Fitted:
    """A table that is laid out for the terminal it is printed on."""

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield fitted(self.table, options.max_width)


def rich_table(table: Table) -> Fitted:
    """The table as a terminal shows it."""
    return Fitted(table)


def fitted(table: Table, width: int) -> RichTable:
    """Upright, headers over several lines if need be; a line for each cell where that does not fit either."""
    cells = [max((cell_len(row[index]) for row in table.rows), default=0) for index in range(len(table.header))]
    widths = [max(cell, *map(cell_len, head.split() or [""])) for cell, head in zip(cells, table.header, strict=True)]
    spare = width - 2 * (len(widths) - 1) - sum(widths)  # two spaces between columns
    if spare < 0:
        return sideways(table, width)
    shown = RichTable(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for heading, narrow in zip(table.header, widths, strict=True):
        more = min(spare, max(0, cell_len(heading) - narrow))
        spare -= more
        shown.add_column(Text(heading), width=narrow + more)
    for row in table.rows:
        shown.add_row(*map(Text, row))
    return shown


def sideways(table: Table, width: int) -> RichTable:
    """Of each row its cells below each other, each after its header; an empty line between rows."""
    shown = RichTable.grid(padding=(0, 2, 0, 0))
    shown.add_column(width=min(max(map(cell_len, table.header)), width // 2))
    shown.add_column(overflow="fold")
    for index, row in enumerate(table.rows):
        if index:
            shown.add_row()
        for heading, cell in zip(table.header, row, strict=True):
            shown.add_row(Text(heading), Text(cell))
    return shown
