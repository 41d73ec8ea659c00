"""Settings of a run: YAML files that build on each other, and the dataclasses that they and flags fill."""

import argparse
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml
from transformers import HfArgumentParser

from ..checks import described, fits
from ..data.arguments import DataArguments
from ..errors import SettingsError
from ..loading import find_device, reason
from ..redaction import keep_secret
from .arguments import LNFreeTrainingArguments
from .build import with_objective
from .fields import ALIASES, FROM_SCRATCH, YAML, ModelArguments, as_mapping
from .idle import refuse_idle
from .possible import require_row

RunArguments = tuple[ModelArguments, DataArguments, LNFreeTrainingArguments]

# Fields of the data that decide whether there can be such a model.
OF_A_MODEL_TOO = ("context_length", "data", "objective", "image_size")
# Fields that had another name.
RENAMED = {
    "dataset": "data",
    "validation_dataset": "validation_data",
    "windows": "packing",
    "max_files": "max_documents",
    "max_validation_files": "max_validation_documents",
}


def read_settings(path: Path, within: tuple[Path, ...] = ()) -> dict[str, Any]:
    """
    The mapping in a YAML file, over that of its `base`, a file named relative to it.

    Raises:
        SettingsError: no such file, no mapping in it, or a file that is its own base.
    """
    if path.resolve() in within:
        raise SettingsError(f"{path} is its own base.")
    return with_base(read_file(path), path.parent, (*within, path.resolve()))


def read_file(path: Path) -> dict[str, Any]:
    """
    The mapping in a YAML file, as it stands there.

    Raises:
        SettingsError: no such file, or no mapping in it.
    """
    if not path.is_file():
        raise SettingsError(f"There is no configuration file {path}.")
    try:
        with open(path) as file:  # of a file an error tells the place, and quotes nothing
            values = yaml.load(file, YAML) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{path} must hold a mapping of fields to values.")
    keep_secret(values)
    factors = values.get("factors")
    refuse_renamed([*values, *(factors if isinstance(factors, dict) else ())], f"{path}: ")
    return values


def refuse_renamed(names: Iterable[Any], source: str = "", spelt: Callable[[str], str] = str) -> None:
    """Raise SettingsError for a field that has another name now."""
    for name in names:
        if name in RENAMED:
            raise SettingsError(f"{source}{spelt(name)} is called {spelt(RENAMED[name])} now.")


def flag(field: str) -> str:
    """A field as it is written on the command line."""
    return f"--{field.replace('_', '-')}"


