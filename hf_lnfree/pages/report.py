"""A self-contained HTML page out of sentences, tables and pictures; the only use of jinja2."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from ..files import write_text
from ..redaction import redactor
from ..tables import Table
from .inline import inline
from .plots import to_svg


@dataclass
class Verdict:
    """What a page says, in a sentence or two, and what that cannot say."""

    said: str
    limits: str = ""


@dataclass
class Picture:
    """A figure, what is written below it, and what it shows, for readers who do not see it."""

    figure: Figure
    caption: str
    alt: str

    @property
    def svg(self) -> str:
        return inline(to_svg(self.figure))


@dataclass
class Listing:
    """A text that is shown as it is: settings, environment, hashes."""

    text: str


@dataclass
class Fold:
    """Blocks that a reader opens by their summary."""

    summary: str
    blocks: Sequence["Block"]


@dataclass
class Choice:
    """
    One of several sets of blocks, chosen from a menu; without JavaScript all of them are shown.

    Args:
        label: of the menu. Menus with the same label choose together.
        options: name -> its blocks.
    """

    label: str
    options: Mapping[str, Sequence["Block"]]


@dataclass
class Timeline:
    """
    Maps of every head that a slider moves through training, drawn by the script; nothing without JavaScript.

    Args:
        data: `steps`, the S that were probed, of which there are two at least; `tokensAStep`, or None; `bound`, the
            largest entropy possible in nats, or None; `variants`, each with its `name`, `colour`, `dash` (of SVG) and
            `probes` [S][layers], a text for the heads of a layer as `timeline.packed` writes it; None for a step
            without a probe.
        caption: what is written below it.
    """

    data: Mapping[str, Any]
    caption: str

    @property
    def json(self) -> str:
        """The data as text that cannot end the `<script>` it stands in."""
        return json.dumps(self.data, allow_nan=False, separators=(",", ":")).replace("<", r"\u003c")


Block = str | Verdict | Table | Picture | Listing | Fold | Choice | Timeline


@dataclass
class Section:
    """A part of a page: a heading, and blocks in the order in which they are read."""

    heading: str
    blocks: Sequence[Block]


def write_report(path: str | Path, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Render the page; styles and pictures are inline, nothing is fetched, no text says a secret or the home folder."""
    redact = redactor()  # before a text is escaped, which may change how a folder is spelt
    environment = Environment(
        loader=PackageLoader("hf_lnfree.pages"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=lambda value: redact(value) if type(value) is str else value,
    )
    environment.filters["kind"] = lambda block: type(block).__name__
    page = environment.get_template("report.html").render(title=title, lead=lead, sections=sections)
    write_text(Path(path), page)
