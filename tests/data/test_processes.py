"""A run that is ended while several processes tokenise leaves none of them behind."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

# Documents are slow in the processes that tokenise, and in no other.
PROGRAM = """
import os, sys, time
from hf_lnfree.cli.main import main
from hf_lnfree.data import encoding
from hf_lnfree.data.corpus import Corpus
encoding.CHUNK = 8  # so that every process has some
us, keeps = os.getpid(), Corpus.keeps
def slow(self, digest):
    if os.getpid() != us:
        time.sleep(1)
    return keeps(self, digest)
Corpus.keeps = slow
sys.exit(main(sys.argv[1:]))
"""
AT_MOST = 60.0  # seconds


def until(found):
    end = time.monotonic() + AT_MOST
    while not (value := found()) and time.monotonic() < end:
        time.sleep(0.1)
    return value


@pytest.mark.parametrize(
    ("sent", "code", "to_all"),
    [
        (signal.SIGTERM, 143, False),
        (signal.SIGINT, 130, False),
        (signal.SIGINT, 130, True),
        (signal.SIGKILL, -9, False),
    ],
    ids=["SIGTERM", "SIGINT", "Ctrl-C", "kill -9"],
)
def test_nothing_is_left(sent, code, to_all, corpus, tmp_path):
    arguments = ["train", "--data", str(corpus), "--vocab-size", "300", "--context-length", "32", "--device", "cpu"]
    arguments += ["--tokenizing-processes", "2", "--cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / "run")]
    arguments += ["--config-overrides", "{n_layer: 1, n_embd: 32, n_head: 2}", "--max-steps", "1"]
    run = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    workers = []
    try:
        us = psutil.Process(run.pid)
        workers = until(lambda: us.children(recursive=True) if len(us.children(recursive=True)) >= 2 else None)
        assert workers, "no process was started"
        time.sleep(0.5)
        os.killpg(run.pid, sent) if to_all else run.send_signal(sent)
        said = run.communicate(timeout=AT_MOST)[1]
        assert run.returncode == code, said[-2000:]
        assert until(lambda: not any(worker.is_running() for worker in workers))
    finally:
        for process in [worker for worker in workers or () if worker.is_running()]:
            process.kill()
        run.kill()
    if code > 0:
        assert "Traceback" not in said
        assert said.splitlines()[-1] in ("Interrupted.", "Terminated.")
        assert not list((tmp_path / "cache" / "windows").glob(".partial-*"))
