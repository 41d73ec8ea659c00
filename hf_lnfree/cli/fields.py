"""Commands whose options are the fields of dataclasses: `train` and `remove-norms`.

Their help is drawn like that of the others; what is given is read by `training.settings.parse_settings`, in which all
of transformers' `TrainingArguments` are fields.
"""

import dataclasses
import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from ..training.fields import ALIASES
from ..training.host_fields import HostFields
from .help import GENERAL, Command

HELP_ALL = "--help-all"
ALL_OTHERS = "All other fields of transformers.TrainingArguments"


class FieldsCommand(Command):
    """A command that hands its arguments on unread, and knows its options for the help only."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if HELP_ALL in args:
            shown = {param.name for param in self.params}
            self.params = [*self.params, *other_options(shown)]
        if {HELP_ALL, *ctx.help_option_names} & set(args):
            typer.echo(ctx.get_help())
            ctx.exit()
        ctx.args = list(args)
        return ctx.args


def takes_fields(*kinds: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a command that ends in `**fields` an option for each field, for its help."""
    help_all = typer.Option(HELP_ALL, help="List every field of TrainingArguments.", rich_help_panel=GENERAL)

    def with_options(function: Callable[..., Any]) -> Callable[..., Any]:
        own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
        added = [option for kind in (*kinds, HostFields) for option in options_of(kind)]
        return with_parameters(function, [*own, *added, parameter("help_all", Annotated[bool, help_all], False)])

    return with_options


def with_parameters(function: Callable[..., Any], parameters: Sequence[inspect.Parameter]) -> Callable[..., Any]:
    """The function as typer sees it."""
    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in parameters]
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {p.name: p.annotation for p in parameters}
    return function


def parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    """A keyword of a function, for typer to read."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def options_of(kind: type, left_out: Iterable[str] = (), group: str | None = None) -> Iterator[inspect.Parameter]:
    """A parameter that typer makes an option of for each field of a dataclass."""
    hints = get_type_hints(kind)
    aliases = {field: alias for alias, field in ALIASES.items()}
    for field in sorted(dataclasses.fields(kind), key=lambda field: bool(field.kw_only)):
        name = aliases.get(field.name, field.name)
        if name in left_out or not field.init:
            continue
        hint, metavar = shown_type(hints[field.name])
        if name == "device":
            hint, metavar = str | None, None
        flag = f"--{name.replace('_', '-')}"
        default = None if field.default is dataclasses.MISSING or name == "device" else field.default
        if hint is bool and default is True:
            flag += f"/--no-{name.replace('_', '-')}"
        option = typer.Option(
            flag,
            help=field.metadata.get("help", "").replace("%%", "%"),
            metavar=metavar,
            rich_help_panel=group or field.metadata.get("group") or getattr(kind, "_argument_group_name", None),
        )
        yield parameter(name, Annotated[hint, option], default)


def shown_type(hint: Any) -> tuple[Any, str | None]:
    """The annotation that typer is to show, and what to show instead: a value that may be None is no switch."""
    parts = [part for part in get_args(hint) if part is not type(None)]
    optional = get_origin(hint) in (Union, types.UnionType)
    if optional and parts == [bool]:
        return str | None, "<true|false>"
    if optional:
        hint = parts[0] if len(parts) == 1 else str
    if hint not in (bool, int, float) and get_origin(hint) is not Literal:
        hint = str
    return (hint | None if optional else hint), None


def other_options(shown: Iterable[str]) -> list[Any]:
    """Options of all fields that are not in the help yet; loads transformers."""
    from ..training.arguments import LNFreeTrainingArguments

    def others(**fields: Any) -> None: ...

    app = typer.Typer(add_completion=False)
    app.command()(with_parameters(others, list(options_of(LNFreeTrainingArguments, set(shown), ALL_OTHERS))))
    return typer.main.get_command(app).params
