"""One run a folder: a lock that dies with its process."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from ..errors import RunError
from ..files import sweep
from .arguments import LNFreeTrainingArguments

LOCK = ".lock"


class RunInUse(RunError):
    """Another process trains into the folder."""


@contextmanager
def only_run(args: LNFreeTrainingArguments) -> Iterator[None]:
    """
    While no other run may use `args.output_dir`; may be nested.

    Raises:
        RunInUse: another one does.
        RunError: started by torchrun without forming one group with its peers.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and args.world_size == 1:
        raise RunError(
            f"{launched} processes were launched, but each would train alone into {args.output_dir}. "
            "On the CPU pass --device cpu (or set ACCELERATE_USE_CPU=true)."
        )
    folder = Path(args.output_dir)
    with ExitStack() as stack:
        held = [True]
        if args.process_index == 0:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                # Released by the system when the process dies.
                stack.enter_context(FileLock(folder / LOCK, is_singleton=True).acquire(timeout=0))
                sweep(folder)
            except Timeout:
                held = [False]
        if not broadcast_object_list(held)[0]:
            raise RunInUse(f"Another process is training into {folder}. Wait, or give another --out.")
        yield
