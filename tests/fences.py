"""What stands between fences in the pages for users."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


def fenced(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.S)


def commands(page: Path) -> list[str]:
    """Lines of the shell, without comments."""
    lines = "\n".join(fenced(page, "bash")).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]


@dataclass(frozen=True)
class Block:
    """A block of code of a page, and what the page says that it prints; None where it says nothing."""

    language: str
    code: str
    printed: str | None


def blocks(page: Path) -> list[Block]:
    """The commands and the Python of a page, in order."""
    found = re.findall(r"```(bash|python)\n(.*?)```(?:\n\n```text\n(.*?)```)?", page.read_text(), flags=re.S)
    return [Block(language, code, printed or None) for language, code, printed in found]
