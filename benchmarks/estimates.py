"""Estimated against measured peaks of training steps: small models of three families, each in a process of its own."""

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from itertools import product
from typing import Any

MIB = 2**20
M_MMAP_THRESHOLD = -3
SIX = {"n_layer": 6, "embd_pdrop": 0.0}
# Family, row, windows, tokens a window, configuration. The first three hold 50 to 400 MB of activations and logits.
# With a small vocabulary memory peaks in the blocks, and with few windows at the end of the backward pass.
MODELS: dict[str, tuple[str, str, int, int, dict[str, Any]]] = {
    "GPT-2": ("gpt2", "SM+R", 16, 256, {**SIX, "n_embd": 256, "n_head": 4, "vocab_size": 8192}),
    "Pythia": (
        *("gpt_neox", "SM+LN+G", 8, 256),
        {
            **{"num_hidden_layers": 4, "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
            "vocab_size": 16384,
        },
    ),
    "Llama": (
        *("llama", "SM+LN+G", 4, 512),
        {
            **{"num_hidden_layers": 4, "hidden_size": 384, "num_attention_heads": 6, "num_key_value_heads": 2},
            **{"intermediate_size": 1024, "vocab_size": 16384, "hidden_act": "silu"},
        },
    ),
    "small vocabulary": (
        "gpt2",
        "SM+G",
        16,
        256,
        {**SIX, "n_embd": 256, "n_head": 4, "vocab_size": 512},
    ),
    "few windows": (
        "gpt2",
        "SM+R",
        2,
        64,
        {**SIX, "n_embd": 768, "n_head": 12, "vocab_size": 2048},
    ),
}
LOSSES = {name: ("plain",) if name in ("small vocabulary", "few windows") else ("plain", "chunked") for name in MODELS}
CASES = [case for name in MODELS for case in product([name], LOSSES[name], (False, True), ("float32", "bf16"))]


def words(name: str, loss: str, checkpointing: bool, dtype: str) -> str:
    """A case as results name it."""
    return f"{name}, {dtype}, {loss} loss{', checkpointing' if checkpointing else ''}"


def estimated(name: str, loss: Any, checkpointing: bool, dtype: str, device: str) -> float:
    """MiB of weights and two training steps."""
    import torch
    from transformers import AutoModelForCausalLM

    from hf_lnfree import paper_config
    from hf_lnfree.training.memory import Step, is_fused, peak_bytes
    from hf_lnfree.training.shape import shape_of

    family, row, batch, length, fields = MODELS[name]
    config = paper_config(family, row, length, **fields)
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(config).num_parameters()
    shape, product, cpu = shape_of(config), 2 if dtype == "bf16" else 4, device == "cpu"
    kept = {"fused": is_fused("sdpa", shape, product, cpu), "mask": 4 if cpu else 1}
    step = Step(batch, length, product=product, checkpointing=checkpointing, loss=loss, **kept)
    return (12 * weights + peak_bytes(shape, step, 4 * weights, carried=False)) / MIB


def measured(name: str, loss: Any, checkpointing: bool, dtype: str, device: str) -> float:
    """The same, as this process grows; on a GPU, what torch takes of it."""
    import torch
    from training import peak, whole_step, with_loss
    from transformers import AutoModelForCausalLM

    from hf_lnfree import paper_config

    # Every tensor in pages of its own: what is freed is gone, and no heap lies about in between.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    family, row, batch, length, fields = MODELS[name]
    precision = torch.bfloat16 if dtype == "bf16" else torch.float32
    config = paper_config(family, row, length, **fields)

    def training(batch: int) -> Callable[[], None]:
        model: Any = with_loss(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"), loss)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        options = {"vocabulary": config.vocab_size, "use_cache": False}
        return whole_step(model, precision, length, device, batch, **options)

    torch.manual_seed(0)
    training(1)()  # what the libraries take once
    gc.collect()  # a model with another loss refers to itself
    before = peak(reset=True, device=device)
    run = training(batch)
    run()
    run()
    return peak(device=device) - before


def measure_estimates(device: str) -> tuple[str, dict[str, dict[str, float]]]:
    """On the CPU one case after the other; on a GPU, where each process counts what it takes itself, some at once."""
    at_once = 1 if device == "cpu" else 4
    with multiprocessing.get_context("spawn").Pool(at_once, maxtasksperchild=1) as pool:
        taken = pool.starmap(measured, [(*case, device) for case in CASES], chunksize=1)
    found = {}
    for case, mebibytes in zip(CASES, taken, strict=True):
        guess = estimated(*case, device)
        found[words(*case)] = {"MiB": mebibytes, "estimated": guess, "estimated_to_measured": guess / mebibytes}
    return f"Peak memory of two training steps, device {device}, weights and AdamW's moments included, in MiB.", found
