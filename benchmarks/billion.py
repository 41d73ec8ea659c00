"""What is measured of GPT-2 XL without LayerNorm on one machine: it trains, is killed, goes on, is measured and saved.

Every part is a process of its own, as a user starts it; what the machine holds at most is read while it runs.
"""

import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training import peak

STEPS, SAVED, KILLED = 20, 10, 12  # killed at the first line of the log from this step on
ROOT = Path(__file__).parents[1]
XL = {
    "base": str(ROOT / "examples" / "models" / "gpt2-xl.yaml"),
    "tokenizer": None,
    "vocab_size": 50257,
    "config_overrides": {
        **{"vocab_size": 50257, "n_layer": 48, "n_embd": 1600, "n_head": 25},
        **{"residual_init": "scaled", "dtype": "bfloat16"},
    },
}
SETTING = {
    "data": "stdlib",
    "validation_data": None,
    "max_documents": None,
    "max_validation_documents": None,
    "context_length": 128,
    "bf16": False,  # no autocast: the weights are bfloat16
    "optim": "adafactor",
    "loss": "chunked",
    "activation_checkpointing": True,
    "device": "cpu",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_steps": STEPS,
    "learning_rate": 1.0e-5,  # Adafactor changes every weight by as much; 5e-4 makes 48 blocks without norms overflow
    "warmup_steps": 2,
    "logging_steps": 1,
    "probe_steps": SAVED,
    "probe_sequences": 2,
    "eval_strategy": "no",
    "save_steps": SAVED,
    "save_total_limit": 1,
    "attention_report_windows": 0,
}


def watched(arguments: list[str], stop: Callable[[], bool] = lambda: False) -> dict[str, float]:
    """Seconds and peak MiB of a command of the package; killed with SIGKILL as soon as `stop` says so."""
    command = [sys.executable, "-m", "hf_lnfree.cli.main", *arguments]
    start, most = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            most = max(most, *map(int, re.findall(r"VmHWM:\s*(\d+)", status.read_text())), 0)
            if stop():
                process.kill()
                process.wait()
                break
            time.sleep(0.05)
        if process.returncode not in (0, -signal.SIGKILL):
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{said.read()}")
    return {"seconds": time.perf_counter() - start, "peak_MiB": most / 2**10}


def log_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a log that are whole."""
    path = run / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses_of(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in log_of(run) if "loss" in line}


def digest(folder: Path) -> str:
    """Of the weights, over all files that hold them."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("model*.safetensors")):
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def loaded_and_saved(folder: str, to: str, shard: str) -> tuple[dict[str, float], str]:
    """Peaks of loading a model and of saving it in shards, beyond what was held before, as multiples of its weights;
    and a digest of these."""
    import torch
    from transformers import AutoModelForCausalLM

    from hf_lnfree import LNFreeGPT2ForCausalLM  # noqa: F401  so that it counts for what is held before

    before = peak()
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder)
    seconds = time.perf_counter() - start
    contents = hashlib.sha256()
    for _, tensor in sorted(model.state_dict().items()):
        contents.update(tensor.flatten().view(torch.uint8).numpy())
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    loading = peak() - before
    peak(reset=True)
    model.save_pretrained(to, max_shard_size=shard)
    measured = {
        "weights_MiB": weights,
        "load_over_weights": loading / weights,
        "save_over_weights": (peak() - before) / weights,
        "load_seconds": seconds,
    }
    return measured, contents.hexdigest()


def alone(*arguments: str) -> tuple[dict[str, float], str]:
    """`loaded_and_saved` in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def prove(fields: dict[str, Any], place: Path, shard: str = "1GB") -> dict[str, dict[str, float]]:
    """
    Train to the end; train again, kill, resume and compare to the bit; entropies; evaluation; shards.

    Raises:
        RuntimeError: a command failed, or what must be equal is not.
    """
    settings, straight, killed = place / "settings.yaml", place / "straight", place / "killed"
    chosen = {**SETTING, **fields}
    settings.write_text(json.dumps(chosen, indent=1))
    text = ["--data", chosen["data"], "--context-length", str(chosen["context_length"])]
    train = ["train", str(settings)]

    found: dict[str, dict[str, float]] = {}
    found["20 steps"] = watched([*train, "--out", str(straight)])
    losses = losses_of(straight)
    found["20 steps"] |= {"first_loss": losses[1], "last_loss": losses[STEPS]}
    found["20 steps"] |= {"samples": sum("entropy/layer_00" in line for line in log_of(straight))}

    found["killed"] = watched([*train, "--out", str(killed)], lambda: max(losses_of(killed), default=0) >= KILLED)
    found["killed"] |= {"steps": max(losses_of(killed))}
    found["resumed"] = watched([*train, "--out", str(killed), "--resume-from-checkpoint", "last"])
    if digest(killed) != digest(straight) or losses_of(killed) != losses:
        raise RuntimeError("The run that was killed and went on is not the run that was not.")
    found["resumed"] |= {"equal_to_the_bit": 1}

    found["entropy"] = watched(
        ["entropy", str(straight), *text, "--max-windows", "8", "--batch-size", "4", "--out", str(place / "entropy")]
    )
    (report,) = (place / "entropy").glob("entropy-*.json")
    heads = [value for layer in json.loads(report.read_text())["entropy"] for value in layer]
    found["entropy"] |= {"heads": len(heads), "finite": sum(map(math.isfinite, heads)), "mean": sum(heads) / len(heads)}

    results = place / "evaluation.json"
    found["evaluation"] = watched(["evaluate", str(straight), *text, "--max-documents", "2", "--out", str(results)])
    found["evaluation"] |= {"perplexity": json.loads(results.read_text())["perplexity"]["perplexity"]}

    found["one file to shards"], whole = alone(str(straight), str(place / "shards"), shard)
    found["shards to shards"], again = alone(str(place / "shards"), str(place / "again"), shard)
    if whole != again:
        raise RuntimeError("The weights in shards are not those of the one file.")
    return found


def measure_billion() -> tuple[str, dict[str, dict[str, float]]]:
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as place:
        found = prove(XL, Path(place))
    return (
        "GPT-2 XL without LayerNorm (ReLU, bfloat16, gradient checkpointing, chunked loss, Adafactor) on steps of "
        "2 x 128 tokens: trained, killed and resumed, entropies of all heads, evaluated, saved and loaded in shards.",
        found,
    )


if __name__ == "__main__":
    print(json.dumps(loaded_and_saved(*sys.argv[1:])))
