"""Jobs in processes of their own: what they print, how they fail, who ends them."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import psutil
import pytest
import torch

from hf_lnfree.cli.study import DEMO
from hf_lnfree.errors import RunError, SettingsError
from hf_lnfree.studies.running import run_study
from hf_lnfree.studies.server import NEEDED, process_context
from hf_lnfree.studies.side_by_side import SECONDS_TO_LEAVE, Job, shares, side_by_side
from hf_lnfree.studies.study import Study

from .test_study import TINY

CPU = torch.device("cpu")


def work(report, what):
    """In a process that was spawned, which finds this function by its module."""
    report(1, 2)
    print(f"{what} in process {os.getpid()} with {torch.get_num_threads()} threads")
    if what == "raises":
        raise ZeroDivisionError("by zero")
    if what == "refuses":
        raise RunError("The data have\nchanged.")
    if what == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    return f"{what} is done"


def jobs(folder, *names):
    return [Job(name, folder / "of" / f"{name}.txt", partial(work, what=name)) for name in names]


def test_failures_are_named_and_the_others_go_on(tmp_path):
    names = ("one", "raises", "dies", "two", "refuses", "three")
    said = []
    failed = side_by_side(jobs(tmp_path, *names), 2, 1, said.append)
    assert set(failed) == {"raises", "dies", "refuses"}
    assert failed["raises"] == f"ZeroDivisionError: by zero (see {tmp_path / 'of' / 'raises.txt'})"
    assert failed["refuses"].startswith("The data have changed. (see ")
    assert "was killed by SIGKILL, as the system does when memory runs out" in failed["dies"]
    assert sum(line.endswith(" is done") for line in said) == 3
    consoles = {name: (tmp_path / "of" / f"{name}.txt").read_text() for name in names}
    assert all(f"{name} in process" in text and "with 1 threads" in text for name, text in consoles.items())
    assert "ZeroDivisionError" in consoles["raises"]
    assert f"process {os.getpid()}" not in "".join(consoles.values())
    assert not psutil.Process().children() or all(
        {"resource_tracker", "forkserver"} & set(" ".join(p.cmdline()).replace(".", " ").split())
        for p in psutil.Process().children()
    )


ASKED = """
import importlib, sys, torch
def asked(*arguments):
    print(sys._getframe(1).f_code.co_filename)
    return False
torch.cuda.is_available = torch.accelerator.is_available = asked
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def test_what_is_imported_before_a_fork_does_not_ask_for_gpus():
    """CUDA that was asked for its devices is of no use in a fork."""
    done = subprocess.run([sys.executable, "-c", ASKED, *NEEDED], capture_output=True, text=True, check=True)
    assert "hf_lnfree" not in done.stdout
    assert process_context() is not None
    assert os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"  # for what others import


def test_shares_of_cells_and_threads(monkeypatch):
    monkeypatch.setattr("hf_lnfree.studies.side_by_side.usable_cores", lambda: 8)
    assert shares("auto", 12, CPU) == (8, 1)
    assert shares("auto", 3, CPU) == (3, 2)
    assert shares("auto", 12, torch.device("cuda")) == (1, 8)
    assert shares(16, 12, CPU) == (12, 1)
    with pytest.raises(SettingsError, match="jobs=0: give 1 or more"):
        shares(0, 12, CPU)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert shares("auto", 12, CPU)[0] == 1
    with pytest.raises(SettingsError, match="jobs=2"):
        shares(2, 12, CPU)


def test_two_processes_train_what_one_trains(corpus, cache_dir, tmp_path):
    changes = {**TINY, "data": str(corpus), "save_steps": 3}
    study = Study.load(DEMO, changes=changes)
    local = {"cache_dir": cache_dir, "use_cpu": True, "disable_tqdm": True}
    rows, said = ["SM+G", "SM+R"], []
    alone = run_study(study, [0], tmp_path / "alone", rows, said.append, **local)
    together = run_study(study, [0], tmp_path / "together", rows, said.append, jobs=2, **local)
    for one, other in zip(alone, together, strict=True):
        assert (one.row, one.state) == (other.row, other.state)
        assert other.results.eval_loss == pytest.approx(one.results.eval_loss, rel=1e-5)  # threads may differ
    again: list[str] = []
    run_study(study, [0], tmp_path / "together", rows, again.append, jobs=2, **local)
    assert [line.partition(", found in")[0] for line in again] == [f"{row}, seed 0: finished" for row in rows]


PROGRAM = """
import signal
import sys
from pathlib import Path
from hf_lnfree.studies.side_by_side import Job, side_by_side
from tests.studies.test_side_by_side import sleep
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    side_by_side([Job(str(i), Path(sys.argv[1]) / f"{i}.txt", sleep) for i in range(2)], 2, 1)
"""


def sleep(report):
    """Longer than any test waits."""
    print("sleeps", flush=True)
    time.sleep(300)
    return "woke"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_one_that_started_it(how, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as started:
        deadline = time.monotonic() + 120
        while not all((tmp_path / f"{i}.txt").is_file() and (tmp_path / f"{i}.txt").read_text() for i in range(2)):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        children = psutil.Process(started.pid).children(recursive=True)
        sent = time.monotonic()
        started.send_signal(how)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    assert time.monotonic() - sent < SECONDS_TO_LEAVE  # they were told, and not waited for
