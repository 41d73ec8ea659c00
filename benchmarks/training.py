"""What is timed of training GPT-2 small: the body, whole steps, the published recipe, the loader; and memory."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from nanogpt import NanoGPT
from torch import nn

BATCH, VOCABULARY, WIDTH, LAYERS = 8, 50_000, 768, 12
Candidates = dict[str, Callable[[], object]]


def sizes(length: int) -> dict[str, Any]:
    return {"n_positions": max(1024, length), "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}


def stock(length: int) -> nn.Module:
    """GPT2LMHeadModel as it is: sdpa, gelu_new, LayerNorm; without dropout, like all others here."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(**sizes(length), attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0))


def ours(row: str, length: int, dtype: torch.dtype, attention: str = "auto", device: str = "cpu") -> nn.Module:
    from transformers import AutoModelForCausalLM

    from hf_lnfree import paper_config
    from hf_lnfree.training.efficiency import choose_attention

    if attention == "auto":
        attention = choose_attention(torch.device(device), dtype, length, 0.0)
    config = paper_config("gpt2", row, length, embd_pdrop=0.0, linear_bias="all")
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


class WhereLeakyReLU(nn.Module):
    """The learnable slope of the published code."""

    def __init__(self) -> None:
        super().__init__()
        self.negative_slope = nn.Parameter(torch.full((1,), 0.01))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, x, self.negative_slope * x)


def recipe(row: str, length: int) -> nn.Module:
    """The published training: eager attention that returns its maps in each step."""
    model = ours(row, length, torch.float32, "eager")
    if "Learnable" in row:
        for block in model.transformer.h:
            block.mlp.act = WhereLeakyReLU()
    return model


def body_step(body: nn.Module, dtype: torch.dtype, length: int, device: str) -> Callable[[], None]:
    """Forward and backward from embeddings to last hidden states."""
    body.to(device).train()
    x, grad = (torch.randn(BATCH, length, WIDTH, device=device) for _ in range(2))

    def run() -> None:
        body.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            hidden = body(inputs_embeds=x, use_cache=False)[0]
        hidden.backward(grad.to(hidden.dtype))

    return run


def whole_step(
    model: nn.Module,
    dtype: torch.dtype,
    length: int,
    device: str,
    batch: int = BATCH,
    fused: bool = True,
    vocabulary: int = VOCABULARY,
    **options: Any,
) -> Callable[[], None]:
    """Forward, loss, backward, clipping and AdamW."""
    model.to(device).train()
    ids = torch.randint(0, vocabulary, (batch, length), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=fused)

    def run() -> None:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=ids, labels=ids, **options)[0]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def with_loss(model: nn.Module, form: str) -> nn.Module:
    from hf_lnfree.training.losses import use_loss

    use_loss(model, form)  # type: ignore[arg-type]
    return model


def body_flops(length: int) -> float:
    """Of `body_step`: matrix products and attention, the backward pass twice the forward one."""
    tokens = BATCH * length
    return 3 * LAYERS * (2 * 12 * WIDTH**2 * tokens + 2 * 2 * tokens * length * WIDTH)


PRODUCTS = 20


def matrix_products(dtype: torch.dtype, length: int, device: str) -> tuple[Callable[[], None], float]:
    """The machine's ceiling: the largest product of the model alone, and how many operations that is."""
    x = torch.randn(BATCH * length, WIDTH, dtype=dtype, device=device)
    weight = torch.randn(WIDTH, 4 * WIDTH, dtype=dtype, device=device)

    def run() -> None:
        for _ in range(PRODUCTS):
            x @ weight

    return run, PRODUCTS * 2.0 * BATCH * length * WIDTH * 4 * WIDTH


def body_candidates(dtype: torch.dtype, device: str, length: int = 128) -> tuple[Candidates, dict[str, float]]:
    products, operations = matrix_products(dtype, length, device)
    found: Candidates = {
        "transformers.GPT2": body_step(stock(length).transformer, dtype, length, device),
        "SM+R": body_step(ours("SM+R", length, dtype).transformer, dtype, length, device),
        "nanoGPT, SM+R": body_step(NanoGPT(**NANO).body, dtype, length, device),
        "matrix products": products,
    }
    flops = dict.fromkeys(list(found)[:3], body_flops(length)) | {"matrix products": operations}
    return found, flops


NANO = {"vocabulary": VOCABULARY, "positions": 1024, "width": WIDTH, "heads": 12, "layers": LAYERS}


