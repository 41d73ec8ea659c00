"""What is measured of GPT-2 XL without LayerNorm on one machine: it trains, is killed, goes on, is measured and saved.

Every part is a process of its own, as a user starts it; what the machine holds at most is read while it runs.
"""

import hashlib
import json
import math
import re
import shutil
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
    "max_validation_windows": 8,
    "eval_strategy": "no",
    "save_steps": SAVED,
    "save_total_limit": 1,
    "attention_report_windows": 0,
}


# A command of the package, which says at its end what torch has taken of a GPU.
WITH_PEAK = """
import sys, torch
from hf_lnfree.cli.main import main
code = main(sys.argv[1:])
if torch.cuda.is_initialized():
    print("\\nGPU MiB:", torch.cuda.max_memory_allocated() / 2**20)
sys.exit(code)
"""


def watched(arguments: list[str], stop: Callable[[], bool] = lambda: False) -> dict[str, float]:
    """Seconds and peak MiB of a command of the package; killed with SIGKILL as soon as `stop` says so."""
    command = [sys.executable, "-c", WITH_PEAK, *arguments]
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
        said.seek(0)
        words = said.read()
        if process.returncode not in (0, -signal.SIGKILL):
            raise RuntimeError(f"{' '.join(arguments)} ended with {process.returncode}:\n{words}")
    taken = re.search(r"^GPU MiB: (.*)$", words, re.MULTILINE)
    on_gpu = {"gpu_peak_MiB": float(taken[1])} if taken else {}
    return {"seconds": time.perf_counter() - start, "peak_MiB": most / 2**10, **on_gpu}


def losses_of(run: Path) -> dict[float, float]:
    """By step; none where there is no log yet, or half a line of it."""
    from hf_lnfree.errors import RunError
    from hf_lnfree.training.log import curve, read_log

    try:
        return dict(curve(read_log(run), "loss"))
    except RunError:
        return {}


def weights_of(run: Path) -> str:
    """Hash of the file that holds them."""
    from hf_lnfree.files import file_hash

    return file_hash(run / "model.safetensors")


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


def prove(fields: dict[str, Any], place: Path, shard: str = "500MB") -> dict[str, dict[str, float]]:
    """
    Train to the end; train again, kill, resume and compare to the bit; entropies; evaluation; shards.

    Each part is noted in `place`, and not done again by a benchmark that is begun again there.

    Raises:
        RuntimeError: a command failed, or the weights in shards are not those of the one file.
    """
    settings, straight, killed, shards = (place / name for name in ("settings.yaml", "straight", "killed", "shards"))
    chosen = {**SETTING, **fields}
    settings.write_text(json.dumps(chosen, indent=1))
    text = ["--data", chosen["data"], "--context-length", str(chosen["context_length"])]
    train = ["train", str(settings), "--out"]

    def trained() -> dict[str, float]:
        shutil.rmtree(straight, ignore_errors=True)
        found, losses = watched([*train, str(straight)]), losses_of(straight)
        samples = (straight / "log.jsonl").read_text().count('"entropy/layer_00"')
        return found | {"first_loss": losses[1], "last_loss": losses[STEPS], "samples": samples}

    def interrupted() -> dict[str, float]:
        shutil.rmtree(killed, ignore_errors=True)
        found = watched([*train, str(killed)], lambda: max(losses_of(killed), default=0) >= KILLED)
        return found | {"steps": max(losses_of(killed))}

    def resumed() -> dict[str, float]:
        found = watched([*train, str(killed), "--resume-from-checkpoint", "last"])
        equal = weights_of(killed) == weights_of(straight) and losses_of(killed) == losses_of(straight)
        apart = max(abs(loss - losses_of(killed)[step]) for step, loss in losses_of(straight).items())
        return found | {"equal_to_the_bit": float(equal), "losses_apart_by": apart}

    def entropy() -> dict[str, float]:
        out = place / "entropy"
        few = ["--max-windows", "8", "--batch-size", "4", "--out", str(out)]
        found = watched(["entropy", str(straight), *text, *few])
        (report,) = out.glob("entropy-*.json")
        heads = [value for layer in json.loads(report.read_text())["entropy"] for value in layer]
        finite = sum(map(math.isfinite, heads))
        return found | {"heads": len(heads), "finite": finite, "mean": sum(heads) / len(heads)}

    def evaluation() -> dict[str, float]:
        out = place / "evaluation.json"
        found = watched(["evaluate", str(straight), *text, "--max-documents", "1", "--out", str(out)])
        return found | {"perplexity": json.loads(out.read_text())["perplexity"]["perplexity"]}

    def sharded() -> dict[str, float]:
        found, whole = alone(str(straight), str(shards), shard)
        again, contents = alone(str(shards), str(place / "again"), shard)
        if whole != contents:
            raise RuntimeError("The weights in shards are not those of the one file.")
        return {**found, **{f"shards_{name}": value for name, value in again.items() if "over" in name}}

    kept = place / "found.json"
    found = json.loads(kept.read_text()) if kept.exists() else {}
    for part in (trained, interrupted, resumed, entropy, evaluation, sharded):
        if part.__name__ not in found:
            found[part.__name__] = part()
            kept.write_text(json.dumps(found, indent=1))
    return found


def measure_billion(device: str) -> tuple[str, dict[str, dict[str, float]]]:
    """In runs/billion, which is left there, 16 GB, if it fails."""
    place = Path("runs/billion")
    place.mkdir(parents=True, exist_ok=True)
    found = prove({**XL, "device": device}, place)
    shutil.rmtree(place)
    return (
        "GPT-2 XL without LayerNorm (ReLU, bfloat16, gradient checkpointing, chunked loss, Adafactor) on steps of "
        "2 x 128 tokens: 20 steps, killed after 12 and resumed, entropies of all heads, evaluated, saved in shards.",
        found,
    )


if __name__ == "__main__":
    print(json.dumps(loaded_and_saved(*sys.argv[1:])))
