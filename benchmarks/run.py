"""What the speed claims rest on: each of ours against a named peer in the same run.

The candidates take turns, so that a slow moment of the machine meets all of them; reported are medians and their ratio
to the peer. Results go to benchmarks/results/, with the command and the versions.

Usage: python benchmarks/run.py [--rounds 40] [--device cuda]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def interleaved(candidates: dict[str, Callable[[], None]], rounds: int, synchronize: Callable[[], None]) -> dict:
    """Median seconds of each candidate and the ratio to the first, the peer."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(rounds + 3):
        for name, run in candidates.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            if round_ >= 3:  # warm-up
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    peer = next(iter(medians))
    return {name: {"seconds": m, "ratio_to_" + peer: m / medians[peer]} for name, m in medians.items()}


def activation_candidates(device: str) -> dict[str, Callable[[], None]]:
    """Forward and backward of leaky ReLUs with a learnable slope on [8, 128, 3072] float32; the peer is F.relu."""
    import torch
    import torch.nn.functional as F

    from hf_lnfree.models import leaky_relu

    x = torch.randn(8, 128, 3072, device=device, requires_grad=True)
    slope = torch.full((1,), 0.01, device=device, requires_grad=True)
    grad = torch.randn(8, 128, 3072, device=device)

    def step(function: Callable) -> Callable[[], None]:
        def run() -> None:
            x.grad = slope.grad = None
            function(x).backward(grad)

        return run

    return {
        "F.relu": step(F.relu),
        "hf_lnfree.leaky_relu": step(lambda x: leaky_relu(x, slope)),
        "F.prelu": step(lambda x: F.prelu(x, slope)),
        "torch.where": step(lambda x: torch.where(x > 0, x, slope * x)),
    }


def model_candidates(device: str) -> dict[str, Callable[[], None]]:
    """One training step (forward and backward) of a 4-layer GPT-2, d 512, on [4, 128] tokens; the peer is stock."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from hf_lnfree import LNFreeGPT2Config, LNFreeGPT2ForCausalLM

    sizes = {"n_layer": 4, "n_embd": 512, "n_head": 8, "vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 0}
    ids = torch.randint(0, 4096, (4, 128), device=device)

    def step(model: torch.nn.Module) -> Callable[[], None]:
        model = model.to(device).train()

        def run() -> None:
            model.zero_grad(set_to_none=True)
            model(ids, labels=ids, use_cache=False).loss.backward()

        return run

    def ours(**fields) -> Callable[[], None]:
        return step(LNFreeGPT2ForCausalLM(LNFreeGPT2Config(**sizes, **fields)))

    return {
        "transformers.GPT2": step(GPT2LMHeadModel(GPT2Config(**sizes))),
        "layernorm, gelu_new": ours(norm="layernorm"),
        "none, gelu": ours(activation_function="gelu"),
        "none, relu": ours(activation_function="relu"),
        "none, learnable_leaky_relu": ours(activation_function="learnable_leaky_relu"),
    }


BENCHMARKS = {"activations": activation_candidates, "training_step": model_candidates}


def main(args: argparse.Namespace) -> None:
    import torch

    from hf_lnfree.training.provenance import command, environment

    synchronize = torch.cuda.synchronize if args.device.startswith("cuda") else lambda: None
    RESULTS.mkdir(exist_ok=True)
    for name, candidates in BENCHMARKS.items():
        torch.manual_seed(0)
        found = interleaved(candidates(args.device), args.rounds, synchronize)
        print(f"\n{(candidates.__doc__ or '').strip()}")
        for candidate, values in found.items():
            seconds, ratio = values.values()
            print(f"  {candidate:28} {1e3 * seconds:8.2f} ms  {ratio:5.2f} x")
        record = {
            "what": (candidates.__doc__ or "").strip(),
            "results": found,
            "rounds": args.rounds,
            "environment": environment(),
            "command": command(),
        }
        path = RESULTS / f"{name}-{args.device.split(':')[0]}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40, help="timed rounds of every candidate")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    main(parser.parse_args())
