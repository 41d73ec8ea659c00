"""SVG of matplotlib, made to stand several times inside one page: with ids of its own, and small."""

import hashlib
import re
from collections import Counter

NOTHING = re.compile(r'<metadata>.*?</metadata>\s*| transform="rotate\(-0 [^"]*"|(?<=\n)\s+', re.DOTALL)
COORDINATES = re.compile(r'(?<= )(?:d|x|y)="[^"]*"')
FONT = "font-family: 'DejaVu Sans', sans-serif; "
WRAPPED = re.compile(r"<g>\s*(<text [^<]*</text>)\s*</g>")
DIGITS = re.compile(r"(\.[1-9])\d*|\.0\d*")
COMMAND = re.compile(r"\s*([A-Za-z])\s*")
STYLE = re.compile(r'style="([^"]*)"')
OFTEN = 3  # times, from which a style is said once


def inline(svg: str) -> str:
    """The `<svg>` element of a document, without what does not show."""
    svg = NOTHING.sub("", svg[svg.index("<svg") :])
    svg = svg.replace(FONT, "").replace("<svg ", f'<svg style="{FONT}" ', 1)
    svg = COORDINATES.sub(lambda found: COMMAND.sub(r"\1", DIGITS.sub(r"\1", found[0])), svg)
    return own_ids(styles_once(re.sub(r">\s+<", "><", WRAPPED.sub(r"\1", svg))))


def styles_once(svg: str) -> str:
    """The SVG with every style that stands in it often as a class, of a name that no other picture has."""
    own = f"s{hashlib.sha256(svg.encode()).hexdigest()[:8]}"
    often = [style for style, count in Counter(STYLE.findall(svg)).items() if count >= OFTEN]
    names = {style: f"{own}{index}" for index, style in enumerate(often)}
    rules = "".join(f".{name}{{{style}}}" for style, name in names.items())
    svg = STYLE.sub(lambda found: f'class="{names[found[1]]}"' if found[1] in names else found[0], svg)
    return svg.replace(">", f"><style>{rules}</style>", 1) if rules else svg


def own_ids(svg: str) -> str:
    """
    The SVG with the ids that it refers to made its own, and no others.

    matplotlib gives the parts of every figure the same ids; where the first picture of a page is hidden, the others
    would lose what they clip with.
    """
    own = f"p{hashlib.sha256(svg.encode()).hexdigest()[:8]}-"
    wanted = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: f' id="{own}{found[1]}"' if found[1] in wanted else "", svg)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{own}", svg)
