"""What a result file must say about where its numbers are from."""

import functools
import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .redaction import secrets, shareable, without_secrets
from .version import __version__

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "peft", "numpy")


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Versions, device and threads; the device is the GPU, if there is one, unless the work was done on another."""
    cuda = torch.cuda.is_available() if device is None else device.type == "cuda"
    return {
        "hf_lnfree": __version__,
        "python": platform.python_version(),
        **package_versions(),
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu, {torch.get_num_threads()} threads",
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


@functools.cache
def package_versions() -> dict[str, str]:
    """Read once: a probe asks at each of its measurements."""
    return {name: version(name) for name in PACKAGES}


def command() -> str:
    """The command line, without the place of an installed program, secrets and the user's home folder."""
    program = Path(sys.argv[0])
    words = [program.name if program.is_absolute() else str(program), *sys.argv[1:]]
    known = secrets()
    return shareable(shlex.join(without_secrets(word, known) for word in words))  # before a word is quoted


def on_hub(name: str | None) -> str | None:
    """The name of a model or dataset, if it is no path of this machine."""
    return None if name is None or Path(name).expanduser().exists() else name
