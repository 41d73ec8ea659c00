"""A self-contained HTML page out of paragraphs, tables and figures; the only use of jinja2."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from .plots import to_svg


@dataclass
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass
class Picture:
    figure: Figure
    caption: str

    @property
    def svg(self) -> str:
        return to_svg(self.figure)


@dataclass
class Section:
    heading: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Picture] = ()
    details: dict[str, str] = field(default_factory=dict)
    """Folded texts by their heading: settings, environment, hashes."""


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


def write_report(path: str | Path, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Render the page; styles and pictures are inline, nothing is fetched."""
    environment = Environment(loader=PackageLoader("hf_lnfree.analysis"), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template("report.html").render(title=title, lead=lead, sections=sections)
    Path(path).write_text(page, encoding="utf-8")
