"""Secrets and the user's home folder, kept out of what a file says to others. Imports nothing heavy."""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Not tokenizers, counts of tokens, or the marks of a tokenizer.
SECRET_NAMES = re.compile(
    r"(?<!FIRST.)(?<!BOS.)(?<!EOS.)(?<!PAD.)(?<!UNK.)(?<!SEP.)(?<!CLS.)(?<!MASK.)TOKEN(?![IS])"
    r"|SECRET|PASSWORD|API_?KEY",
    re.IGNORECASE,
)
ASSIGNED = re.compile(r"""([\w-]+)["']?\s*[=:]\s*(?:"([^"]*)"|'([^']*)'|([^\s,{}\[\]]+))""")
"""A name and its value, as a flag, YAML and JSON have them."""
RECOGNISED = re.compile(r"(?<=://)[^\s/?#@]+(?=@)|\bhf_[A-Za-z0-9]{30,}\b")
"""Who logs in by a URL, and tokens of the Hub."""
SHORTEST = 8  # what is shorter stands by chance in other words

told: set[str] = set()  # by settings that were read


def keep_secret(settings: Mapping[Any, Any]) -> None:
    """Take what settings call a token, key or password, at any depth, for a secret from now on."""
    told.update(secret_values(nested(settings)))


def secrets() -> list[str]:
    """What the environment of this process, its command line and its settings keep secret, the longest first."""
    flags = ((flag, value) for flag, value in zip(sys.argv, sys.argv[1:], strict=False) if flag.startswith("--"))
    named = [*os.environ.items(), *flags, *(pair for argument in sys.argv for pair in assigned(argument))]
    return sorted(told | secret_values(named), key=len, reverse=True)  # one may be a part of another


def assigned(text: str) -> Iterator[tuple[str, str]]:
    """Every name that a text gives a value, and the value; also where one assignment is the value of another."""
    for found in ASSIGNED.finditer(text):
        value = found[2] or found[3] or found[4] or ""
        yield found[1], value
        yield from assigned(value)


def nested(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """What mappings and lists hold, by the key that is nearest."""
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from nested(child, str(key))
    elif isinstance(value, (list, tuple)):
        for child in value:
            yield from nested(child, name)
    else:
        yield name, value


def is_secret(name: str) -> bool:
    """Whether what has that name is a token, a key or a password."""
    return SECRET_NAMES.search(name) is not None


def secret_values(named: Iterable[tuple[str, Any]]) -> set[str]:
    """The values whose names are those of secrets."""
    return {v for name, v in named if isinstance(v, str) and len(v) >= SHORTEST and is_secret(name)}


def shareable(text: str) -> str:
    """What a file that is shared may say: secrets are `***`, the user's home folder is `~`."""
    return redactor()(text)


def without_secrets(text: str, known: Sequence[str] | None = None) -> str:
    """What the screen may say: secrets are `***`; those of now, unless they are `known`."""
    for secret in secrets() if known is None else known:
        text = text.replace(secret, "***")
    return RECOGNISED.sub("***", text)


def redactor() -> Callable[[str], str]:
    """`shareable` for many texts: the environment is read once."""
    known, home = secrets(), str(Path.home())
    whole = re.compile(rf"(?<![\w.-]){re.escape(home)}(?![\w.-])")  # /root, not /root-of-it or /mnt/root

    def redact(text: str) -> str:
        text = without_secrets(text, known)
        return text if home == os.sep else whole.sub("~", text)

    return redact
