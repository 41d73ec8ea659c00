"""What is timed of the door: importing the package, and the help of its commands, each in a process of its own."""

import subprocess
import sys
from collections.abc import Callable


def process(*arguments: str) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


def door_candidates(device: str) -> dict[str, Callable[[], object]]:
    """A Python process from start to end; the peer imports torch and transformers."""
    command = ("-m", "hf_lnfree.cli.main")
    return {
        "import torch, transformers": process("-c", "import torch, transformers"),
        "import torch, transformers, hf_lnfree": process("-c", "import torch, transformers, hf_lnfree"),
        "hf-lnfree --help": process(*command, "--help"),
        "hf-lnfree train --help": process(*command, "train", "--help"),
    }