def step_candidates(dtype: torch.dtype, device: str, length: int = 128) -> Candidates:
    step = functools.partial(whole_step, dtype=dtype, length=length, device=device)
    return {
        "transformers.GPT2": step(stock(length), use_cache=False),
        "SM+R, compiled loss": step(with_loss(ours("SM+R", length, dtype), "compiled"), use_cache=False),
        "SM+R, chunked loss": step(with_loss(ours("SM+R", length, dtype), "chunked"), use_cache=False),
        "nanoGPT, SM+R": step(NanoGPT(**NANO)),
    }


def recipe_candidates(dtype: torch.dtype, row: str, length: int, device: str) -> Candidates:
    """The published code is of a time when no AdamW was fused."""
    step = functools.partial(whole_step, dtype=dtype, length=length, device=device, use_cache=False)
    return {
        "published recipe": step(recipe(row, length), output_attentions=True, fused=False),
        "hf_lnfree": step(with_loss(ours(row, length, dtype), "compiled")),
    }


class Regularized(nn.Module):
    """A model whose loss has the penalty on its head entropies added, as a run with `--entropy-weight` has it."""

    def __init__(self, model: Any):
        from hf_lnfree.training.entropy_regularization import EntropyRegularization

        super().__init__()
        self.procedure = EntropyRegularization(weight=1.0)
        self.model = self.procedure.adapt(model)

    def forward(self, **inputs: Any) -> tuple[torch.Tensor]:
        with self.procedure.while_training():
            loss = self.model(**inputs)[0]
        return (loss + self.procedure.penalty(),)


def regularized_candidates(dtype: torch.dtype, length: int, device: str) -> Candidates:
    step = functools.partial(
        whole_step, dtype=dtype, length=length, device=device, batch=max(1, BATCH * 128 // length), use_cache=False
    )

    def model() -> nn.Module:
        return with_loss(ours("SM+R", length, dtype, device=device), "chunked")

    return {"SM+R": step(model()), "with entropy regularisation": step(Regularized(model()))}


def compiled_candidates(length: int, device: str) -> tuple[Candidates, dict[str, float]]:
    """For a GPU: bf16, whole models under torch.compile, 64 windows and 32,768 tokens a step at most."""
    batch = min(64, 32_768 // length)
    step = functools.partial(whole_step, dtype=torch.bfloat16, length=length, device=device, batch=batch)

    def compiled(row: str) -> nn.Module:
        model = ours(row, length, torch.bfloat16, device=device).to(device)
        return torch.compile(model)  # type: ignore[return-value]

    found = {
        "SM+LN+G, compiled": step(compiled("SM+LN+G"), use_cache=False),
        "SM+R, compiled": step(compiled("SM+R"), use_cache=False),
        "transformers.GPT2": step(stock(length), use_cache=False),
    }
    head = 3 * 2 * batch * length * WIDTH * VOCABULARY
    return found, dict.fromkeys(found, body_flops(length) * batch / BATCH + head)


def loader_candidates(device: str) -> Candidates:
    """A training step of SM+R at batch 8 x 128, and the loader's work for it."""
    import numpy as np
    from torch.utils.data import DataLoader
    from transformers import default_data_collator

    from hf_lnfree.data.windows import TokenWindows

    windows = TokenWindows.__new__(TokenWindows)
    windows.tokens = np.random.default_rng(0).integers(0, VOCABULARY, (100_000, 128), dtype=np.uint16)
    batches = iter(DataLoader(windows, batch_size=BATCH, shuffle=True, collate_fn=default_data_collator))
    step = whole_step(with_loss(ours("SM+R", 128, torch.bfloat16), "compiled"), torch.bfloat16, 128, device)
    return {"training step": step, "batch from the loader": lambda: next(batches)}


MEMORY_STEPS: dict[str, Callable[[int], Callable[[], None]]] = {
    "published recipe": lambda length: whole_step(
        recipe("SM+R", length), torch.float32, length, "cpu", batch=32, output_attentions=True, use_cache=False
    ),
    "hf_lnfree, chunked loss": lambda length: whole_step(
        with_loss(ours("SM+R", length, torch.float32), "chunked"),
        torch.float32,
        length,
        "cpu",
        batch=32,
        use_cache=False,
    ),
}


def step_megabytes(candidate: str, length: int) -> float:
    """Peak memory of two training steps at batch 32, beyond weights, gradients and both moments."""
    before = peak()
    run = MEMORY_STEPS[candidate](length)
    run()
    run()
    parameters = LAYERS * (12 * WIDTH**2 + 9 * WIDTH) + WIDTH * (VOCABULARY + 1024 + 2)
    return peak() - before - 16 * parameters / 2**20


def peak(reset: bool = False, device: str = "cpu") -> float:
    """
    MiB this process has ever held, or holds now and counts from; of a GPU, what torch has taken for it.

    ru_maxrss of a new process is its parent's.
    """
    if device.startswith("cuda"):
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+)", status)[1]) / 2**10  # type: ignore[index]
