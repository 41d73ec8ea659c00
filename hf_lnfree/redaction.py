"""Secrets and the user's home folder, kept out of what a file says to others. Imports nothing heavy."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

SECRET_NAMES = re.compile(r"TOKEN(?![IS])|SECRET|PASSWORD|API_?KEY", re.IGNORECASE)  # not tokenizers, nor tokens


def secrets() -> list[str]:
    """What the environment of this process and its command line keep secret, the longest first."""
    flags = zip(sys.argv, sys.argv[1:], strict=False)
    assigned = (argument.partition("=")[::2] for argument in sys.argv)
    named = [*os.environ.items(), *((flag, value) for flag, value in (*flags, *assigned) if flag.startswith("--"))]
    found = {value for name, value in named if SECRET_NAMES.search(name) and len(value) >= 8}
    return sorted(found, key=len, reverse=True)  # one may be a part of another


def shareable(text: str) -> str:
    """What a file that is shared may say: secrets are `***`, the user's home folder is `~`."""
    return redactor()(text)


def redactor() -> Callable[[str], str]:
    """`shareable` for many texts: the environment is read once."""
    known, home = secrets(), str(Path.home())
    whole = re.compile(rf"(?<![\w.-]){re.escape(home)}(?![\w.-])")  # /root, not /root-of-it or /mnt/root

    def redact(text: str) -> str:
        for secret in known:
            text = text.replace(secret, "***")
        return text if home == os.sep else whole.sub("~", text)

    return redact
