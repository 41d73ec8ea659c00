"""Records: JSON files with a fixed name and fixed keys in the folder of a run, as objects."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from .errors import RunError
from .files import read_json, write_json

INFINITE = "infinite"
LISTS = (list, tuple)


@dataclass(kw_only=True)
class Record:
    """
    A JSON file whose keys are the fields of a subclass.

    A field whose default is None is left out of the file while it is None. A number that is not finite is null in the
    file; read again it is NaN, or infinite where the key "infinite" says so (`with_infinities`).

    Args:
        more: further keys of the file, which no field has.
    """

    file: ClassVar[str]
    """The name of the file."""
    more: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, **values: Any) -> Self:
        """From keys and values; what no field has goes into `more`."""
        names = {f.name for f in fields(cls)} - {"more"}
        known = {name: value for name, value in values.items() if name in names}
        return cls(**known, more={name: value for name, value in values.items() if name not in names})

    def save(self, folder: Path) -> None:
        left_out = {f.name for f in fields(self) if f.default is None and getattr(self, f.name) is None} | {"more"}
        keys = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        write_json(folder / self.file, with_infinities(keys | self.more))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """
        Raises:
            RunError: the folder has no such file, or one that is damaged or lacks a key.
        """
        path = folder / cls.file
        if not path.is_file():
            raise RunError(f"{folder} holds no readable {cls.file}, which is written at the end.")
        values = read_json(path)
        if not isinstance(values, dict):
            raise RunError(f"{path} is damaged: it holds no mapping of keys to values.")
        try:
            restore_infinities(values)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise RunError(f"{path} is damaged: its key {INFINITE!r} names what it does not hold.") from error
        required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
        if missing := [name for name in required if name not in values]:
            raise RunError(f"{path} is damaged or of another version: it has no {', '.join(missing)}.")
        numbers = [f.name for f in fields(cls) if f.type in (float, float | None)]
        not_finite = {name: math.nan for name in numbers if values.get(name, 0.0) is None}
        return cls.of(**values | not_finite)


def with_infinities(values: Mapping[str, Any]) -> dict[str, Any]:
    """
    The values, and which of the numbers that strict JSON can only call null are infinite.

    {"perplexity": math.inf} has the further key "infinite" with {"/perplexity": "inf"}: JSON pointers (RFC 6901) and
    "inf" or "-inf". Without infinities there is no such key.
    """
    found = dict(infinities(values))
    return {**values, INFINITE: found} if found else dict(values)


def infinities(value: Any, pointer: str = "") -> Iterator[tuple[str, str]]:
    """The pointer and the text of every infinite number."""
    if isinstance(value, float) and math.isinf(value):
        yield pointer, str(float(value))
    children = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, LISTS) else ()
    for key, child in children:
        yield from infinities(child, f"{pointer}/{str(key).replace('~', '~0').replace('/', '~1')}")


def restore_infinities(values: dict[str, Any]) -> None:
    """Undo `with_infinities` on what was read; in place."""
    for pointer, text in values.pop(INFINITE, {}).items():
        *path, last = (key.replace("~1", "/").replace("~0", "~") for key in pointer.split("/")[1:])
        place: Any = values
        for key in path:
            place = place[int(key) if isinstance(place, list) else key]
        place[int(last) if isinstance(place, list) else last] = float(text)
