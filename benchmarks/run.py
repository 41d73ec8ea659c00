"""What the speed claims rest on: each of ours against a named peer in the same run.

The candidates take turns, so that a slow moment of the machine meets all of them; reported are medians and their ratio
to the peer. Memory is the growth of a fresh process. Results go to benchmarks/results/, with the command and versions.

Usage: python benchmarks/run.py [--only attention-2048 memory] [--device cuda]
"""

import argparse
import importlib
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MEMORY = {
    8192: ("eager map and -nansum(p ln p)", "fused entropy and output"),
    16384: ("fused entropy and output", "fused entropy, output and statistics"),
}


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
    from candidates import attention_inputs, eager_entropy
    from training import peak

    from hf_lnfree.attention import fused_attention_entropy

    def run(length: int) -> None:
        inputs = attention_inputs(length, device)
        before.append(peak(reset=device.startswith("cuda"), device=device))
        if candidate.startswith("fused"):
            fused_attention_entropy(*inputs, is_causal=True, statistics="statistics" in candidate)
        else:
            eager_entropy(*inputs)

    before: list[float] = []
    run(64)  # what the libraries take once
    run(length)
    return peak(device=device) - before[-1]


def measure_step_memory(device: str) -> tuple[str, dict[str, dict[str, float]]]:
    from training import MEMORY_STEPS, step_megabytes

    found: dict[str, dict[str, float]] = {}
    for candidate in MEMORY_STEPS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[f"{candidate}, T=128"] = {"MiB": pool.apply(step_megabytes, (candidate, 128))}
    return (
        "Peak memory of a training step, GPT-2 small, SM+R, B 32, float32, CPU, beyond weights, gradients, AdamW.",
        found,
    )


def measure_memory(device: str) -> tuple[str, dict[str, dict[str, float]]]:
    found: dict[str, dict[str, float]] = {}
    for length, candidates in MEMORY.items():
        for candidate in candidates:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found[f"{candidate}, T={length}"] = {"MiB": pool.apply(extra_megabytes, (candidate, length, device))}
    return "Peak memory of causal attention with its entropies, B 1, H 12, d 64, float32, beyond its inputs.", found


GEOMETRY_TOKENS = (16_384, 131_072, 1_048_576)


def geometry_megabytes(tokens: int, device: str) -> float:
    """Peak memory of the sums of an MLP of 3072 units and 768 inputs in two groups, in a process of its own."""
    import torch
    from training import peak

    from hf_lnfree.analysis.mlp_capture import MLPRows
    from hf_lnfree.analysis.mlp_sums import MLPSums

    def rows() -> MLPRows:
        x = torch.randn(1024, 3072, device=device)
        return MLPRows("mlp", x, x.relu(), x[:, :768], torch.arange(1024, device=device), 1024)

    rows()
    before = peak(device=device)
    sums = MLPSums.like(rows(), 2)
    for batch in range(tokens // 1024):
        labels = {"class": torch.arange(1024, device=device) % 32}
        sums.add(rows(), torch.full((1024,), batch % 2, device=device), labels)
    return peak(device=device) - before


def measure_geometry_memory(device: str) -> tuple[str, dict[str, dict[str, float]]]:
    found: dict[str, dict[str, float]] = {}
    for tokens in GEOMETRY_TOKENS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[f"{tokens} tokens"] = {"MiB": pool.apply(geometry_megabytes, (tokens, device))}
    return (
        "Peak memory of the sums of one MLP of 3072 units, 768 inputs, 32 classes, two groups, with 1024 rows.",
        found,
    )


def elsewhere(module: str, name: str) -> Callable[[str], tuple[str, dict[str, dict[str, float]]]]:
    """A measurement that a module beside this one makes, which is imported when it is asked for."""
    return lambda device: getattr(importlib.import_module(module), name)(device)


MEASURED = {
    "billion": elsewhere("billion", "measure_billion"),
    "estimates": elsewhere("estimates", "measure_estimates"),
    "folder": elsewhere("tokens", "measure_folder"),
    "memory": measure_memory,
    "step_memory": measure_step_memory,
    "geometry_memory": measure_geometry_memory,
    "study": elsewhere("studies", "measure_study"),
}
MEASURED_ON_A_GPU = {"gpu_tests": elsewhere("gpu_tests", "measure_gpu_tests")}
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 operations a second, as the maker states them


def add_rates(found: dict[str, dict[str, float]], operations: dict[str, float], device: str) -> None:
    """Operations a second, as a share of the products alone in the same run, or of a GPU's stated peak."""
    import torch

    rates = {name: count / found[name]["seconds"] for name, count in operations.items()}
    for name, rate in rates.items():
        found[name]["gflops"] = rate / 1e9
        if "matrix products" in rates:
            found[name]["share_of_matrix_products"] = rate / rates["matrix products"]
        for gpu, top in PEAKS.items():
            if device.startswith("cuda") and gpu in torch.cuda.get_device_name():
                found[name]["model_flops_utilisation"] = rate / top


def main(args: argparse.Namespace) -> None:
    import torch
    from candidates import BENCHMARKS, GPU_ONLY

    from hf_lnfree.provenance import command, environment

    synchronize = torch.cuda.synchronize if args.device.startswith("cuda") else lambda: None
    RESULTS.mkdir(exist_ok=True)
    on_a_gpu = args.device.startswith("cuda")
    benchmarks = BENCHMARKS | (GPU_ONLY if on_a_gpu else {})
    measured = MEASURED | (MEASURED_ON_A_GPU if on_a_gpu else {})
    names = [*benchmarks, *measured]
    if unknown := set(args.only) - set(names):
        raise SystemExit(f"There is no benchmark {', '.join(sorted(unknown))}. There are: {', '.join(names)}.")
    for name in args.only or names:
        torch.manual_seed(0)
        record: dict[str, Any] = {}
        if name in measured:
            what, found = measured[name](args.device)
        else:
            candidates, rounds = benchmarks[name]
            what = " ".join((candidates.__doc__ or "").split())
            made = candidates(args.device)
            timed, operations = made if isinstance(made, tuple) else (made, {})
            found = interleaved(timed, rounds, synchronize)
            add_rates(found, operations, args.device)
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
