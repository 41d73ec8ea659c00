"""A study: rows of one YAML file, at one of its scales, each what `hf-lnfree train` is told."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

from ..analysis.entropy_report import PAPER_RESULTS
from ..checks import described, fits
from ..errors import SettingsError
from ..redaction import is_secret
from ..training.settings import RunArguments, merge, parse_settings, read_settings, with_base

OF_A_STUDY: dict[str, Any] = {
    **{"title": str | None, "about": str | None, "published": str | None},
    **{"rows": dict[str, str | dict] | None, "factors": dict[str, Any] | None},
    **{"scales": dict[str, dict | None] | None, "compare": list[list[str]] | None, "seeds": list[int] | None},
}
"""The fields of a study file that are not those of its rows, and what they hold."""


@dataclass(frozen=True, repr=False)
class Study:
    """
    Args:
        title: of the report.
        about: what the report says first.
        rows: name -> the fields of `hf-lnfree train`, at the chosen scale.
        scale: name of that scale; "" for a file without scales.
        compare: pairs of rows (one, other) whose relative difference stands below the table.
        seeds: what the file proposes.
        published: the key of the published perplexities that belong beside it.
    """

    title: str
    rows: dict[str, dict[str, Any]]
    about: str = ""
    scale: str = ""
    compare: Sequence[Sequence[str]] = ()
    seeds: Sequence[int] = (0,)
    published: str | None = None

    @classmethod
    def load(cls, path: Path, scale: str | None = None, changes: Mapping[str, Any] | None = None) -> "Study":
        """
        Read a study file.

        Args:
            path: YAML with `title`, `rows` (name -> a file of `hf-lnfree train`, or fields) and, if wanted, `base`
                (fields that all rows share), `about`, `compare`, `published`, `seeds` and `scales` (name -> fields,
                `seeds` among them). A row's own fields win over the scale, the scale over the file that a row names.
                `factors` (field -> values, of the training or of the model's configuration; or a name of your own ->
                names -> fields, for what changes together) multiply the rows, or make them all when there are none;
                they win over both.
            scale: one of the file's scales; the first by default.
            changes: fields that win over all others.

        Raises:
            SettingsError: no such file, scale or row, or a field or value that `hf-lnfree train` refuses.
        """
        values = read_settings(path)
        for name, hint in OF_A_STUDY.items():
            if name in values and not fits(values[name], hint):
                raise SettingsError(f"{path}: {name} must be {described(hint)}, got {values[name]!r}.")
        shared = {key: value for key, value in values.items() if key not in OF_A_STUDY}
        scales = values.get("scales") or {}
        if scale is not None and scale not in scales:
            raise SettingsError(f"{path} has no scale {scale!r}. It has: {', '.join(scales) or 'none'}.")
        scale = scale or next(iter(scales), "")
        scaled = with_base(scales.get(scale) or {}, path.parent)
        seeds = scaled.pop("seeds", None) or values.get("seeds") or [0]
        if not fits(seeds, list[int]):
            raise SettingsError(f"{path}: seeds must be {described(list[int])}, got {seeds!r}.")
        bases = values.get("rows") or ({"": {}} if values.get("factors") else None)
        if not isinstance(bases, dict):
            raise SettingsError(f"{path} is no study: `rows` must map names to files or fields, or `factors` be there.")
        rows = {}
        for (name, row), (label, chosen) in itertools.product(bases.items(), combinations(values.get("factors"), path)):
            own = dict(row) if isinstance(row, dict) else {"base": row}
            file = with_base({"base": own.pop("base")}, path.parent) if "base" in own else {}
            fields_ = merge(merge(merge(shared, file), scaled), own)
            name = " ".join(filter(None, (name, label)))
            if name.startswith(".") or {"/", "\\"} & set(name):
                raise SettingsError(f"{path}: the row {name!r} becomes a folder: no / or \\ in it, and no dot first.")
            rows[name] = merge(merge(fields_, chosen), changes or {})
            elsewhere = merge(merge(scaled, chosen), changes or {})
            for place in ("out", "output_dir"):
                rows[name].pop(place, None)
            parse_settings(rows[name], f"{path}, row {name}", ["--out", "unused"], given=own, later=elsewhere)
        published, compare = values.get("published"), values.get("compare") or []
        if published is not None and published not in PAPER_RESULTS["eval_perplexity"]:
            raise SettingsError(f"published={published!r} is not known: {', '.join(PAPER_RESULTS['eval_perplexity'])}.")
        if wrong := [pair for pair in compare if len(pair) != 2]:
            raise SettingsError(f"{path}: compare must be a list of pairs like [one row, other row], got {wrong[0]!r}.")
        if unknown := {name for pair in compare for name in pair} - set(rows):
            raise SettingsError(f"{path} compares rows that it does not have: {', '.join(sorted(unknown))}.")
        title, about = values.get("title") or path.stem, values.get("about") or ""
        return cls(title, rows, about, scale, compare, seeds, published)

    def choose(self, rows: Sequence[str] | None) -> "Study":
        """With these rows only; all for None."""
        if unknown := [row for row in rows or () if row not in self.rows]:
            raise SettingsError(f"The study has no row {', '.join(unknown)}. It has: {', '.join(self.rows)}.")
        return replace(self, rows={row: fields for row, fields in self.rows.items() if rows is None or row in rows})

    def __repr__(self) -> str:
        scale, seeds = f" at the {self.scale} scale" if self.scale else "", ", ".join(map(str, self.seeds))
        return f"<Study {self.title}{scale}: {', '.join(self.rows)}; seeds {seeds}>"

    def arguments(self, row: str, seed: int, folder: Path, **local: Any) -> RunArguments:
        """What `hf-lnfree train` would be told for one cell; `local` are fields that no result depends on."""
        settings = merge(self.rows[row], {"seed": seed, "resume_from_checkpoint": "auto", **local})
        return parse_settings(settings, row, ["--out", str(folder)])


def combinations(factors: Mapping[str, Sequence[Any]] | None, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("norm=dyt, ...", fields) for every combination of values; ("", {}) without factors."""
    factors = factors or {}
    if wrong := [name for name, values in factors.items() if not isinstance(values, list | dict) or not values]:
        raise SettingsError(f"{path}: the factor {wrong[0]} must be a list of values, or map names to fields.")
    for name, values in factors.items():
        if isinstance(values, dict) and (bad := [label for label, v in values.items() if not isinstance(v, dict)]):
            raise SettingsError(f"{path}: the factor {name} must map {bad[0]} to fields, got {values[bad[0]]!r}.")
    if secret := [name for name in factors if is_secret(name)]:
        raise SettingsError(f"{path}: {secret[0]} cannot be a factor: its values would name rows and folders.")
    of_a_run = {field.name for kind in get_args(RunArguments) for field in fields(kind)}
    for values in itertools.product(*factors.values()):
        chosen = dict(zip(factors, values, strict=True))
        label = ", ".join(f"{name}={value}" for name, value in chosen.items()).replace("/", "_")
        named = [factors[name][chosen.pop(name)] for name in factors if isinstance(factors[name], dict)]
        overrides = {name: chosen.pop(name) for name in set(chosen) - of_a_run}
        found = chosen | ({"config_overrides": overrides} if overrides else {})
        for fields_ in named:
            found = merge(found, fields_)
        yield label, found
