"""The help of every command: whole at 80 columns, grouped, and read without torch or transformers."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import typer
from transformers import TrainingArguments

from hf_lnfree.cli.main import app, main
from hf_lnfree.training import LNFreeTrainingArguments
from hf_lnfree.training.fields import ALIASES
from hf_lnfree.training.host_fields import HostFields

GROUP = typer.main.get_command(app)
HELPS = [[], *([name] for name in GROUP.commands), ["train", "--help-all"], ["remove-norms", "--help-all"]]
# Commands that load a checkpoint, and those that run one.
LOADING = ["train", "remove-norms", "entropy", "evaluate", "lm-eval", "attribute", "convert"]
RUNNING = [*LOADING, "study", "demo"]


@pytest.fixture
def shown(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")

    def show(*arguments: str) -> str:
        assert main([*arguments, *([] if "--help-all" in arguments else ["--help"])]) == 0
        return capsys.readouterr().out

    return show


def named(text: str) -> set[str]:
    """The options that begin a line."""
    lines = re.findall(r"^  (-.*?)(?:  |$)", text, flags=re.M)
    return {word.strip(",") for line in lines for word in line.split() if word.startswith("-")}


@pytest.mark.parametrize("arguments", HELPS, ids=" ".join)
def test_every_help_is_whole_at_80_columns(arguments, shown):
    text = shown(*arguments)
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert "…" not in text
    command = GROUP.commands[arguments[0]] if arguments else GROUP
    options = {name for param in command.params for name in (*param.opts, *param.secondary_opts) if name[:1] == "-"}
    assert options | {"--help", "-h", "--traceback"} <= named(text)
    for word in re.findall(r"--[\w-]+", text):
        assert not word.endswith("-"), f"{word} is broken"
    for name in GROUP.commands if not arguments else ():
        assert f"\n  {name} " in text
    assert not re.search(r"\w \.\.\.\n|^Options:", text)
    examples = re.findall(r"^  hf-lnfree .*", text, flags=re.M)
    assert len(examples) >= bool(arguments)


def test_examples_are_accepted(shown, capsys):
    for name, command in GROUP.commands.items():
        for line in re.findall(r"^  (hf-lnfree .*)", shown(name), flags=re.M):
            program, found, *rest = line.split()
            assert (program, found) == ("hf-lnfree", name)
            if name not in ("train", "remove-norms"):
                command.make_context(name, re.sub("'.*?'", "text", " ".join(rest)).split())


def test_one_idea_has_one_name(shown):
    words = {name: named(shown(name)) for name in GROUP.commands}
    for name in LOADING:
        assert {"--trust-remote-code", "--revision"} <= words[name], name
    for name in RUNNING:
        assert "--device" in words[name], name
    for name in ("train", "remove-norms", "study", "demo", "entropy", "evaluate", "lm-eval", "attribute", "compare"):
        assert "--out" in words[name], name
    for name in ("train", "remove-norms", "entropy", "evaluate"):
        assert {"--data", "--text-column", "--context-length"} <= words[name], name
    everything = set().union(*words.values())
    assert not everything & {"--output-dir", "--dataset", "--windows", "--use-cpu", "--max-files"}
    assert not [word for word in everything if "_" in word]


def test_help_loads_neither_torch_nor_transformers():
    code = """
import contextlib, io, json, sys
from hf_lnfree.cli.main import app, main
import typer
texts = io.StringIO()
with contextlib.redirect_stdout(texts):
    codes = [main([*name, "--help"]) for name in ([], *([n] for n in typer.main.get_command(app).commands))]
heavy = {"torch", "transformers", "datasets", "numpy", "peft", "accelerate", "huggingface_hub", "matplotlib", "jinja2"}
print(json.dumps([codes, sorted(heavy & set(sys.modules)), len(texts.getvalue())]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    codes, heavy, length = json.loads(done.stdout)
    assert set(codes) == {0}
    assert heavy == []
    assert length > 10_000


def test_what_the_help_says_of_transformers_is_so():
    theirs = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    for field in dataclasses.fields(HostFields):
        assert field.default == theirs[field.name].default, field.name


def test_help_all_lists_every_field(shown):
    aliases = {field: alias for alias, field in ALIASES.items()}
    fields = {field.name for field in dataclasses.fields(LNFreeTrainingArguments) if field.init}
    flags = {f"--{aliases.get(name, name).replace('_', '-')}" for name in fields}
    for command in ("train", "remove-norms"):
        assert flags <= named(shown(command, "--help-all"))
    assert len(flags & named(shown("train"))) < 55
