"""Fields of dataclasses held to their types and ranges, before anything is read."""

from typing import Any, Literal, get_args, get_origin, get_type_hints

from .errors import SettingsError


def require_at_least(arguments: Any, **least: float) -> None:
    """Raise SettingsError for a field that lies below its bound, or is no number; None stands for "not given"."""
    for name, bound in least.items():
        value = getattr(arguments, name)
        if value is not None and not (isinstance(value, (int, float)) and value >= bound):
            raise SettingsError(f"{name} must be at least {bound}, got {value!r}.")


def require_choices(arguments: Any) -> None:
    """Raise SettingsError for a field whose type is a Literal and whose value is none of its."""
    for name, hint in get_type_hints(type(arguments)).items():
        if get_origin(hint) is Literal and getattr(arguments, name, None) not in get_args(hint):
            allowed = ", ".join(map(repr, get_args(hint)))
            raise SettingsError(f"{name}={getattr(arguments, name)!r} is not known. Allowed: {allowed}.")
