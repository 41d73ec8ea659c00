"""What messages, helps and pages tell to type exists where they say it."""

import ast
import re
from pathlib import Path

import pytest
import typer

import hf_lnfree
from hf_lnfree.cli.main import app, main, spoken
from hf_lnfree.cli.removal import DATACLASSES
from hf_lnfree.training.arguments import LNFreeTrainingArguments
from hf_lnfree.training.settings import Parser, RunArguments, flag

from ..fences import ROOT

PACKAGE = Path(hf_lnfree.__file__).parent
COMMANDS = typer.main.get_command(app).commands
FLAG = r"(?<![\w-])--[a-z][\w-]*\w"
TRAINING = ["train", "remove-norms", "study", "demo"]
LOADING = [*TRAINING, "entropy", "evaluate", "lm-eval", "attribute", "convert"]
# Which commands may show what a file of the package says; the longest beginning of its path counts.
SAID_BY = {
    "loading.py": LOADING,
    "files.py": TRAINING,
    "data/corpus.py": [*TRAINING, "entropy", "evaluate"],
    "data/tables.py": [*TRAINING, "entropy", "evaluate"],
    "data/building.py": [*TRAINING, "entropy"],
    "data": ["train"],
    "analysis/head_entropies.py": ["entropy"],
    "training": TRAINING,
    "removal": ["remove-norms"],
    "studies": ["study", "demo"],
    "pages/removal.py": ["remove-norms"],
    "evaluation": ["evaluate"],
    "conversion": ["convert"],
    "sharing": ["push", "card"],
}
ELSEWHERE = ("cli", "choices.py", "training/fields.py", "training/host_fields.py", "data/arguments.py")
ELSEWHERE += ("removal/arguments.py", "training/settings.py", "evaluation/harness.py", "models")
ELSEWHERE += ("conversion/published_removal.py",)  # the flag of another program


def options(name):
    """All options of a command, also those that its help leaves out."""
    kinds = {"train": RunArguments.__args__, "remove-norms": DATACLASSES}.get(name, ())
    fields = Parser(list(kinds), add_help=False)._actions if kinds else ()
    own = {option for param in COMMANDS[name].params for option in (*param.opts, *param.secondary_opts)}
    return (
        own
        | {option.replace("_", "-") for action in fields for option in action.option_strings}
        | {"--help", "--traceback"}
    )


def literals(path):
    """Texts of a file that are no docstrings; those that stand side by side are one."""
    tree = ast.parse(path.read_text())
    docstrings = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(getattr(node, "body", None), list) and node.body and isinstance(node.body[0], ast.Expr)
    }
    inside = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)} - {
        node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)
    }
    for node in ast.walk(tree):
        if node in docstrings or node in inside:
            continue
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "x" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


HINTS = [
    (path.relative_to(PACKAGE).as_posix(), text)
    for path in sorted(PACKAGE.rglob("*.py"))
    for text in literals(path)
    if re.search(FLAG, text)
]


def test_the_walk_finds_the_hints():
    assert len(HINTS) > 60
    assert any("--text-column" in text for _, text in HINTS)


@pytest.mark.parametrize(("file", "text"), [hint for hint in HINTS if not hint[0].startswith(ELSEWHERE)])
def test_every_flag_of_a_message_exists_in_the_commands_that_say_it(file, text):
    named = re.search(r"hf-lnfree ([a-z-]+)", text)
    found = max((place for place in SAID_BY if file.startswith(place)), key=len)
    for command in [named[1]] if named else SAID_BY[found]:
        for option in re.findall(FLAG, spoken(text, [command])):
            assert option.replace("_", "-") in options(command), command


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_of_a_help_exists(name, capsys):
    for more in ("--help", "--help-all") if name in ("train", "remove-norms") else ("--help",):
        assert main([name, more]) == 0
        text = capsys.readouterr().out
        known = options(name) | {"--help-all"}
        assert not {option.replace("_", "-") for option in re.findall(FLAG, text)} - known


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.stem)
def test_every_flag_of_a_page_exists(page):
    text = re.sub(r"^(?!.*hf-lnfree).*(torchrun|pytest|pip |git |uv ).*$", "", page.read_text(), flags=re.M)
    everywhere = set().union(*map(options, COMMANDS))
    of_a_command = options(page.stem) if page.stem in COMMANDS else everywhere
    for option in set(re.findall(rf"`({FLAG})", text)):
        assert option in of_a_command | everywhere


def test_a_study_takes_by_set_what_a_run_takes_by_a_flag(tmp_path, capsys):
    assert spoken("Name one with --text-column.", ["study", "f.yaml"]) == "Name one with --set text_column=...."
    assert spoken("fewer than --context-length 64.", ["demo"]) == "fewer than --set context_length=64."
    assert spoken("Give another --out.", ["study"]) == "Give another --out."
    assert spoken("Name one with --text-column.", ["train"]) == "Name one with --text-column."
    for text in ("`hf-lnfree train --help-all` lists all.", "fold first: hf-lnfree convert --to folded."):
        assert spoken(text, ["study"]) == text
    table = tmp_path / "table.jsonl"
    table.write_text('{"words": "text"}\n')
    study = tmp_path / "study.yaml"
    study.write_text("rows: {a: {config_overrides: {n_layer: 1}}}\n")
    command = ["study", str(study), "--out", str(tmp_path / "out"), "--device", "cpu", "--set", f"data={table}"]
    assert main(command) == 1
    assert "Name one with --set text_column=" in capsys.readouterr().err


def test_all_fields_have_flags():
    assert "--learning-rate" in options("train")
    assert {flag(name) for name in ("loss", "probe_steps")} <= options("remove-norms")
    assert LNFreeTrainingArguments in DATACLASSES
