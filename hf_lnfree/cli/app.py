"""The program that all commands belong to. What a command needs is imported when it runs, not when it is declared."""

import os
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any

import typer
from rich.console import Console

from ..version import __version__
from .help import GENERAL, Command, Group, examples

app = typer.Typer(
    name="hf-lnfree",
    cls=Group,
    help="LayerNorm-free language models: train them, run studies, measure attention entropy.",
    epilog="`hf-lnfree COMMAND --help` shows the options of a command.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console(emoji=False, quiet=os.environ.get("RANK", "0") != "0")  # of several processes the first one speaks


def command(name: str, group: str, *lines: str, cls: type[Command] = Command) -> Callable[..., Any]:
    """A decorator that adds a command to the app, in a group of the help, with example lines below it."""
    return app.command(name, cls=cls, rich_help_panel=group, epilog=examples(*lines))


def say(text: str) -> None:
    """A line as it is, however long."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def names(text: str) -> list[str]:
    """The parts of a text with commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def print_version(wanted: bool) -> None:
    """Of this package and of the two that it stands on; then the command ends."""
    if wanted:
        typer.echo("\n".join([f"hf_lnfree {__version__}", *(f"{p} {version(p)}" for p in ("torch", "transformers"))]))
        raise typer.Exit()


@app.callback()
def common(  # noqa: D103  (it would stand in the help)
    show_version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Show the versions of hf_lnfree, torch and transformers.",
            callback=print_version,
            is_eager=True,
            rich_help_panel=GENERAL,
        ),
    ] = False,
) -> None: ...
