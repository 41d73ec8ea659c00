"""A token goes nowhere: by each way in which one comes, what each file and the screen say."""

import copy
import json
import pickle
import sys
from pathlib import Path

import pytest
import yaml

from hf_lnfree import LNFreeTrainingArguments, redaction
from hf_lnfree.cli.main import main
from hf_lnfree.provenance import command
from hf_lnfree.redaction import keep_secret, shareable, without_secrets

TOKEN = "hf_not-of-the-usual-form"
USUAL = "hf_" + "aB3" * 12
TINY = {
    "config_overrides": {"n_layer": 2, "n_embd": 32, "n_head": 2},
    **{"vocab_size": 300, "context_length": 32, "max_steps": 2, "probe_steps": 0, "max_validation_windows": 8},
    **{"row": "SM+R", "device": "cpu"},
}


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    monkeypatch.setattr(redaction, "told", set())


def called(monkeypatch, *arguments):
    """The command, with a command line of its own as in a process."""
    monkeypatch.setattr(sys, "argv", ["hf-lnfree", *map(str, arguments)])
    return main([*map(str, arguments)])


def everything(folder: Path) -> str:
    """The text of every file, and the names of all."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return "\n".join([*(path.read_text(errors="replace") for path in files), *map(str, folder.rglob("*"))])


# How a token comes: fields of the file, flags, environment.
TRAINING = {
    "flag": ({}, ["--hub_token", TOKEN], {}),
    "flag with equals": ({}, [f"--hub-token={TOKEN}"], {}),
    "file": ({"hub_token": TOKEN, "run_name": f"by {TOKEN}"}, [], {}),
    "environment": ({"run_name": f"by {TOKEN}"}, [], {"HF_TOKEN": TOKEN}),
    "of the usual form": ({"run_name": f"by {USUAL}"}, [], {}),
    "URL": ({"run_name": f"https://me:{TOKEN}@example.org/me"}, [], {}),
}


@pytest.mark.parametrize("way", TRAINING)
def test_no_file_of_a_run_holds_a_token(way, corpus, cache_dir, tmp_path, monkeypatch, capsys):
    fields, flags, environment = TRAINING[way]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump({**TINY, "data": str(corpus), "cache_dir": cache_dir, **fields}))
    out = tmp_path / "run"
    assert called(monkeypatch, "train", settings, "--out", out, *flags) == 0
    wanted = {"run.json", "results.json", "README.md", "log.jsonl"}
    assert wanted <= {path.name for path in out.iterdir()}
    said = capsys.readouterr()
    for secret in (TOKEN, USUAL):
        assert secret not in everything(out) + said.out + said.err


STUDIES = {
    "--set": ({}, ["--set", f"hub_token={TOKEN}"]),
    "--set=": ({}, [f"--set=hub_token={TOKEN}"]),
    "file": ({"hub_token": TOKEN, "title": f"by {TOKEN}"}, []),
    "row": ({"rows": {"one": {"hub_token": TOKEN, "run_name": TOKEN}}}, []),
}


@pytest.mark.parametrize("way", STUDIES)
def test_no_file_of_a_study_holds_a_token(way, corpus, cache_dir, tmp_path, monkeypatch, capsys):
    fields, flags = STUDIES[way]
    settings = tmp_path / "study.yaml"
    base = {**TINY, "data": str(corpus), "cache_dir": cache_dir, "rows": {"one": {}}}
    del base["device"]
    settings.write_text(yaml.safe_dump({**base, **fields}))
    out = tmp_path / "study"
    arguments = ["study", settings, "--out", out, "--seeds", "0", "--jobs", "1", "--device", "cpu", *flags]
    assert called(monkeypatch, *arguments) == 0
    assert {"study.json", "report.html"} <= {path.name for path in out.iterdir()}
    said = capsys.readouterr()
    assert TOKEN not in everything(out) + said.out + said.err


ERRORS = {
    "what is no YAML": (f"hub_token: {TOKEN}: x\n", []),
    "an unknown field": (f"hub_token: {TOKEN}\n{TOKEN}: 1\n", []),
    "a value that is refused": (f"hub_token: {TOKEN}\nmax_steps: {TOKEN}\n", []),
    "a corpus": ("", ["--data", f"https://me:{TOKEN}@example.org/text"]),
    "an unknown flag": ("", ["--hub_token", TOKEN, f"--{TOKEN}", "1"]),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_no_error_says_a_token(kind, tmp_path, monkeypatch, capsys):
    text, flags = ERRORS[kind]
    settings = tmp_path / "settings.yaml"
    settings.write_text(text)
    assert called(monkeypatch, "train", settings, "--out", tmp_path / "run", *flags) == 1
    said = capsys.readouterr()
    assert "error:" in said.err
    assert TOKEN not in said.out + said.err


def test_a_token_is_no_factor_of_a_study(tmp_path, monkeypatch, capsys):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({**TINY, "factors": {"hub_token": [TOKEN]}}))
    assert called(monkeypatch, "study", tmp_path / "study.yaml", "--out", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert "hub_token cannot be a factor" in said
    assert TOKEN not in said


def test_a_token_is_taken_out_of_a_command_before_it_is_quoted(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hf-lnfree", "train", "--hub_token", "it's-a-secret", "--seed", "1"])
    assert command() == "hf-lnfree train --hub_token '***' --seed 1"


@pytest.mark.parametrize(
    "argument",
    ["hub_token={}", "--set=hub_token={}", "config_overrides={{a: 1, api_key: {}}}", '{{"password": "{}"}}'],
)
def test_an_argument_that_assigns_a_secret(argument, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", argument.format("s3cr3t-value")])
    assert without_secrets("a s3cr3t-value here") == "a *** here"


def test_what_is_no_secret_stays(monkeypatch):
    for name in ("tokenizer", "max_tokens", "bos_token", "eos_token", "pad_token", "--first-token"):
        keep_secret({name: "of-the-text", "nested": [{name: "of-the-text"}]})
        monkeypatch.setattr(sys, "argv", ["x", name, "of-the-text", f"{name}=of-the-text"])
        assert shareable("of-the-text, hf_lnfree, https://huggingface.co/me/it") == (
            "of-the-text, hf_lnfree, https://huggingface.co/me/it"
        )
    keep_secret({"rows": {"one": {"hub_token": ["of-the-text"]}}})
    assert shareable(json.dumps({"a": "of-the-text"})) == '{"a": "***"}'


def test_a_copy_of_arguments_keeps_the_token_that_a_pickle_lacks(tmp_path):
    args = LNFreeTrainingArguments(str(tmp_path), hub_token=TOKEN, use_cpu=True)
    assert copy.copy(args).hub_token == TOKEN
    assert pickle.loads(pickle.dumps(args)).hub_token is None
