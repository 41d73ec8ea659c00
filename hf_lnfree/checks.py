"""Fields of dataclasses held to their types, choices and ranges, before anything is read."""

import enum
import json
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import SettingsError

LARGEST = 2**63  # no field counts that far, and what computes with it overflows
MOST_PROCESSES = 1024  # beyond any machine's use, and below what brings one down


@dataclass(frozen=True)
class Range:
    """Finite numbers from `least` to `most`; those of the bounds that are `open` are left out."""

    least: float
    most: float = math.inf
    open: Literal["", "least", "most", "both"] = ""

    def __contains__(self, value: Any) -> bool:
        if not (fits(value, int) or fits(value, float)):
            return False
        low = value > self.least if self.open in ("least", "both") else value >= self.least
        return low and (value < self.most if self.open in ("most", "both") else value <= self.most)

    def __str__(self) -> str:
        if not self.open and self.most < math.inf:
            return f"between {self.least} and {self.most}"
        low = f"{'above' if self.open in ('least', 'both') else 'at least'} {self.least}"
        return low if self.most == math.inf else f"{low} and below {self.most}"


def at_least(bound: float) -> Range:
    """Numbers from a bound on."""
    return Range(bound)


def above(bound: float) -> Range:
    """Numbers beyond a bound."""
    return Range(bound, open="least")


SHARE = Range(0, 1)


class Filled:
    """Text that says something; a path of it can be looked for."""

    def __contains__(self, value: Any) -> bool:
        return not isinstance(value, str) or (bool(value.strip()) and "\0" not in value)

    def __str__(self) -> str:
        return "text that is not empty"


FILLED = Filled()


class MappingOrFile:
    """A mapping, JSON text of one, or the name of a file that holds it."""

    def __contains__(self, value: Any) -> bool:
        if not isinstance(value, str):
            return isinstance(value, Mapping)
        try:
            return isinstance(json.loads(value), dict)
        except ValueError:
            return value in FILLED and Path(value).is_file()

    def __str__(self) -> str:
        return "a mapping, its JSON, or a file that holds it"


def require_fields(arguments: Any, allowed: Mapping[str, Any]) -> None:
    """
    Raise SettingsError for the first field whose value is none of its choices, or not in what is `allowed` for it.

    A field whose type has None may be None. The message begins with the name of the field.
    """
    for name, hint in get_type_hints(type(arguments)).items():
        value = getattr(arguments, name, None)
        if get_origin(hint) is Literal and not fits(value, hint):
            raise SettingsError(f"{name} must be {described(hint)}, got {value!r}.")
        if name in allowed and value not in allowed[name] and not (value is None and fits(None, hint)):
            number = any(fits(value, kind) for kind in (int, float)) or not isinstance(value, (int, float))
            raise SettingsError(f"{name} must be {allowed[name]}{'' if number else ', and finite'}, got {value!r}.")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type, also within lists and mappings; a number must be finite."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind is Any:
        return True
    if kind in (Union, types.UnionType):
        enums = [part for part in parts if is_enum(part)]  # that may be written as text, and then as one of theirs
        return any(fits(value, part) for part in parts if not (enums and part is str))
    if kind is Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if is_enum(kind):
        return value in [member.value for member in kind]
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, int) and kind in (int, float):
        return abs(value) < LARGEST
    if kind is float:
        return isinstance(value, float) and math.isfinite(value)
    if isinstance(value, list) and kind is list and parts:
        return all(fits(item, parts[0]) for item in value)
    if isinstance(value, dict) and kind is dict and parts:
        return all(fits(key, parts[0]) and fits(item, parts[1]) for key, item in value.items())
    return isinstance(value, kind)


def is_enum(kind: Any) -> bool:
    """Whether a type is an enumeration; those of transformers are of text."""
    return isinstance(kind, type) and issubclass(kind, enum.Enum)


KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
KINDS |= {dict: "a mapping", list: "a list"}


def described(hint: Any) -> str:
    """An annotated type in words."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, types.UnionType):
        enums = [part for part in parts if is_enum(part)]
        return " or ".join(described(part) for part in parts if not (enums and part is str))
    if kind is Literal:
        return "one of " + ", ".join(map(repr, parts))
    if is_enum(kind):
        return "one of " + ", ".join(repr(member.value) for member in kind)
    if kind is list and parts:
        return f"a list of {described(parts[0])}"
    if kind is dict and parts and parts[1] is not Any:
        return f"a mapping of {described(parts[0])} to {described(parts[1])}"
    return KINDS.get(kind) or str(getattr(kind, "__name__", kind))
