"""The notebooks of the examples run without a network, and stand in the repository with what they print."""

import json
import os
import re
import subprocess
import sys

import pytest

from .fences import ROOT, fenced

NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
LARGEST = 200_000  # bytes, of all together
# In a process of its own, where what Jupyter's libraries warn of is no error.
EXECUTE = """
import sys
import nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": "."}}).execute()
nbformat.write(notebook, "executed.ipynb")
"""
WITHOUT_WIDGETS = "ignore:IProgress not found"  # said by tqdm in a kernel without ipywidgets


def cells(path):
    return json.loads(path.read_text())["cells"]


def code(path):
    return [cell for cell in cells(path) if cell["cell_type"] == "code"]


def kinds(cell):
    """What a cell shows: texts of a stream by its name, results by their types."""
    shown = [sorted(output["data"]) if "data" in output else output.get("name") for output in cell["outputs"]]
    return [kind for index, kind in enumerate(shown) if kind not in shown[:index]]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_it_is_kept_with(path, tmp_path):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    environment = {**os.environ, "PYTHONWARNINGS": WITHOUT_WIDGETS, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", EXECUTE, str(path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    executed = code(tmp_path / "executed.ipynb")
    for now, kept in zip(executed, code(path), strict=True):
        assert now["source"] == kept["source"]
        assert kinds(now) == kinds(kept), "".join(now["source"])


def test_notebooks_are_small_and_tell_nothing_of_the_machine_they_ran_on():
    assert len(NOTEBOOKS) == 2
    assert sum(path.stat().st_size for path in NOTEBOOKS) < LARGEST
    for path in NOTEBOOKS:
        for cell in code(path):
            assert "stderr" not in kinds(cell)
            texts = [output.get("text", output.get("data", {}).get("text/plain")) for output in cell["outputs"]]
            for place in ("/home", "/root", "/tmp", "/Users", "site-packages"):
                assert place not in json.dumps(texts)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_sentence_stands_before_each_cell(path):
    found = cells(path)
    assert [cell["cell_type"] for cell in found] == ["markdown", "code"] * (len(found) // 2)
    numbers = [cell["execution_count"] for cell in code(path)]
    assert numbers == list(range(1, len(numbers) + 1))  # run from top to bottom
    shown = {kind for cell in code(path) for found in kinds(cell) if isinstance(found, list) for kind in found}
    assert {"text/html", "image/png", "text/plain"} <= shown


def test_one_liners_print_what_the_page_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page, namespace = ROOT / "docs" / "how-to" / "notebook.md", {}
    for block in fenced(page, "python"):
        exec(compile(block, str(page), "exec"), namespace)
    assert capsys.readouterr().out == "".join(fenced(page, "text"))
    assert {path.name for path in tmp_path.iterdir()} == {"heads.svg", "differences.svg"}
    for path in re.findall(r"`(examples/.*?)`", page.read_text()):
        assert (ROOT / path).is_file()