def with_base(values: Mapping[str, Any], folder: Path, within: tuple[Path, ...] = ()) -> dict[str, Any]:
    """`values` over those of the file that they name as `base`; `config_overrides` of both are joined."""
    if "base" not in values:
        return dict(values)
    base = read_settings(folder / str(values["base"]), within)
    return merge(base, {key: value for key, value in values.items() if key != "base"})


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `above` win, field by field, in `config_overrides` too, whichever of its names a field has."""
    names = ALIASES | {field: alias for alias, field in ALIASES.items()}
    merged = {**{key: value for key, value in below.items() if names.get(key) not in above}, **above}
    both = [as_mapping(values["config_overrides"]) for values in (below, above) if "config_overrides" in values]
    if len(both) == 2:
        merged["config_overrides"] = {**both[0], **both[1]}
    return merged


def parse_settings(
    values: Mapping[str, Any],
    source: str,
    flags: Sequence[str] = (),
    dataclasses: Sequence[type] = (ModelArguments, DataArguments, LNFreeTrainingArguments),
    given: Mapping[str, Any] | None = None,
    later: Mapping[str, Any] | None = None,
    here: bool = True,
) -> Any:
    """
    The dataclasses of a run, from `values` and the command-line `flags` that win over them.

    Flags are written with dashes or underscores. `out` and `device` ("cpu", or the kind of accelerator that there is)
    are names of `output_dir` and `use_cpu`. A new model has a learning rate of 1e-3 where none is given, a checkpoint
    that of transformers, which is one for fine-tuning.

    Args:
        source: where `values` are from.
        given: those of them that are asked for what reads them, as flags always are (`idle`): not those of a base.
        later: those of them that are from a place after that of `given`.
        here: whether the run is to fit into the memory of this machine.

    Raises:
        SettingsError: a field that no dataclass has, a value that one refuses, or a field that nothing reads.
    """
    keep_secret(values)
    source = f"{source}: " if source else ""
    names = [text.partition("=")[0][2:].replace("-", "_") for text in flags if text.startswith("--")]
    refuse_renamed(values, source)
    refuse_renamed(names, spelt=flag)
    values = dict(values)
    for alias, field in ALIASES.items():
        if alias in values:
            if field in values:
                raise SettingsError(f"{source}{alias} and {field} mean the same: give one of them.")
            values[field] = values.pop(alias)
            if alias == "device":
                # A device that is not here is no error where a flag names another.
                values[field] = not {alias, field} & set(names) and on_cpu(values[field])
    parser = Parser(list(dataclasses), allow_abbrev=False, add_help=False)  # type: ignore[arg-type]
    known = {action.dest: action for action in parser._actions}
    if unknown := sorted(set(values) - set(known), key=str):
        where = source.removesuffix(": ") or "The settings"
        raise SettingsError(f"{where} has unknown fields: {', '.join(map(str, unknown))}.{advice(unknown[0], known)}")
    parser.add_argument("--out", dest="output_dir", default=known["output_dir"].default)
    parser.add_argument("--device", dest="use_cpu", default=known["use_cpu"].default, action=Device)
    hints = {name: hint for kind in dataclasses for name, hint in get_type_hints(kind).items()}
    values = {name: fitting(value, known[name], hints[name], f"{source}{name}") for name, value in values.items()}
    parser.set_defaults(**values)
    try:
        *parsed, left = parser.parse_args_into_dataclasses(
            list(flags), return_remaining_strings=True, look_for_args_file=False
        )
    except SettingsError as error:
        raise SettingsError(spelt(str(error), source, names)) from error
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:  # what TrainingArguments refuse
        raise SettingsError(f"{source}{reason(error)}") from error
    if left:
        raise SettingsError(f"Unknown flags: {' '.join(left)}.{advice(left[0], [flag(name) for name in known])}")
    of_kind: dict[type, Any] = {type(part): part for part in parsed}
    model, data = of_kind.get(ModelArguments), of_kind.get(DataArguments)
    config = None
    if model is not None and data is not None and model.model_name_or_path is None:
        try:
            data.objective = with_objective(model, data).objective
            settings = (model.family, model.row, model.config_overrides, model.attn_implementation)
            require_row(*settings, here, **{name: getattr(data, name) for name in OF_A_MODEL_TOO})
        except SettingsError as error:
            raise SettingsError(spelt(str(error), source, names)) from error
        config = model.config(data.context_length)
        if "learning_rate" not in {*values, *names}:
            of_kind[LNFreeTrainingArguments].learning_rate = FROM_SCRATCH
    by_flag = {name: getattr(model, name, None) for name in names}
    try:
        refuse_idle(parsed, config, by_flag, {})
        refuse_idle(parsed, config, given or {}, {**(later or {}), **by_flag})
    except SettingsError as error:
        raise SettingsError(spelt(str(error), source, names)) from error
    return tuple(parsed)


def spelt(message: str, source: str, flags: Sequence[str]) -> str:
    """What is wrong with a field that the message begins with, as it was given: in the file, or as one of the flags."""
    given = {ALIASES.get(name, name): name for name in flags}
    written = re.match(r"(?:--)?([\w-]+)", message)
    name = written[1].replace("-", "_") if written else ""
    if written is None or name not in {*given, *given.values()}:
        return source + (f"{name}{message[written.end() :]}" if written and message.startswith("--") else message)
    return flag(given.get(name, name)) + message[written.end() :]


class Parser(HfArgumentParser):
    """transformers' parser of dataclasses, whose errors are SettingsErrors."""

    def error(self, message: str) -> NoReturn:
        """Instead of a page of usage."""
        raise SettingsError(re.sub(r"^argument \S*?(--[\w-]+): ", r"\1: ", message).rstrip(".") + ".")


class Device(argparse.Action):
    """`--device`, which sets `use_cpu`."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, on_cpu(values))


def on_cpu(device: Any) -> bool:
    """Whether that device is the CPU, and not the accelerator of this machine, which None stands for too."""
    found = find_device(None if device is None else str(device))
    if found.index is not None:
        raise SettingsError(
            f"A run chooses its {found.type}s by CUDA_VISIBLE_DEVICES or its launcher, not by {device!r}."
        )
    return device is not None and found.type == "cpu"


def advice(name: Any, known: Iterable[str]) -> str:
    """The known name that is nearest, or where all of them are listed."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {near[0]}?" if near else " `hf-lnfree train --help-all` lists all."


def fitting(value: Any, action: argparse.Action, hint: Any, name: str) -> Any:
    """A value of a file as its field wants it: text becomes a number, as PyYAML reads 1e-3, and a number text."""
    choices = [choice for choice in action.choices or () if isinstance(choice, str)]
    if value is False and "no" in choices:
        value = "no"  # which YAML takes for false
    if not fits(value, hint):
        if isinstance(value, str) and value.strip() and callable(action.type):
            with suppress(ValueError, TypeError, argparse.ArgumentTypeError):
                value = action.type(value)
        elif (isinstance(value, bool) and action.dest == "resume_from_checkpoint") or (
            (fits(value, int) or fits(value, float)) and fits("", hint)
        ):
            value = str(value)
    if not fits(value, hint):
        raise SettingsError(f"{name} must be {described(hint)}, got {value!r}.")
    if isinstance(value, str) and choices and value not in choices:
        raise SettingsError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
    return value
