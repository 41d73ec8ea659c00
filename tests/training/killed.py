"""Runs to which something happens at a chosen point, each in a fork of a process that has only imported things.

Usage: python -m tests.training.killed '[{"at": "step", "step": 5, "arguments": [...]}, ...]'; prints JSON.
"""

import gc
import json
import os
import resource
import signal
import sys
import tempfile

from hf_lnfree.cli.main import main
from hf_lnfree.data import building, encoding
from hf_lnfree.training import checkpoints
from hf_lnfree.training.results import RunResults
from hf_lnfree.training.trainer import LNFreeTrainer

STEP = 5  # how many steps are done before, where a job does not say


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk():
    """No file grows beyond 40 kB from now on."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))


def with_little_room(*args):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, 1_000))
    return tokenised(*args)


def at_the_third_piece(writer, piece):
    if writer.done.documents > 4:
        die()
    add(writer, piece)


add, tokenised = building.TokenWriter.add, building.tokenised
# Where it happens: the owner and name of the function that is about to be called.
POINTS = {
    "step": (LNFreeTrainer, "_get_grad_norm"),  # after the backward pass
    "checkpoint": (LNFreeTrainer, "_save_optimizer_and_scheduler"),  # the model is written, the optimiser is not
    "rotation": (checkpoints, "rotate"),
    "results": (RunResults, "save"),  # training is over
    "disk full": (LNFreeTrainer, "training_step"),
}


def prepare(at, step):
    if at == "tokenisation":
        encoding.CHUNK, building.JOURNAL_EVERY = 4, 0.0
        building.TokenWriter.add = at_the_third_piece
        return
    if at == "disk full, tokenising":
        building.tokenised = with_little_room
        return
    owner, name = POINTS[at]
    function = getattr(owner, name)
    action = fill_disk if at == "disk full" else die

    def wrapped(*args, **kwargs):
        state = getattr(args[0], "state", None) if args else None
        if state is None or state.global_step >= step:
            action()
        return function(*args, **kwargs)

    setattr(owner, name, wrapped)


def in_a_fork(job):
    with tempfile.TemporaryFile("w+") as errors:
        child = os.fork()
        if child == 0:
            os.dup2(errors.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            if job["at"]:
                prepare(job["at"], job.get("step", STEP))
            os._exit(main(job["arguments"]))
        _, status = os.waitpid(child, 0)
        errors.seek(0)
        return {"code": os.waitstatus_to_exitcode(status), "output": errors.read()[-4000:]}


if __name__ == "__main__":
    gc.freeze()  # what was imported is shared with the forks
    print(json.dumps([in_a_fork(job) for job in json.loads(sys.argv[1])]))
