"""`hf-lnfree`: one command, and what its exit code says."""

import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from tqdm.contrib.logging import logging_redirect_tqdm

from ..errors import LNFreeError
from ..redaction import without_secrets
from . import measuring, sharing, training  # noqa: F401  (they add their commands to `app`)
from .app import app
from .help import TRACEBACK

INTERRUPTED, TERMINATED = 130, 143
errors = Console(stderr=True, emoji=False)  # a:b:c is no emoji


def share_the_machine() -> None:
    """Beside other work, let the threads of torch sleep while they wait for each other.

    OpenMP lets them spin, which is a quarter faster alone. On a busy machine each spins through the time of those that
    it waits for: a training step of two threads beside three other processes took three times as long as with this. It
    is read once, when torch is imported; what the user has set stays.
    """
    busy = hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1) / 2
    if busy and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["OMP_WAIT_POLICY"] = "passive"


def user_errors() -> tuple[type[Exception], ...]:
    """What a wrong argument, file or checkpoint raises; anything else is a defect and shows its traceback."""
    models = sys.modules.get("hf_lnfree.models.errors")  # heavy: of whoever has loaded it
    return LNFreeError, OSError, *([models.ConfigurationError] if models else ())


class Terminated(BaseException):
    """SIGTERM, which ends a command as Ctrl-C does: what is half-written goes, and so do its processes."""


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM inside raises Terminated."""

    def terminate(*_: Any) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # signals are those of the main thread
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: list[str] | None = None) -> int:
    """
    The console script.

    Returns:
        The exit code: 0 done, 1 wrong input, 2 wrong usage, 3 a run diverged, 130 interrupted, 143 terminated.
    """
    share_the_machine()
    given = sys.argv[1:] if arguments is None else arguments
    left = [argument for argument in given if argument != TRACEBACK[0]]
    warnings.filterwarnings("ignore", category=UserWarning, module="torch.utils.data")
    logging.basicConfig(format="%(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(discreet)
    logging.getLogger("hf_lnfree").setLevel(logging.INFO)
    try:
        with terminable(), logging_redirect_tqdm():  # a line above a progress bar, not behind it
            code = app(args=left, prog_name="hf-lnfree", standalone_mode=False) or 0
        if code == INTERRUPTED:  # typer has caught it
            errors.print("Interrupted.")
        return code
    except typer.Exit as stop:
        return stop.exit_code
    except typer.Abort:
        return INTERRUPTED
    except Terminated:
        errors.print("Terminated.")
        return TERMINATED
    except KeyboardInterrupt:
        errors.print("Interrupted.")
        return INTERRUPTED
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):
            error.show()  # type: ignore[attr-defined]
            return 2
        if left != list(given) or not isinstance(error, user_errors()):
            raise
        message = without_secrets(spoken(one_line(error), given))
        errors.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
        return 1


def discreet(record: logging.LogRecord) -> bool:
    """Take secrets out of what is logged."""
    record.msg, record.args = without_secrets(record.getMessage()), ()
    return True


def one_line(error: Exception) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def spoken(message: str, arguments: Sequence[str]) -> str:
    """A message in the words of the command: `study` and `demo` take the fields of a run by --set."""
    commands: dict[str, Any] = getattr(typer.main.get_command(app), "commands", {})
    command = commands.get(next((argument for argument in arguments if not argument.startswith("-")), ""))
    known = {name for param in command.params for name in param.opts} if command is not None else set()
    if "--set" not in known:
        return message
    known |= {argument.partition("=")[0] for argument in arguments}  # what was typed is quoted

    def set_field(found: re.Match[str]) -> str:
        flag, value = found[1], found[2] or "..."
        if flag is None or flag.replace("_", "-") in known:  # None: a whole command line, of whichever command
            return found[0]
        return f"--set {flag[2:].replace('-', '_')}={value}"

    return re.sub(r"hf-lnfree [^`;.]*|(?<![\w-])(--[a-z][\w-]*\w)(?: (\d+|no|auto)\b)?", set_field, message)


def leave_process_group() -> None:
    """Before the interpreter ends: a group that is taken down by it may abort the process."""
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    code = main()
    leave_process_group()
    sys.exit(code)
