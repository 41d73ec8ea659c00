"""The pages of docs/: their code runs, their commands are commands, and none is missing."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
import typer
import yaml

from hf_lnfree.cli.main import app, main
from hf_lnfree.cli.removal import DATACLASSES
from hf_lnfree.cli.train import parse_arguments
from hf_lnfree.pages.scaling import scaling_tables
from hf_lnfree.studies.statistics import Estimate, estimate
from hf_lnfree.studies.study import Study

from .fences import ROOT, commands, fenced
from .test_layering import FLOORS

DOCS = ROOT / "docs"
HOW_TO = sorted((DOCS / "how-to").glob("*.md"))
COMMANDS = typer.main.get_command(app).commands


def test_every_command_occurs_in_a_guide():
    lines = [line.split() for page in HOW_TO for line in commands(page)]
    assert {line[1] for line in lines if line[0] == "hf-lnfree"} == set(COMMANDS)


def test_every_guide_is_in_the_index():
    listed = re.search(r"```{toctree}\n.*?\n\n(.*?)```", (DOCS / "how-to" / "index.md").read_text(), flags=re.S)
    assert sorted(listed[1].split()) == [page.stem for page in HOW_TO if page.stem != "index"]


@pytest.mark.parametrize("line", [line for page in (DOCS / "tutorial.md", *HOW_TO) for line in commands(page)])
def test_commands_are_accepted(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, *arguments = shlex.split(line)
    if program == "torchrun":
        program, *arguments = "hf-lnfree", *arguments[arguments.index("hf_lnfree.cli.main") + 1 :]
    if program == "python":  # tests/test_examples.py runs them
        assert Path(arguments[0]).is_file()
        return
    assert program == "hf-lnfree"
    name, *arguments = arguments
    if name == "--version" or "--help" in arguments:
        assert main([name, *arguments]) == 0
    elif name == "train":
        parse_arguments(arguments)
    elif name == "remove-norms":
        parse_arguments([*arguments[1:], "--bf16", "false", "--device", "cpu"], dataclasses=DATACLASSES)
    else:  # usage is checked before anything is done
        COMMANDS[name].make_context(name, arguments)


def test_the_picture_of_the_rooms_shows_the_order_of_the_layers():
    shown = re.findall(r">(\w+)</text>", (DOCS / "images" / "rooms.svg").read_text())
    assert [name for name in shown if name != "imports"] == FLOORS
    page = (DOCS / "architecture.md").read_text()
    assert re.findall(r"^\| `?(\w+)`? \|", page, flags=re.M)[1:] == FLOORS


def test_what_a_page_loads_from_elsewhere_is_seen(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    from offline import loads

    page = '<a href="https://a.org">link</a> <script src="https://cdn.b.org/x.js"></script> <link href="//c.org/y.css">'
    (tmp_path / "page.html").write_text(page)
    (tmp_path / "style.css").write_text("@import url(https://d.org/font.css); body { background: url(here.png) }")
    addresses = ["https://cdn.b.org/x.js", "//c.org/y.css", "https://d.org/font.css"]
    assert [found.partition(": ")[2] for found in loads(tmp_path)] == addresses


def test_own_activation_norm_and_family():
    """In a process of their own: they register names."""
    blocks = fenced(DOCS / "extending.md", "python")
    assert len(blocks) == 3

    done = subprocess.run([sys.executable, "-W", "error", "-c", "\n".join(blocks)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_study_of_the_page_is_one(tmp_path):
    rows, factors = fenced(DOCS / "how-to" / "study.md", "yaml")
    for text, count in ((rows, 2), (factors, 6)):
        (tmp_path / "study.yaml").write_text(text)
        assert len(Study.load(tmp_path / "study.yaml").rows) == count


def learned(cells):
    """Lines of a table: what each row's activations learned, the mean of the layers and each layer."""
    rows: dict = {}
    for cell in cells:
        rows.setdefault(cell["row"], []).append(cell)
    for row, cells in rows.items():
        if any(cell["diverged_at"] is not None for cell in cells):
            continue
        for key in (key for key in cells[0].get("layers", {}) if not key.startswith("entropy")):
            seeds = [cell["layers"][key] for cell in cells]
            values = [[fmean(layers) for layers in seeds], *zip(*seeds, strict=True)]
            yield f"| {row} | {' | '.join(estimate(list(value)).format(3) for value in values)} |"


