"""How help is written: plain text in named groups, examples on lines of their own, nothing cut."""

import re
from collections.abc import Iterable, Iterator
from textwrap import wrap
from typing import Any

from typer.core import TyperCommand, TyperGroup

from ..errors import SettingsError

TRAIN, MEASURE, SHARE = COMMAND_GROUPS = ("Train", "Measure", "Convert and share")
ARGUMENTS, GENERAL = "Arguments", "General"
NAMES = 30  # columns that names of options take at most before their text begins on the next line
# Options that had another name.
RENAMED = {"--output-dir": "--out", "--use-cpu": "--device cpu", "--windows": "--max-windows"}
# `main` takes it from any place of the line.
TRACEBACK = ("--traceback", "Show the whole traceback of an error, anywhere on the line.")

Row = tuple[str, tuple[str, str]]
"""A group, and what one of its lines names and says."""


class Plain:
    """Mixin of typer's classes."""

    def rows(self, ctx: Any) -> Iterable[Row]:
        return option_rows(self.get_params(ctx), ctx)  # type: ignore[attr-defined]

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        for paragraph in (self.help or "").split("\n\n"):  # type: ignore[attr-defined]
            formatter.write("\n" + "".join(f"  {line}\n" for line in wrapped(paragraph, formatter.width - 2)))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for group, row in self.rows(ctx):
            groups.setdefault(group, []).append(row)
        for group, members in groups.items():
            column = 2 + min(NAMES, max(len(name) for name, _ in members)) + 2
            formatter.write(f"\n{group}:\n")
            for name, text in members:
                lines = wrapped(text, formatter.width - column) or [""]
                if len(name) > NAMES:
                    formatter.write(f"  {name}\n")
                    name = ""
                for line in lines:
                    formatter.write(f"  {name}".ljust(column) + f"{line}\n")
                    name = ""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if self.epilog:  # type: ignore[attr-defined]
            formatter.write(f"\n{self.epilog}\n")  # type: ignore[attr-defined]


class Command(Plain, TyperCommand):
    """A command with the help of this package."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = {name for param in self.params for name in param.opts}
        for old, new in RENAMED.items():
            if old not in known and new.split()[0] in known and any(arg.partition("=")[0] == old for arg in args):
                raise SettingsError(f"{old} is called {new} now.")
        return super().parse_args(ctx, args)


class Group(Plain, TyperGroup):
    """The program itself, with the same help."""

    def rows(self, ctx: Any) -> Iterable[Row]:
        commands: list[Any] = [self.get_command(ctx, name) for name in self.list_commands(ctx)]
        for command in sorted(commands, key=lambda command: COMMAND_GROUPS.index(command.rich_help_panel)):
            yield command.rich_help_panel, (command.name, command.get_short_help_str(limit=1000))
        yield from super().rows(ctx)


def option_rows(params: Iterable[Any], ctx: Any) -> Iterator[Row]:
    """Arguments, options by their group, and at the end what every command has."""
    records = [(param, *param.get_help_record(ctx)) for param in params]
    for param, _, text in records:
        if param.param_type_name == "argument":
            yield ARGUMENTS, (param.metavar, text)
    general = [(GENERAL, TRACEBACK)]
    for param, name, text in records:
        if param.name == "help" or getattr(param, "rich_help_panel", None) == GENERAL:
            general.append((GENERAL, (name, text)))
        elif param.param_type_name == "option":
            yield param.rich_help_panel, (name, text)
    yield from general


def examples(*lines: str) -> str:
    """The end of a help text."""
    return "\n".join(["Example:" if len(lines) == 1 else "Examples:", *(f"  {line}" for line in lines)])


def wrapped(text: str, width: int) -> list[str]:
    """Lines of that width; what stands in brackets at the end, like a default, stays together."""
    text = text.replace("\\[", "[")  # older typers escape it for rich
    text = re.sub(rf"\[[^]]{{,{width - 2}}}\]$", lambda found: found[0].replace(" ", "\0"), " ".join(text.split()))
    lines = wrap(text, width, break_on_hyphens=False)
    return [line.replace("\0", " ") for line in lines]
