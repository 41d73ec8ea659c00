"""Tasks over code for lm-evaluation-harness: what they hold; where the extra `eval` is installed, that they run."""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from hf_lnfree.cli.main import main
from hf_lnfree.evaluation.harness import TASKS, tasks_path


@pytest.fixture(scope="module")
def code_tasks():
    """The module as the harness loads it: by its path."""
    spec = importlib.util.spec_from_file_location("code_tasks", Path(tasks_path()) / "code_tasks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["next_line", "identifiers", "brackets"])
def test_documents_are_the_same_each_time_and_have_one_right_answer(code_tasks, name):
    documents, again = getattr(code_tasks, name)()["test"], getattr(code_tasks, name)()["test"]
    assert documents.to_list() == again.to_list()
    assert len(documents) == 200
    for document in documents:
        assert len(set(document["choices"])) == len(document["choices"]) == (3 if name == "brackets" else 4)
        assert 0 <= document["target"] < len(document["choices"])
        assert document["context"].strip()
    if name != "brackets":
        assert max(Counter(documents["target"]).values()) < 80  # no place of the right answer stands out


def test_the_held_out_files_are_those_of_training(code_tasks):
    from hf_lnfree.data import DataArguments
    from hf_lnfree.data.splits import load_splits

    assert set(code_tasks.held_out_files()) == set(load_splits(DataArguments())[1].texts)


def test_every_task_has_its_file():
    for task in TASKS:
        text = (Path(tasks_path()) / f"{task}.yaml").read_text()
        settings = yaml.safe_load(text.replace("!function ", ""))
        assert (settings["task"], settings["output_type"]) == (task, "multiple_choice")
        assert settings["custom_dataset"] == f"code_tasks.{task.removeprefix('code_')}"


def test_without_the_harness_the_error_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["lm-eval", "anything"]) == 1
    assert "pip install 'hf_lnfree[eval]'" in " ".join(capsys.readouterr().err.split())


@pytest.mark.filterwarnings("ignore")  # of the harness and what it imports
def test_in_the_harness(corpus, cache_dir, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    folder = tmp_path / "model"
    tiny = "{n_layer: 2, n_embd: 32, n_head: 2, n_positions: 512}"
    arguments = ["--config-overrides", tiny, "--data", str(corpus), "--vocab-size", "300", "--context-length", "32"]
    arguments += ["--max-steps", "2", "--probe-steps", "0", "--attention-report-windows", "0", "--save-strategy", "no"]
    arguments += ["--device", "cpu", "--cache-dir", cache_dir, "--disable-tqdm", "true", "--out", str(folder)]
    assert main(["train", *arguments]) == 0
    assert main(["lm-eval", str(folder), "--limit", "8", "--out", str(tmp_path / "out.json")]) == 0
    assert "code_brackets" in capsys.readouterr().out
    ours = json.loads((tmp_path / "out.json").read_text())["scores"][str(folder)]
    assert set(ours) == set(TASKS)
    for scores in ours.values():
        share = scores["acc"]
        assert scores["acc_stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 7))  # of eight right or wrong
    assert main(["lm-eval", str(folder), "--limit", "1", "--tasks", TASKS[0]]) == 0  # of which no error is known
    assert "nan" not in capsys.readouterr().out
    assert main(["lm-eval", str(folder), "--tasks", "nothing"]) == 1
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["transformer.h.0.mlp.c_fc.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    assert main(["lm-eval", str(broken), "--limit", "1"]) == 1
    assert "has no transformer.h.0.mlp.c_fc.weight" in capsys.readouterr().err
    # and as the harness's own command, in a process without this package
    program = "import sys; sys.modules['hf_lnfree'] = None; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        program,
        "--model",
        "hf",
        "--tasks",
        ",".join(TASKS),
        "--limit",
        "8",
    ]
    command += ["--model_args", f"pretrained={folder},trust_remote_code=True", "--include_path", tasks_path()]
    command += ["--device", "cpu", "--output_path", str(tmp_path / "plain"), "--batch_size", "16"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    plain = json.loads(next((tmp_path / "plain").rglob("results*.json")).read_text())["results"]
    for task in TASKS:
        for name in ("acc", "acc_stderr"):
            assert plain[task][f"{name},none"] == ours[task][name]
