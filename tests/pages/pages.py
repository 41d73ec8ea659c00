"""A page as a reader of HTML sees it."""

import json
import math
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "link", "br", "img", "input", "hr"}


@dataclass(eq=False)
class Element:
    tag: str
    attributes: dict[str, str | None] = field(default_factory=dict)
    parent: "Element | None" = None
    children: list["Element | str"] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag: str, **attributes: str) -> list["Element"]:
        """Every element below with that tag and those attributes, in the order of the page."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                same = all(child.attributes.get(key.strip("_")) == value for key, value in attributes.items())
                found += [child] * (child.tag == tag and same) + child.all(tag, **attributes)
        return found

    def inside(self, tag: str) -> bool:
        return self.parent is not None and (self.parent.tag == tag or self.parent.inside(tag))


class Reader(HTMLParser):
    """Builds the tree, and finds every element closed where it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.root = self.here = Element("page")

    def handle_starttag(self, tag, attrs):
        element = Element(tag, dict(attrs), self.here)
        self.here.children.append(element)
        if tag not in VOID:
            self.here = element

    def handle_startendtag(self, tag, attrs):
        self.here.children.append(Element(tag, dict(attrs), self.here))

    def handle_endtag(self, tag):
        assert tag == self.here.tag, f"</{tag}> closes <{self.here.tag}>"
        self.here = self.here.parent

    def handle_data(self, data):
        self.here.children.append(data)


def read(path: Path) -> Element:
    reader = Reader()
    reader.feed(path.read_text())
    reader.close()
    assert reader.here is reader.root
    return reader.root


def held(page: Element) -> list[dict]:
    """The data of every timeline of a page, with its heads in nats."""
    found = [json.loads(figure.all("script")[0].text) for figure in page.all("figure", class_="timeline")]
    for variant in (variant for data in found for variant in data["variants"]):
        variant["probes"] = [probe and [nats(layer) for layer in probe] for probe in variant["probes"]]
    return found


def nats(layer: str) -> list[float]:
    """Of two digits of base 36 a head, in hundredths."""
    pairs = [layer[i : i + 2] for i in range(0, len(layer), 2)]
    return [math.nan if pair == "--" else int(pair, 36) / 100 for pair in pairs]
