"""How long a study takes, start to report: one cell after the other or two side by side, alone or beside other work."""

import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

STEPS, ROUNDS = {"alone": 150, "beside three busy processes": 50}, 2
SETTINGS = ["--set", "probe_steps=0", "--set", "eval_strategy=no", "--set", "max_validation_windows=64"]
# What OpenMP does unless told otherwise: spin for a while. Named here, since our commands change it on a busy machine.
SPINNING = {"GOMP_SPINCOUNT": "300000"}
CANDIDATES = {
    "one after the other, two threads": (["--jobs", "1"], SPINNING),
    "one after the other, waiting without spinning": (["--jobs", "1"], {"OMP_WAIT_POLICY": "passive"}),
    "two side by side": (["--jobs", "2"], {}),
}


def spin() -> None:
    """Keep a core busy."""
    import torch

    torch.set_num_threads(1)
    x = torch.randn(512, 512)
    while True:
        x = (x @ x).tanh()


@contextmanager
def busy(processes: int) -> Iterator[None]:
    others = [multiprocessing.get_context("spawn").Process(target=spin, daemon=True) for _ in range(processes)]
    for other in others:
        other.start()
    time.sleep(10 if others else 0)
    try:
        yield
    finally:
        for other in others:
            other.kill()


def seconds(flags: list[str], variables: dict[str, str], steps: int) -> float:
    """Of the demo's four rows, from the command to its report."""
    with tempfile.TemporaryDirectory() as folder:
        length = ["--set", f"max_steps={steps}", "--set", f"save_steps={steps}", "--out", folder]
        command = [sys.executable, "-m", "hf_lnfree.cli.main", "demo", "--device", "cpu", *SETTINGS, *length, *flags]
        start = time.perf_counter()
        subprocess.run(command, env=os.environ | variables, check=True, capture_output=True)
        return time.perf_counter() - start


def measure_study(device: str) -> tuple[str, dict[str, dict[str, float]]]:
    found: dict[str, dict[str, float]] = {}
    peer = next(iter(CANDIDATES))
    for where, steps in STEPS.items():
        times: dict[str, list[float]] = {name: [] for name in CANDIDATES}
        with busy(0 if where == "alone" else 3):
            for _ in range(ROUNDS):
                for name, (flags, variables) in CANDIDATES.items():
                    times[name].append(seconds(flags, variables, steps))
        medians = {name: statistics.median(values) for name, values in times.items()}
        for name, median in medians.items():
            found[f"{where}: {name}"] = {"seconds": median, "speed_to_peer": medians[peer] / median}
    what = "The demo's four rows on the CPU, start to report"
    return f"{what}: {STEPS['alone']} steps a row alone, fewer beside other work. Peer: {peer}.", found
