"""What a result file must say about where its numbers are from."""

import functools
import os
import platform
import re
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .version import __version__

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "peft", "numpy")
SECRET_NAMES = re.compile(r"TOKEN(?![IS])|SECRET|PASSWORD|API_?KEY", re.IGNORECASE)  # not tokenizers, nor tokens


def environment() -> dict[str, Any]:
    """Versions, device and threads."""
    cuda = torch.cuda.is_available()
    return {
        "hf_lnfree": __version__,
        "python": platform.python_version(),
        **package_versions(),
        "device": torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads",
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


@functools.cache
def package_versions() -> dict[str, str]:
    """Read once: a probe asks at each of its measurements."""
    return {name: version(name) for name in PACKAGES}


def command() -> str:
    """The command line, without the place of an installed program, secrets and the user's home folder."""
    program = Path(sys.argv[0])
    line = shlex.join([program.name if program.is_absolute() else str(program), *sys.argv[1:]])
    return shareable(line)


def secrets() -> list[str]:
    """What the environment of this process and its command line keep secret."""
    flags = zip(sys.argv, sys.argv[1:], strict=False)
    assigned = (argument.partition("=")[::2] for argument in sys.argv)
    named = [*os.environ.items(), *((flag, value) for flag, value in (*flags, *assigned) if flag.startswith("--"))]
    return [value for name, value in named if SECRET_NAMES.search(name) and len(value) >= 8]


def shareable(text: str) -> str:
    """What a file that is shared may say: secrets are `***`, the user's home folder is `~`."""
    for secret in secrets():
        text = text.replace(secret, "***")
    return text.replace(str(Path.home()), "~")
