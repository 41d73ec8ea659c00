"""Pieces of work side by side: each in a process of its own, with its share of the threads, under one progress bar."""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from tqdm.auto import tqdm

from ..errors import LNFreeError, SettingsError

Report = Callable[[int, int], None]
"""Takes the step that was done and the number of all."""

# What a process loads first of all; with "forkserver" this is done once for all of them.
PRELOADED = ["hf_lnfree.studies.running", "hf_lnfree.pages.finish"]
SECONDS_TO_LEAVE = 15.0


@dataclass(frozen=True)
class Job:
    """
    Args:
        name: what messages call it.
        console: file that takes what its process prints.
        work: called in that process, so it must be picklable; returns the line that says how it ended.
    """

    name: str
    console: Path
    work: Callable[[Report], str]


def shares(jobs: int | Literal["auto"], to_do: int, device: torch.device) -> tuple[int, int]:
    """
    How many processes at once, and how many threads each.

    Raises:
        SettingsError: fewer than one job, or several under torchrun.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if jobs != "auto" and (jobs < 1 or (launched and jobs > 1)):
        raise SettingsError(
            f"jobs={jobs}: give 1 or more, or auto; under torchrun or accelerate launch 1, since a cell takes all "
            "processes there."
        )
    cores = usable_cores()
    if jobs == "auto":
        jobs = 1 if launched or device.type != "cpu" else cores
    at_once = max(1, min(jobs, to_do))
    return at_once, max(1, cores // at_once)


def usable_cores() -> int:
    """Cores, and not hyperthreads, that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, psutil.cpu_count(logical=False) or allowed)


def side_by_side(
    jobs: Sequence[Job], at_once: int, threads: int, announce: Callable[[str], None] = print
) -> dict[str, str]:
    """
    Do all jobs, `at_once` at a time. One that fails does not stop the others; an interruption stops all.

    Args:
        threads: of torch, for each.
        announce: takes a line when a job starts and when it ends.

    Returns:
        The names of jobs that failed, in the order in which they did, each with its reason.
    """
    # A fork is quick and shares what is loaded, but a process that was forked cannot use an accelerator.
    context: Any = multiprocessing.get_context("spawn" if torch.accelerator.is_available() else FORKSERVER)
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(PRELOADED)
    waiting, done = deque(jobs), 0
    running: dict[Any, Running] = {}
    failed: dict[str, str] = {}
    with tqdm(total=len(jobs), desc="cells", disable=None, smoothing=0, bar_format=BAR) as bar:

        def say(line: str) -> None:
            bar.clear()
            announce(line)
            bar.refresh()

        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    process = Running.start(waiting.popleft(), threads, context)
                    running[process.connection] = process
                    say(f"[{done + len(running)}/{len(jobs)}] {process.job.name}: starts")
                for connection in wait(list(running)):
                    process = running[connection]
                    if process.receive():
                        continue
                    del running[connection]
                    done += 1
                    if process.failure is not None:
                        failed[process.job.name] = process.failure
                    say(f"[{done}/{len(jobs)}] {process.job.name}: {process.failure or process.ended}")
                bar.n = done + sum(process.share for process in running.values())
                bar.set_postfix_str(", ".join(map(str, running.values())))
        finally:
            stop([process.process for process in running.values()])
    return failed


BAR = "{desc} {n:.1f}/{total} |{bar}| {elapsed}, {remaining} left {postfix}"
FORKSERVER = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


class Running:
    """A job in its process, as far as it has reported."""

    def __init__(self, job: Job, process: Any, connection: Connection):
        self.job, self.process, self.connection = job, process, connection
        self.step, self.steps = 0, 0
        self.ended: str | None = None
        self.failure: str | None = None

    @classmethod
    def start(cls, job: Job, threads: int, context: Any) -> "Running":
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(job, threads, theirs), name=job.name)
        process.start()
        theirs.close()  # so that the end of the process is the end of the connection
        return cls(job, process, ours)

    def receive(self) -> bool:
        """Take one message; returns whether more may follow."""
        try:
            kind, *values = self.connection.recv()
        except EOFError:
            self.process.join()
            self.connection.close()
            if self.ended is None and self.failure is None:
                self.failure = f"its process {how_it_ended(self.process.exitcode)}; see {self.job.console}"
            return False
        if kind == "step":
            self.step, self.steps = values
        elif kind == "ended":
            (self.ended,) = values
        else:
            self.failure = f"{values[0]} (see {self.job.console})"
        return True

    @property
    def share(self) -> float:
        return self.step / self.steps if self.steps else 0.0

    def __str__(self) -> str:
        return f"{self.job.name} {self.step}/{self.steps or '?'}"


def how_it_ended(code: int) -> str:
    """An exit code in words; SIGKILL is what the system sends when memory runs out."""
    if code >= 0:
        return f"ended with exit code {code}"
    memory = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{memory}"


def stop(processes: Sequence[Any]) -> None:
    """Politely, then not."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(SECONDS_TO_LEAVE)
        if process.is_alive():
            process.kill()
            process.join()


def work(job: Job, threads: int, connection: Connection) -> None:
    """What a process does: the job, with its output in a file and its progress in the connection."""
    threading.Thread(target=leave_with_parent, daemon=True).start()
    job.console.parent.mkdir(parents=True, exist_ok=True)
    output = os.open(job.console, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    torch.set_num_threads(threads)

    def report(step: int, steps: int) -> None:
        with suppress(BrokenPipeError):
            connection.send(("step", step, steps))

    try:
        connection.send(("ended", job.work(report)))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        traceback.print_exc()
        said = str(error) if isinstance(error, (LNFreeError, OSError)) else f"{type(error).__name__}: {error}"
        connection.send(("failed", " ".join(said.split())))


def leave_with_parent() -> None:
    """A process whose parent was killed would train on unseen."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
