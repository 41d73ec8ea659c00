"""What the speed claims rest on: each of ours against a named peer in the same run.

The candidates take turns, so that a slow moment of the machine meets all of them; reported are medians and their ratio
to the peer. Memory is the growth of a fresh process. Results go to benchmarks/results/, with the command and versions.

Usage: python benchmarks/run.py [--only attention-2048 memory] [--device cuda]
"""

import argparse
import json
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MEMORY = {8192: ("eager map and -nansum(p ln p)", "fused entropy and output"), 16384: ("fused entropy and output",)}


def interleaved(candidates: dict[str, Callable[[], object]], rounds: int, synchronize: Callable[[], None]) -> dict:
    """Median seconds of each candidate and the ratio to the first, the peer."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(rounds + 2):
        for name, run in candidates.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            if round_ >= 2:  # warm-up
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    peer = next(iter(medians))
    return {name: {"seconds": m, "ratio_to_" + peer: m / medians[peer]} for name, m in medians.items()}


def extra_megabytes(candidate: str, length: int, device: str) -> float:
    """Peak memory of one attention call beyond its inputs, in a process of its own."""
    import torch
    from candidates import attention_inputs, eager_entropy

    from hf_lnfree.analysis import fused_attention_entropy

    def run(length: int) -> None:
        inputs = attention_inputs(length, device)
        torch.cuda.reset_peak_memory_stats() if device.startswith("cuda") else None
        before.append(peak())
        if candidate == "fused entropy and output":
            fused_attention_entropy(*inputs, is_causal=True)
        else:
            eager_entropy(*inputs)

    def peak() -> float:
        if device.startswith("cuda"):
            return torch.cuda.max_memory_allocated() / 2**20
        status = Path("/proc/self/status").read_text()  # ru_maxrss of a new process is its parent's
        return int(re.search(r"VmHWM:\s*(\d+)", status)[1]) / 2**10  # type: ignore[index]

    before: list[float] = []
    run(64)  # what the libraries take once
    run(length)
    return peak() - before[-1]


def measure_memory(device: str) -> tuple[str, dict[str, dict[str, float]]]:
    found: dict[str, dict[str, float]] = {}
    for length, candidates in MEMORY.items():
        for candidate in candidates:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found[f"{candidate}, T={length}"] = {"MiB": pool.apply(extra_megabytes, (candidate, length, device))}
    return "Peak memory of causal attention with its entropies, B 1, H 12, d 64, float32, beyond its inputs.", found


def main(args: argparse.Namespace) -> None:
    import torch
    from candidates import BENCHMARKS

    from hf_lnfree.provenance import command, environment

    synchronize = torch.cuda.synchronize if args.device.startswith("cuda") else lambda: None
    RESULTS.mkdir(exist_ok=True)
    names = [*BENCHMARKS, "memory"]
    if unknown := set(args.only) - set(names):
        raise SystemExit(f"There is no benchmark {', '.join(sorted(unknown))}. There are: {', '.join(names)}.")
    for name in args.only or names:
        torch.manual_seed(0)
        record: dict[str, Any] = {}
        if name == "memory":
            what, found = measure_memory(args.device)
        else:
            candidates, rounds = BENCHMARKS[name]
            what = " ".join((candidates.__doc__ or "").split())
            found = interleaved(candidates(args.device), rounds, synchronize)
            record["rounds"] = rounds
        print(f"\n{name}: {what}")
        for candidate, values in found.items():
            print(f"  {candidate:40} " + "  ".join(f"{key} {value:.4g}" for key, value in values.items()))
        record = {"what": what, "results": found, **record, "environment": environment(), "command": command()}
        path = RESULTS / f"{name}-{args.device.split(':')[0]}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="names of benchmarks; all of them by default")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    main(parser.parse_args())
