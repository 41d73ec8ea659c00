"""`hf-lnfree`: one command, and what its exit code says."""

import logging
import sys
import warnings

import typer
from rich.console import Console
from rich.markup import escape

from ..errors import LNFreeError
from . import measuring, sharing, training  # noqa: F401  (they add their commands to `app`)
from .app import app
from .help import TRACEBACK

errors = Console(stderr=True)


def user_errors() -> tuple[type[Exception], ...]:
    """What a wrong argument, file or checkpoint raises; anything else is a defect and shows its traceback."""
    models = sys.modules.get("hf_lnfree.models.errors")  # heavy: of whoever has loaded it
    return LNFreeError, OSError, *([models.ConfigurationError] if models else ())


def main(arguments: list[str] | None = None) -> int:
    """The console script. Exit codes: 0 done, 1 wrong input, 2 wrong usage, 3 a run diverged, 130 interrupted."""
    given = sys.argv[1:] if arguments is None else arguments
    left = [argument for argument in given if argument != TRACEBACK[0]]
    warnings.filterwarnings("ignore", category=UserWarning, module="torch.utils.data")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_lnfree").setLevel(logging.INFO)
    try:
        return app(args=left, prog_name="hf-lnfree", standalone_mode=False) or 0
    except typer.Exit as stop:
        return stop.exit_code
    except typer.Abort:
        return 130
    except KeyboardInterrupt:
        errors.print("Interrupted.")
        return 130
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):
            error.show()  # type: ignore[attr-defined]
            return 2
        if left != list(given) or not isinstance(error, user_errors()):
            raise
        errors.print(f"[bold red]error:[/] {escape(one_line(error))}", highlight=False, soft_wrap=True)
        return 1


def one_line(error: Exception) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def leave_process_group() -> None:
    """Before the interpreter ends: a group that is taken down by it may abort the process."""
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    code = main()
    leave_process_group()
    sys.exit(code)
