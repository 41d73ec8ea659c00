"""The process that those of a study are forked from: it has imported what cells need, and has done nothing else."""

import multiprocessing
import os
from multiprocessing.context import ForkServerContext, SpawnContext

# A fork of the study's own process could not use an accelerator, and could wait for threads that it does not have.
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
NEEDED = ["hf_lnfree.pages.finish", "hf_lnfree.studies.running", "transformers.trainer"]


def process_context() -> ForkServerContext | SpawnContext:
    """How processes are started."""
    if METHOD == "spawn":
        return multiprocessing.get_context("spawn")
    # Asked for its devices in the usual way, CUDA refuses to work in forks; what is imported may ask.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(NEEDED)
    return context


def start_importing() -> None:
    """Let the server import while this process does the same: it takes seconds, on another core."""
    if METHOD == "forkserver":
        from multiprocessing.forkserver import ensure_running

        process_context()
        ensure_running()
