"""Pieces of work side by side: processes that each take one after the other, under one progress bar."""

import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil
import torch
from tqdm.auto import tqdm

from ..errors import LNFreeError, SettingsError
from .server import process_context

Report = Callable[[int, int], None]
"""Takes the step that was done and the number of all."""

BAR = "{desc} {n:.1f}/{total} |{bar}| {elapsed}, {remaining} left {postfix}"
SECONDS_TO_LEAVE = 15.0  # for a process that was asked to end


@dataclass(frozen=True)
class Job:
    """
    Args:
        name: what messages call it.
        console: file that takes what is printed meanwhile.
        work: called in another process, so it must be picklable; returns the line that says how it ended.
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

    A process takes a new job when its last one is done, since what it loads takes seconds; after one that failed
    another process takes its place.

    Args:
        threads: of torch, for each.
        announce: takes a line when a job starts and when it ends.

    Returns:
        The names of jobs that failed, in the order in which they did, each with its reason.
    """
    waiting, done = deque(jobs), 0
    workers: dict[Any, Worker] = {}
    failed: dict[str, str] = {}
    with tqdm(total=len(jobs), desc="cells", disable=None, smoothing=0, bar_format=BAR) as bar:

        def say(line: str) -> None:
            bar.clear()
            announce(line)
            bar.refresh()

        def give(worker: Worker) -> None:
            worker.take(waiting.popleft())
            workers[worker.connection] = worker
            say(f"{worker.job.name}: starts")

        try:
            for _ in range(min(at_once, len(jobs))):
                give(Worker(threads))
            while workers:
                for connection in wait(list(workers)):
                    worker = workers[connection]
                    ended = worker.receive()
                    if ended is None:
                        continue
                    del workers[connection]
                    done += 1
                    say(f"[{done}/{len(jobs)}] {worker.job.name}: {ended.line}")
                    if ended.failed:
                        failed[worker.job.name] = ended.line
                    if ended.failed or not waiting:
                        worker.leave()
                    if waiting:
                        give(Worker(threads) if ended.failed else worker)
                bar.n = done + sum(worker.share for worker in workers.values())
                bar.set_postfix_str(", ".join(map(str, workers.values())))
        finally:
            for worker in workers.values():
                worker.process.terminate()  # all at once, before one is waited for
            for worker in workers.values():
                worker.leave()
    return failed


class End(NamedTuple):
    """How a job ended, in a line."""

    line: str
    failed: bool = False


class Worker:
    """A process that does jobs, and how far it is with the one that it has."""

    def __init__(self, threads: int):
        context = process_context()
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=do_jobs, args=(threads, theirs))
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the connection
        self.step, self.steps = 0, 0

    def take(self, job: Job) -> None:
        self.job, self.step, self.steps = job, 0, 0
        self.connection.send(job)

    def receive(self) -> End | None:
        """One message; how the job ended, if it is the last one."""
        try:
            message = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return End(f"its process {how_it_ended(self.process.exitcode)}; see {self.job.console}", failed=True)
        if isinstance(message, End):
            return message._replace(line=f"{message.line} (see {self.job.console})") if message.failed else message
        self.step, self.steps = message
        return None

    def leave(self) -> None:
        """The end of the connection tells the process that there is no more to do."""
        self.connection.close()
        self.process.join(SECONDS_TO_LEAVE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    @property
    def share(self) -> float:
        return self.step / self.steps if self.steps else 0.0

    def __str__(self) -> str:
        return f"{self.job.name} {self.step}/{self.steps or '?'}"


def how_it_ended(code: int | None) -> str:
    """An exit code in words; SIGKILL is what the system sends when memory runs out."""
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    memory = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{memory}"


def do_jobs(threads: int, connection: Connection) -> None:
    """What a process does: one job after the other, each with its output in a file and its steps in the connection."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)

    def report(step: int, steps: int) -> None:
        with suppress(OSError):  # the parent is gone
            connection.send((step, steps))

    with suppress(EOFError, KeyboardInterrupt):
        while True:
            job = connection.recv()
            print_to(job.console)
            try:
                connection.send(End(job.work(report)))
            except Exception as error:
                traceback.print_exc()
                said = str(error) if isinstance(error, (LNFreeError, OSError)) else f"{type(error).__name__}: {error}"
                connection.send(End(" ".join(said.split()), failed=True))


def end_with_parent() -> None:
    """A process whose parent was killed would train on unseen."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def print_to(path: Path) -> None:
    """From here on, whatever this process and its children print goes there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
