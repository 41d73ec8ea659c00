"""The parts of the reference that are read from the code, as Markdown in docs/reference/generated.

Sphinx writes them before it reads the pages (conf.py), so no copy is kept by hand.
"""

import dataclasses
import importlib
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import typer
from sphinx.ext.autodoc.mock import mock

import hf_lnfree
from hf_lnfree.checks import described
from hf_lnfree.cli.help import COMMAND_GROUPS
from hf_lnfree.cli.main import app
from hf_lnfree.cli.removal import DATACLASSES
from hf_lnfree.cli.training import ModelArguments, TrainingFields
from hf_lnfree.errors import LNFreeError
from hf_lnfree.models import FAMILIES, LNFreeGPT2Config
from hf_lnfree.models.activations import BUILDERS, FUSED
from hf_lnfree.models.configuration_lnfree import ALLOWED_VALUES, LNFreeConfigMixin
from hf_lnfree.models.errors import ConfigurationError
from hf_lnfree.models.normalizations import normalization_names
from hf_lnfree.removal.results import RemovalSummary
from hf_lnfree.training.beginning import Beginning
from hf_lnfree.training.results import RunResults

PACKAGE = Path(hf_lnfree.__file__).parent
OUTLANDISH = -12345
WIDTH = 100
RECORDS = (RunResults, Beginning, RemovalSummary)
OF_EXTRAS = ["gradio", "starlette"]  # what the pages are made without


def write(folder: Path) -> None:
    """All generated pages, in a folder that is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "python").mkdir(parents=True)
    pages = {"commands": commands(), "configuration": configuration(), "arguments": arguments()}
    pages |= {record.file: keys(record) for record in RECORDS} | {f"python/{room}": reference(room) for room in rooms()}
    for name, text in pages.items():
        (folder / f"{name}.md").write_text(text)


def commands() -> str:
    """The help of every command, as the terminal shows it."""
    command = typer.main.get_command(app)
    parts = ["# Commands\n", "What `hf-lnfree COMMAND --help` shows.\n"]
    width = {"terminal_width": WIDTH, "max_content_width": WIDTH}
    with typer.Context(command, info_name="hf-lnfree", **command.context_settings, **width) as context:
        for name, child in sorted(
            command.commands.items(), key=lambda item: COMMAND_GROUPS.index(item[1].rich_help_panel)
        ):
            with typer.Context(child, parent=context, info_name=name, **width) as inner:
                parts.append(f"## hf-lnfree {name}\n\n```text\n{child.get_help(inner).strip()}\n```\n")
    return "\n".join(parts)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [header, ["---"] * len(list(header)), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines) + "\n"


def entries(rows: Iterable[tuple[str, str, str, str]]) -> str:
    """(name, default, values, meaning) one below the other: a table of four columns is cut on a narrow screen."""
    return "\n".join(
        f"{name}\n: {meaning}\n\n  Default: {default}." + f" Values: {values}." * bool(values) + "\n"
        for name, default, values, meaning in rows
    )


def documented(kind: type) -> dict[str, str]:
    """Name -> text of the `Args:` in the docstring of a class; several names may share one text."""
    text = re.search(r"Args:\n(.*?)(?=\n\s*\n\s*(?:Raises|Returns|Example|Buffers):|\Z)", kind.__doc__ or "", re.S)
    found: dict[str, str] = {}
    lines = text[1].splitlines() if text else []
    indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    names: list[str] = []
    for line in lines:
        start = re.match(rf" {{{indent}}}(\w[\w, ]*?)(?: \([^:]*\))?:\s*(.*)", line)
        if start:
            names = start[1].split(", ")
            found |= dict.fromkeys(names, start[2])
        elif line.strip():
            found |= {name: f"{found[name]} {line.strip()}".strip() for name in names}
    return {name: re.sub(r"\[`(.*?)`\]", r"`\1`", text) for name, text in found.items()}


def shown(value: Any) -> str:
    return "" if value is dataclasses.MISSING else f"`{value!r}`"


def values_of_configuration(name: str, hint: Any) -> str:
    """What a field of the models' configurations may be."""
    if name in ALLOWED_VALUES:
        return ", ".join(f"`{value!r}`" for value in ALLOWED_VALUES[name])
    if name in ("norm", "final_norm"):
        return ", ".join(f"`{value!r}`" for value in normalization_names())
    if name in ("layer_norms", "layer_activations"):
        return "`None`, one name a layer, or a rule like `'relu:0-5,gelu:6-11'`"
    if hint is bool:
        return "`True`, `False`"
    return refusal(LNFreeGPT2Config, name, -1.0, "a word")


