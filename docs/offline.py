"""What built pages would load from other machines. Links that a reader follows are not loaded."""

import re
from collections.abc import Iterator
from pathlib import Path

LOADING = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)", re.I)
STYLES = re.compile(r"(?:@import\s+|url\()\s*[\"']?((?:https?:)?//[^\"')\s]+)", re.I)


def loads(folder: Path) -> Iterator[str]:
    """ "page: address" for everything under a folder that comes from another machine."""
    for path in sorted(folder.rglob("*")):
        patterns = {".html": (LOADING, STYLES), ".css": (STYLES,)}.get(path.suffix, ())
        for pattern in patterns:
            for address in pattern.findall(path.read_text(errors="replace")):
                yield f"{path.relative_to(folder)}: {address}"
