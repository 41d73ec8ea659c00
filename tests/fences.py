"""What stands between fences in the pages for users."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def fenced(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.S)


def commands(page: Path) -> list[str]:
    """Lines of the shell, without comments."""
    lines = "\n".join(fenced(page, "bash")).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]