def refusal(kind: type, name: str, *values: Any) -> str:
    """What an argument must be, in the words of the error for a value that it cannot be; "" if it has no bounds."""
    for value in values:
        try:
            kind(**{name: value})
        except (LNFreeError, ConfigurationError) as error:
            if found := re.search(rf"{name} must be (.*), got", str(error)):
                return found[1]
    return ""


def configuration() -> str:
    """The fields of the models' configurations."""
    hints, texts, rows = get_type_hints(LNFreeConfigMixin), documented(LNFreeConfigMixin), []
    kinds = [backbone.config_class for backbone in FAMILIES]
    for field in dataclasses.fields(LNFreeConfigMixin):
        if field.name in LNFreeConfigMixin.__annotations__:
            default = " / ".join(dict.fromkeys(shown(getattr(kind, field.name)) for kind in kinds))
            values = values_of_configuration(field.name, hints[field.name])
            rows.append((f"`{field.name}`", default, values, texts[field.name]))
    for kind in kinds:
        name = kind.activation_field
        values = f"every name of transformers' `ACT2FN`, {', '.join(f'`{n!r}`' for n in (*BUILDERS, FUSED))}"
        default = getattr(kind(), name)
        rows.append((f"`{name}`", shown(default), values, f"Activation of the MLPs, in `{kind.__name__}`."))
    return (
        f"# Configuration fields\n\nFields of {', '.join(f'`{kind.__name__}`' for kind in kinds)}, beside those of the "
        "stock configurations. Where they differ, the default of GPT-2 comes first. A value that is not allowed raises "
        "`ConfigurationError`.\n\n" + entries(rows)
    )


def arguments() -> str:
    """The fields of runs and removals."""
    from hf_lnfree.training import LNFreeTrainingArguments

    parts = [
        "# Fields of a run\n\nA YAML file of `train`, `study` or `remove-norms` holds these fields; each is a "
        "flag too, with dashes instead of underscores. `out` stands for `output_dir`, and `device` for `use_cpu`. "
        "Besides these, every field of transformers' `TrainingArguments` is one (`hf-lnfree train --help-all`).\n"
    ]
    for kind in dict.fromkeys((ModelArguments, *DATACLASSES, TrainingFields)):
        if kind is LNFreeTrainingArguments or kind.__name__ == "CheckpointArguments":
            continue
        maker = LNFreeTrainingArguments if kind is TrainingFields else kind
        hints, rows = get_type_hints(kind), []
        for field in dataclasses.fields(kind):
            bounds = refusal(maker, field.name, OUTLANDISH) if {int, float} & set(flat(hints[field.name])) else ""
            typed = described(hints[field.name]) + (f"; {bounds}" if bounds else "")
            meaning = field.metadata.get("help", "").replace("%%", "%")
            rows.append((f"`{field.name}`", shown(field.default), typed, meaning))
        parts.append(f"## {kind.__name__}\n\n" + entries(rows))
    return "\n".join(parts)


def flat(hint: Any) -> Iterator[Any]:
    parts = getattr(hint, "__args__", ())
    yield from parts or (hint,)


def keys(record: type) -> str:
    """The keys of a file that a class of records reads and writes."""
    texts = documented(record)
    rows = [[f"`{f.name}`", texts[f.name]] for f in dataclasses.fields(record) if f.name != "more"]
    return table(["key", "meaning"], rows)


def rooms() -> list[str]:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} - {"cli"}
    return [*sorted(folders), "ground"]


def exports(room: str) -> list[str]:
    stub = PACKAGE / room / "__init__.pyi"
    return re.findall(r"import \w+ as (\w+)", stub.read_text()) if stub.is_file() else []


def reference(room: str) -> str:
    """Every public class and function of a room, by module."""
    folder = PACKAGE if room == "ground" else PACKAGE / room
    prefix = "hf_lnfree" if room == "ground" else f"hf_lnfree.{room}"
    title = "The modules beside the rooms" if room == "ground" else f"`hf_lnfree.{room}`"
    parts = [f"# {title}\n"]
    if names := exports(room):
        parts.append(f"`from {prefix} import ...`: {', '.join(f'`{name}`' for name in names)}.\n")
    paths = sorted(path for path in folder.glob("*.py") if path.stem not in ("__init__", "__main__"))
    modules = [f"{prefix}.{path.stem}" for path in paths]
    if room in ("metrics", "models"):  # what stands in the `__init__.py` itself
        modules.insert(0, prefix)
    for module in modules:
        with mock(OF_EXTRAS):
            importlib.import_module(module)
        parts.append(f"## `{module}`\n\n```{{eval-rst}}\n.. automodule:: {module}\n   :members:\n```\n")
    return "\n".join(parts)
