"""Settings of a run: YAML files that build on each other, and the dataclasses that they and flags fill."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from ..data.arguments import DataArguments
from ..errors import SettingsError
from .arguments import LNFreeTrainingArguments, ModelArguments

RunArguments = tuple[ModelArguments, DataArguments, LNFreeTrainingArguments]


def read_settings(path: Path, within: tuple[Path, ...] = ()) -> dict[str, Any]:
    """
    The mapping in a YAML file, over that of its `base`, a file named relative to it.

    Raises:
        SettingsError: no such file, no mapping in it, or a file that is its own base.
    """
    if not path.is_file():
        raise SettingsError(f"There is no configuration file {path}.")
    if path.resolve() in within:
        raise SettingsError(f"{path} is its own base.")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{path} must hold a mapping of fields to values.")
    return with_base(values, path.parent, (*within, path.resolve()))


def with_base(values: Mapping[str, Any], folder: Path, within: tuple[Path, ...] = ()) -> dict[str, Any]:
    """`values` over those of the file that they name as `base`; `config_overrides` of both are joined."""
    if "base" not in values:
        return dict(values)
    base = read_settings(folder / str(values["base"]), within)
    return merge(base, {key: value for key, value in values.items() if key != "base"})


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `above` win, field by field, in `config_overrides` too."""
    merged = {**below, **above}
    both = [as_mapping(values["config_overrides"]) for values in (below, above) if "config_overrides" in values]
    if len(both) == 2:
        merged["config_overrides"] = {**both[0], **both[1]}
    return merged


def as_mapping(overrides: Any) -> dict[str, Any]:
    """`config_overrides`, which may be written as text, as a mapping."""
    found = yaml.safe_load(overrides) if isinstance(overrides, str) else overrides
    if found is not None and not isinstance(found, dict):
        raise SettingsError(f"config_overrides must be a mapping like '{{n_layer: 8}}', got {overrides!r}.")
    return found or {}


def parse_settings(
    values: Mapping[str, Any],
    source: str,
    flags: Sequence[str] = (),
    dataclasses: Sequence[type] = (ModelArguments, DataArguments, LNFreeTrainingArguments),
    **parser_options: Any,
) -> Any:
    """
    The dataclasses of a run, from `values` and the command-line `flags` that win over them.

    Raises:
        SettingsError: a field that no dataclass has, or a value that one refuses.
    """
    parser = HfArgumentParser(list(dataclasses), allow_abbrev=False, **parser_options)  # type: ignore[arg-type]
    known = {action.dest for action in parser._actions}
    if unknown := sorted(set(values) - known):
        raise SettingsError(f"{source} has unknown fields: {', '.join(unknown)}. `hf-lnfree train --help` lists all.")
    parser.set_defaults(**values)  # argparse converts those that are text, as PyYAML reads 1e-3
    return parser.parse_args_into_dataclasses(list(flags), look_for_args_file=False)
