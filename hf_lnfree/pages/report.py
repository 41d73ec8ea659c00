"""A self-contained HTML page out of paragraphs, tables and figures; the only use of jinja2."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from ..files import write_text
from ..redaction import redactor
from ..tables import Table
from .plots import to_svg


@dataclass
class Picture:
    """A figure and what is written below it."""

    figure: Figure
    caption: str

    @property
    def svg(self) -> str:
        return to_svg(self.figure)


@dataclass
class Section:
    """A part of a page: paragraphs, then tables, then figures, then folded texts."""

    heading: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Picture] = ()
    details: dict[str, str] = field(default_factory=dict)
    """Folded texts by their heading: settings, environment, hashes."""


def write_report(path: str | Path, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Render the page; styles and pictures are inline, nothing is fetched, no text says a secret or the home folder."""
    redact = redactor()  # before a text is escaped, which may change how a folder is spelt
    environment = Environment(
        loader=PackageLoader("hf_lnfree.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: redact(value) if type(value) is str else value,
    )
    page = environment.get_template("report.html").render(title=title, lead=lead, sections=sections)
    write_text(Path(path), page)
