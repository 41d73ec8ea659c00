"""The code of the README, the tutorial and the how-to guides runs, page by page, and prints what the pages say.

Training is cut to a few steps, so numbers are not compared; every word that a page shows must be printed.
"""

import json
import logging
import re
import shlex
import shutil
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_lnfree.cli.app import console
from hf_lnfree.cli.main import main
from hf_lnfree.data import corpus

from .fences import ROOT, Block, blocks, fenced

TUTORIAL = ROOT / "docs" / "tutorial.md"
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs" / "how-to").glob("*.md"))
CUT = {"max_validation_windows": 16, "attention_report_windows": 16, "probe_steps": 4}
STEPS = ["--max-steps", "4"]
FLAGS = [part for name, value in CUT.items() for part in (f"--{name.replace('_', '-')}", str(value))]
SET = [part for name, value in {**CUT, "max_steps": 2}.items() for part in ("--set", f"{name}={value}")]
SHORTER = {
    "train": ["--device", "cpu", *FLAGS, *STEPS],
    "remove-norms": ["--device", "cpu", *FLAGS, *STEPS, "--removal-windows", "4"],
    "study": ["--device", "cpu", "--jobs", "1", *SET],
    "demo": ["--device", "cpu", "--jobs", "1", *SET],
    "entropy": ["--device", "cpu", "--max-windows", "32"],
    "geometry": ["--device", "cpu", "--max-windows", "32"],
    "evaluate": ["--device", "cpu", "--max-documents", "2"],
}
EXIT_CODES = {"diverged": 3}
OWN_STEPS = ("diverged",)
"""Pages whose commands are short enough, and would print something else if they were cut."""


CHOSEN_BY_THE_MODEL = re.compile(r"After .* the model gives .*|.* (head|bias|MLP|embedding)[\w ]* +[-+]\d.*")
"""Lines whose words depend on what a model has learned: the token that it predicts, and its largest components."""


def masked(text: str) -> str:
    """Words alone: numbers are #, and how a table or a line is broken does not count."""
    text = re.sub(r"[─━│┃╌]+", " ", text)
    text = re.sub(r"[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?", "#", text)
    text = re.sub(r"(# h )?(# min )?# s\b", "# s", text)
    return " ".join(text.split())


def lines_missing(shown: str, printed: str) -> list[str]:
    """Lines that a page shows and that were not printed."""
    everything = masked(printed)
    lines = [line for line in shown.splitlines() if not CHOSEN_BY_THE_MODEL.fullmatch(line)]
    return [line for line in lines if masked(line) not in everything]


def shorter(page: Path, arguments: list[str]) -> list[str]:
    return arguments + ([] if page.stem in OWN_STEPS else SHORTER.get(arguments[0], []))


@pytest.fixture
def printed(capsys, caplog):
    """What was printed or logged since it was last asked for."""
    caplog.set_level(logging.INFO, logger="hf_lnfree")

    def text() -> str:
        captured = capsys.readouterr()
        logged = "\n".join(caplog.messages)
        caplog.clear()
        return f"{captured.out}\n{captured.err}\n{logged}"

    return text


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone of the repository, and a standard library of a few packages."""
    folder = tmp_path_factory.mktemp("docs") / "clone"
    for name in ("examples", "hf_lnfree"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", folder)
    for package in ("json", "logging", "asyncio", "email", "unittest"):
        library = Path(sysconfig.get_paths()["stdlib"]) / package
        shutil.copytree(library, folder.parent / "stdlib" / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def run_page(clone):
    """Runs the blocks of a page in the clone, and returns what it failed to print."""

    def run(page: Path, printed) -> list[str]:
        for text in fenced(page, "yaml"):
            if (file := re.search(r"`([\w-]+\.yaml)`", page.read_text())) and not (clone / file[1]).exists():
                (clone / file[1]).write_text(text)
        missing: list[str] = []
        namespace = {"__name__": page.stem}
        for block in blocks(page):
            printed()
            if block.language == "python":
                exec(compile(block.code, str(page), "exec"), namespace)
            elif block.printed is not None:
                run_commands(page, block)
            if block.printed is not None:
                missing += lines_missing(block.printed, printed())
        return missing

    return run


def run_commands(page: Path, block: Block) -> None:
    refused = 1 if (block.printed or "").startswith("error: ") else 0
    for line in block.code.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line)
        assert program == "hf-lnfree"
        assert main(shorter(page, arguments)) == EXIT_CODES.get(page.stem, refused), line


@pytest.fixture(autouse=True)
def here(clone, monkeypatch):
    monkeypatch.chdir(clone)
    monkeypatch.setattr(console, "_width", 120)  # COLUMNS is not asked for where TERM says that the terminal is dumb
    paths = SimpleNamespace(get_paths=lambda: {"stdlib": str(clone.parent / "stdlib")})
    monkeypatch.setattr(corpus, "sysconfig", paths)


@pytest.fixture
def tutorial(clone, run_page, printed):
    """What the tutorial failed to print; its models are those of the how-to guides."""
    if not (clone / "missing.txt").exists():
        (clone / "missing.txt").write_text("\n".join(run_page(TUTORIAL, printed)))
    return (clone / "missing.txt").read_text()


def test_the_readme_prints_what_it_says(run_page, printed):
    assert run_page(README, printed) == []
    assert len(README.read_text().splitlines()) <= 120


def test_the_tutorial_prints_what_it_says(tutorial):
    assert tutorial == ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_guide_prints_what_it_says(page, tutorial, run_page, printed):
    assert run_page(page, printed) == []


def keys_said(file: str) -> set[str]:
    """The keys that the page of files gives for a file, with NN for the number of a layer."""
    page = (ROOT / "docs" / "reference" / "files.md").read_text()
    table = re.search(rf"^## {re.escape(file)}.*?^\| key \|(.*?)\n\n", page + "\n\n", flags=re.S | re.M)[1]
    return {key for line in table.splitlines()[2:] for key in re.findall(r"`([^`]+)`", line.split("|")[1])}


@pytest.mark.parametrize(
    ("file", "folders", "page"),
    [
        ("choices.json", ["gelu"], None),
        ("entropy.json", ["gelu"], None),
        ("flight_recorder.json", ["diverged"], "diverged"),
        ("attribution.json", ["attribution"], "attribute"),
        ("study.json", ["study"], "study"),
        ("summary.json", ["study"], "study"),
        ("conversion.json", ["stock", "folded", "onnx"], "convert"),
    ],
)
def test_files_have_the_keys_that_the_reference_says(file, folders, page, tutorial, clone, run_page, printed):
    paths = [clone / "runs" / folder / file for folder in folders]
    if not all(path.exists() for path in paths):
        run_page(ROOT / "docs" / "how-to" / f"{page}.md", printed)
    assert {key for path in paths for key in json.loads(path.read_text())} == keys_said(file)


def test_the_log_has_no_key_that_the_reference_does_not_say(tutorial, clone):
    entries = map(json.loads, (clone / "runs" / "layernorm" / "log.jsonl").read_text().splitlines())
    logged = {re.sub(r"layer_\d\d", "layer_NN", key) for entry in entries for key in entry}
    assert "entropy/layer_NN" in logged
    assert logged <= keys_said("log.jsonl")


def test_a_word_that_is_not_printed_is_seen():
    assert lines_missing("loss 3.2 after 12 s\nsaved", "loss 4.25 after 1 min 3 s") == ["saved"]
