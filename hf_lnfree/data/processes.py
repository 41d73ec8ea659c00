"""Processes that tokenise end with the one that started them, however it ends."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

POLL = 0.5  # seconds

_guarded = False


@contextmanager
def ending_with_us() -> Iterator[None]:
    """Around what forks: its processes leave Ctrl-C to this one, and exit when it is gone, even if it was killed."""
    global _guarded
    _guarded = True
    try:
        yield
    finally:
        _guarded = False


def after_fork() -> None:
    """In the child."""
    if _guarded:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # with which a pool ends its processes
        threading.Thread(target=exit_without, args=(os.getppid(),), daemon=True).start()


def exit_without(parent: int) -> None:
    """Waits until this process has another parent."""
    while os.getppid() == parent:
        time.sleep(POLL)
    os._exit(1)


if hasattr(os, "register_at_fork"):  # there is no fork on Windows
    os.register_at_fork(after_in_child=after_fork)
