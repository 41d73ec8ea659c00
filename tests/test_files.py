"""Files that are there whole or not at all, in JSON that any reader takes, without secrets."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_lnfree.errors import listed
from hf_lnfree.files import atomic_folder, json_line, read_json, require_own, sweep, write_json, write_text
from hf_lnfree.redaction import shareable

WRITES = """
import sys
from pathlib import Path
from hf_lnfree.files import write_json
path, mark = Path(sys.argv[1]), sys.argv[2]
for _ in range(300):
    write_json(path, {mark: [mark] * 2000})
    (read,) = __import__("json").loads(path.read_text()).items()
    assert read[1] == [read[0]] * 2000
"""


def strictly(text):
    return json.loads(text, parse_constant=pytest.fail)


def test_what_is_not_finite_is_null(tmp_path):
    value = {
        "loss": math.nan,
        "rows": [(1, math.inf), (2, -math.inf)],
        "tensor": torch.tensor([[1.5, math.nan]], dtype=torch.bfloat16),
        "scalar": torch.tensor(math.nan),
        "array": np.array([np.inf, 0.25], dtype=np.float32),
        "number": np.float64("nan"),
        "count": np.int64(3),
        "yes": True,
        "path": Path("runs") / "mine",
        7: None,
    }
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text()
    assert strictly(text) == {
        **{"loss": None, "rows": [[1, None], [2, None]], "tensor": [[1.5, None]], "scalar": None},
        **{"array": [None, 0.25], "number": None, "count": 3, "yes": True, "path": "runs/mine", "7": None},
    }
    assert text.startswith('{\n "loss"')
    assert text.endswith("}\n")
    assert strictly(json_line(value)) == strictly(text)
    assert "\n" not in json_line(value)


def test_secrets_are_taken_out_of_texts_and_not_out_of_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("SERVICE_PASSWORD", "12345678")
    monkeypatch.setenv("OTHER_API_KEY", '12345678"quoted')
    monkeypatch.setenv("HOME", "/home/me")
    value = {"tokens": 12345678, "text": "with 12345678", "12345678": ['12345678"quoted', "/home/me/data"]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == {"tokens": 12345678, "text": "with ***", "***": ["***", "~/data"]}
    write_text(tmp_path / "a.md", "12345678 in /home/me, not in /home/meadow or /mnt/home/me")
    assert (tmp_path / "a.md").read_text() == "*** in ~, not in /home/meadow or /mnt/home/me"
    monkeypatch.setenv("HOME", "/")
    assert shareable("/home/me") == "/home/me"


def test_two_processes_may_write_one_file(tmp_path):
    path = tmp_path / "shared.json"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITES, str(path), mark], stderr=subprocess.PIPE, text=True)
        for mark in ("a", "b")
    ]
    said = [writer.communicate(timeout=120)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], said
    assert [found.name for found in tmp_path.iterdir()] == ["shared.json"]


def test_what_cannot_be_written_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_text(tmp_path / "a.md", "old")

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "a.md", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.md", "old")]


def aged(path):
    os.utime(path, (0, 0))
    return path


DIES = """
import os, sys
from pathlib import Path
from hf_lnfree.files import atomic_folder
with atomic_folder(Path(sys.argv[1])) as partial:
    (partial / "half").write_text("")
    print(partial, flush=True)
    sys.stdin.read() and os._exit(1)
"""


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path):
    writers = [
        subprocess.Popen([sys.executable, "-c", DIES, str(tmp_path / name)], stdin=-1, stdout=-1, text=True)
        for name in ("killed", "living")
    ]
    killed, living = (aged(Path(writer.stdout.readline().strip())) for writer in writers)
    writers[0].communicate("die")
    assert killed.exists()
    with atomic_folder(tmp_path / "next") as partial:
        assert set(tmp_path.iterdir()) == {living, partial}
    writers[1].communicate("")
    assert {path.name for path in tmp_path.iterdir()} == {"next", "living"}


def test_a_run_sweeps_its_own_folder(tmp_path):
    old = [aged(tmp_path / name) for name in (".partial-1", ".partial-2") if not (tmp_path / name).write_text("")]
    (tmp_path / ".partial-young").write_text("")
    (tmp_path / "mine").write_text("")
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".partial-young", "mine"}
    assert len(old) == 2


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(ValueError, match=r"half\.json is damaged"):
        read_json(tmp_path / "half.json")


@pytest.mark.parametrize(("count", "expected"), [(0, ""), (1, "a"), (4, "a, b, c, d"), (5, "a, b, c, d and 1 more")])
def test_long_lists_of_names_are_cut_and_counted(count, expected, tmp_path):
    names = [*"abcde"][:count]
    assert listed(names) == expected
    for name in names:
        (tmp_path / name).write_text("")
    if names:
        with pytest.raises(ValueError, match=f"holds no run: {expected}\\. Give another"):
            require_own(tmp_path, "run", ["results.json"])


def test_files_do_without_torch():
    code = "import sys, hf_lnfree.files, hf_lnfree.records, hf_lnfree.tables; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