def geometry(found):
    """Lines of tables: of pairs of rows a metric by layer, when heads leave overload, and correlations with entropy."""
    for pair in found["pairs"]:
        for key, layers in pair["difference"].items():
            shown = [Estimate(**layer).format(3, sign=True) for layer in layers]
            since = ["" if each is None else f" ({each['mean']:.0f})" for each in pair["onset"][key]]
            yield f"| {' | '.join(map(str.__add__, shown, since))} |"
    for row, layers in found["leaves_overload"].items():
        steps = (", ".join("never" if step is None else str(step) for step in layer) for layer in layers)
        yield f"| {row} | {' | '.join(steps)} |"
    for both in found["correlation"].values():
        yield f"| {' | '.join(Estimate(**each).format(2, sign=True) for each in both.values())} |"


FINDINGS = sorted((DOCS / "findings").glob("[!i]*.md"))


def differences(text):
    """With their sign and without."""
    return set(re.findall(r"[+-]\d+\.\d ± \d+\.\d %", text)) | set(re.findall(r"\d+\.\d ± \d+\.\d %", text))


@pytest.mark.parametrize("page", FINDINGS, ids=lambda page: page.stem)
def test_findings_show_what_their_results_hold(page):
    """The tables, commands and pictures of each page are those of the files that it names."""
    text = page.read_text()
    names, known = re.findall(r"`benchmarks/results/([\w-]+).json`", text), ""
    for name in names:
        found = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        assert found["command"] in commands(page)
        if "rungs" in found:  # of a search
            assert f"`{found['layer_activations']}`" in text
            continue
        if "laws" in found:  # of studies at several sizes
            lines = [f"| {' | '.join(row)} |" for table in scaling_tables(found) for row in table.rows]
            assert [line for line in lines if line not in text] == []
            continue
        for row in found["rows"]:
            assert f"| {row[0]} | {' | '.join(row[2:6])} |" in text
        assert all(line in text for line in learned(found["cells"]))
        assert all(line in text for line in geometry(found["geometry"])) if "geometry" in found else True
        assert f"(../images/{name}.svg)" in text
        assert (DOCS / "images" / f"{name}.svg").is_file()
        known += found["note"] + json.dumps(found["rows"], ensure_ascii=False)
    assert differences(text) <= differences(known)
    assert names


def test_the_page_of_all_findings_says_what_they_say():
    index = (DOCS / "findings" / "index.md").read_text()
    pages = [page.read_text() for page in FINDINGS]
    assert differences(index)
    assert differences(index) <= set().union(*map(differences, pages))
    assert all(f"({page.name})" in index for page in FINDINGS)


@pytest.mark.parametrize("page", sorted((DOCS / "findings").glob("*.md")), ids=lambda page: page.stem)
def test_findings_count_layers_as_reports_do_and_say_in_words_what_is_not_finite(page):
    text = page.read_text()
    assert not re.search(r"\bnan\b", text, flags=re.I)
    for name in re.findall(r"`benchmarks/results/([\w-]+).json`", text):
        content = (ROOT / "benchmarks" / "results" / f"{name}.json").read_text()
        json.loads(content, parse_constant=lambda word, name=name: pytest.fail(f"{name} holds {word}"))
    for header in re.findall(r"^\| row \| mean of the layers \| (.*) \|$", text, flags=re.M):
        assert header.split(" | ") == [str(layer) for layer in range(4)]
    for first, last in re.findall(r"layers (\d+) to (\d+)", text):
        assert int(first) < int(last) < 4


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples" / "findings").glob("[!_]*.yaml")), ids=lambda path: path.stem
)
def test_studies_of_the_findings_can_be_run(path):
    for scale in yaml.safe_load(path.read_text())["scales"]:
        study = Study.load(path, scale, {"fp16": False, "device": "cpu"})
        for row in study.rows:
            model, data, _ = study.arguments(row, 0, Path("unused"))
            config = model.config(data.context_length)
            assert config.norm in (config.stock_norm, "none", row.split(" ")[0])
            kept = "LN" in row or row.startswith("RMS") or path.stem in ("scale", "shapes")
            assert (config.norm == config.stock_norm) == kept
