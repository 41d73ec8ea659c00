"""What is timed: for each benchmark its candidates, the peer first, and how many rounds they take."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from door import door_candidates
from tokens import reading_candidates, tokenising_candidates
from training import (
    Candidates,
    body_candidates,
    compiled_candidates,
    loader_candidates,
    ours,
    recipe_candidates,
    regularized_candidates,
    step_candidates,
    whole_step,
)


def activation_candidates(device: str) -> Candidates:
    """Forward and backward of leaky ReLUs with a learnable slope on [8, 128, 3072] float32; the peer is F.relu."""
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


MIDDLE = {"n_layer": 4, "n_embd": 512, "n_head": 8, "vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 0}


def forward_backward(model: torch.nn.Module, device: str) -> Callable[[], None]:
    model = model.to(device).train()
    ids = torch.randint(0, 4096, (4, 128), device=device)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        model(ids, labels=ids, use_cache=False).loss.backward()

    return run


def middle(device: str, **fields: Any) -> Callable[[], None]:
    from hf_lnfree import LNFreeGPT2Config, LNFreeGPT2ForCausalLM

    return forward_backward(LNFreeGPT2ForCausalLM(LNFreeGPT2Config(**MIDDLE, **fields)), device)


def model_candidates(device: str) -> Candidates:
    """One training step (forward and backward) of a 4-layer GPT-2, d 512, on [4, 128] tokens; the peer is stock."""
    from transformers import GPT2Config, GPT2LMHeadModel

    fields = {
        "layernorm, gelu_new": {"norm": "layernorm", "activation_function": "gelu_new"},
        "none, gelu": {"activation_function": "gelu"},
        "none, relu": {"activation_function": "relu"},
        "none, learnable_leaky_relu": {"activation_function": "learnable_leaky_relu"},
    }
    stock = forward_backward(GPT2LMHeadModel(GPT2Config(**MIDDLE)), device)
    return {"transformers.GPT2": stock} | {name: middle(device, **chosen) for name, chosen in fields.items()}


VARIANTS: dict[str, dict[str, Any]] = {
    "none, relu": {},
    "rmsnorm": {"norm": "rmsnorm"},
    "dyt": {"norm": "dyt"},
    "derf": {"norm": "derf"},
    "scale": {"norm": "scale"},
    "affine": {"norm": "affine"},
    "weight_norm weight": {"weight_norm": "weight"},
    "weight_norm spectral": {"weight_norm": "spectral"},
    "residual_gain skipinit": {"residual_gain": "skipinit"},
    "ffn_scale": {"ffn_scale": True},
    "query_key_norm": {"query_key_norm": True},
    "attention_temperature": {"attention_temperature": True},
    "attention_softcap": {"attention_softcap": 30.0},
    "prelu": {"activation_function": "prelu"},
    "gelu_relu": {"activation_function": "gelu_relu"},
    "identity": {"activation_function": "identity"},
    "identity_fused": {"activation_function": "identity_fused"},
}


def variant_candidates(device: str) -> Candidates:
    """One training step (forward and backward) of a 4-layer GPT-2, d 512, on [4, 128] tokens, float32; the peer has
    ReLU and nothing in the place of LayerNorm."""
    return {name: middle(device, **{"activation_function": "relu", **fields}) for name, fields in VARIANTS.items()}


HEADS, WIDTH = 12, 64  # of GPT-2 small


def attention_inputs(length: int, device: str) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(1, HEADS, length, WIDTH, generator=g).to(device) for _ in range(3)]


@functools.cache
def causal_mask(length: int, device: torch.device) -> torch.Tensor:
    """The host makes it once for all layers."""
    return torch.full((length, length), torch.finfo(torch.float32).min, device=device).triu(1)


def eager_entropy(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eager attention with its map, and the study's -nansum(p ln p)."""
    logits = query @ key.mT / WIDTH**0.5
    logits = logits + causal_mask(logits.shape[-1], logits.device)
    probabilities = logits.softmax(-1)
    return probabilities @ value, -torch.nansum(probabilities * torch.log(probabilities), dim=-1)


def attention_candidates(length: int, eager: bool) -> Callable[[str], Candidates]:
    def candidates(device: str) -> Candidates:
        from hf_lnfree.attention import fused_attention_entropy

        q, k, v = attention_inputs(length, device)
        found: Candidates = {
            "sdpa, no entropy": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            "fused entropy": lambda: fused_attention_entropy(q, k, is_causal=True),
            "fused entropy and output": lambda: fused_attention_entropy(q, k, v, is_causal=True),
        }
        if eager:
            found["eager map and -nansum(p ln p)"] = lambda: eager_entropy(q, k, v)
        return found

    candidates.__doc__ = f"Causal attention forward, B 1, H {HEADS}, T {length}, d {WIDTH}, float32; the peer is sdpa."
    return candidates


def gpt2_small(device: str) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config()).to(device).eval()


def whole_model_candidates(device: str) -> Candidates:
    """Forward of GPT-2 small on [1, 1024] tokens, float32, sdpa; the peer records nothing."""
    from hf_lnfree.analysis import record_attention_entropy

    model = gpt2_small(device)
    ids = torch.randint(0, 50257, (1, 1024), device=device)

    @torch.no_grad()
    def plain() -> None:
        model(ids, use_cache=False)

    def recorded() -> None:
        with record_attention_entropy(model):
            plain()

    @torch.no_grad()
    def eager() -> None:
        model.set_attn_implementation("eager")
        attentions = model(ids, use_cache=False, output_attentions=True).attentions
        [-torch.nansum(p * torch.log(p), dim=-1) for p in attentions]
        model.set_attn_implementation("sdpa")

    return {"forward": plain, "forward with entropies": recorded, "eager maps and -nansum(p ln p)": eager}


def statistics_candidates(device: str) -> Candidates:
    """Forward of GPT-2 small, with 2048 positions, on [1, 2048] tokens, float32, sdpa, with entropies; then with the
    statistics of logits, sinks and outputs too."""
    from transformers import GPT2Config, GPT2Model

    from hf_lnfree.analysis import record_attention_entropy

    model = GPT2Model(GPT2Config(n_positions=2048)).to(device).eval()
    ids = torch.randint(0, 50257, (1, 2048), device=device)

    @torch.no_grad()
    def recorded(statistics: bool) -> None:
        with record_attention_entropy(model, statistics=statistics):
            model(ids, use_cache=False)

    return {
        "forward with entropies": lambda: recorded(False),
        "forward with entropies and statistics": lambda: recorded(True),
    }


def geometry_candidates(device: str) -> Candidates:
    """Forward of GPT-2 small on [1, 1024] tokens, float32, sdpa; then with all rows of its MLPs handed over, and with
    their sums, in one group; the peer records nothing."""
    from hf_lnfree import GeometryAnalyzer, record_mlp

    model = gpt2_small(device)
    ids = torch.randint(0, 50257, (1, 1024), device=device)
    analyzer = GeometryAnalyzer(model, groups=1, next_tokens=range(32))

    @torch.no_grad()
    def plain() -> None:
        model(ids, use_cache=False)

    def recorded() -> None:
        with record_mlp(model, lambda rows: None):
            plain()

    return {"forward": plain, "forward with rows": recorded, "forward with sums": lambda: analyzer.sums(ids) and None}


def recorder_candidates(device: str) -> Candidates:
    """A training step of GPT-2 small without LayerNorm on [16, 128] tokens, and one sample of the flight recorder on
    16 windows, then with the geometry of its MLPs: at N=100 a sample costs a hundredth of the ratio."""
    from hf_lnfree.training.recorder import FlightRecorder
    from hf_lnfree.training.steps import StepRecord

    model = ours("SM+LearnableR-layer", 128, torch.float32).to(device).train()
    ids = torch.randint(0, model.config.vocab_size, (16, 128), device=device)
    recorder, with_geometry = (
        FlightRecorder([ids], model=lambda: model, step=StepRecord(), log=print, every=100, geometry=it, kept=20)
        for it in (False, True)
    )
    step = whole_step(model, torch.float32, 128, device, batch=16, use_cache=False)
    model(ids, labels=ids).loss.backward()

    def sample(by: FlightRecorder) -> None:
        by.grad_norms(1.0, 1.0)
        by.sample([ids])

    return {
        "training step": step,
        "sample": lambda: sample(recorder),
        "sample with geometry": lambda: sample(with_geometry),
    }


def described(text: str, candidates: Callable[[str], Any]) -> Callable[[str], Any]:
    def with_text(device: str) -> Any:
        return candidates(device)

    with_text.__doc__ = text
    return with_text


FORMATS = {"bf16": torch.bfloat16, "float32": torch.float32}
SMALL = "GPT-2 small, B 8, T 128, CPU threads as they are; SM+R is ours without LayerNorm and with ReLU"

# name -> (device -> candidates, or candidates and the operations of each; rounds)
BENCHMARKS: dict[str, tuple[Callable[[str], Any], int]] = {
    "activations": (activation_candidates, 40),
    "training_step": (model_candidates, 40),
    "variants": (variant_candidates, 15),
    "attention-512": (attention_candidates(512, eager=True), 40),
    "attention-2048": (attention_candidates(2048, eager=True), 15),
    "attention-8192": (attention_candidates(8192, eager=False), 5),
    "whole_model": (whole_model_candidates, 10),
    "statistics": (statistics_candidates, 5),
    "geometry": (geometry_candidates, 3),
    "recorder": (recorder_candidates, 5),
    "loader": (loader_candidates, 5),
    "door": (door_candidates, 7),
    "tokenising": (tokenising_candidates, 5),
    "tokens": (reading_candidates, 15),
}
for _name, _dtype in FORMATS.items():
    _body = f"Transformer body forward and backward, {_name}: {SMALL}."
    BENCHMARKS[f"body-{_name}"] = (described(_body, functools.partial(body_candidates, _dtype)), 9)
    _step = f"Training step with loss, clipping and fused AdamW, {_name}: {SMALL}."
    BENCHMARKS[f"step-{_name}"] = (described(_step, functools.partial(step_candidates, _dtype)), 5)
    for _row, _length in (("SM+R", 128), ("SM+R", 256), ("SM+LearnableR-layer", 128)):
        _recipe = (
            f"Training step, {_row}, T {_length}, {_name}, B 8; the peer keeps attention maps, plain loss and AdamW."
        )
        BENCHMARKS[f"recipe-{_name}-{_row}-{_length}"] = (
            described(_recipe, functools.partial(recipe_candidates, _dtype, _row, _length)),
            5,
        )
    for _length in (128, 1024):
        _text = f"Training step of SM+R, GPT-2 small, 1024 tokens, T {_length}, {_name}; the peer has no penalty."
        BENCHMARKS[f"entropy_regularization-{_name}-{_length}"] = (
            described(_text, functools.partial(regularized_candidates, _dtype, _length)),
            7,
        )
GPU_ONLY = {
    f"compiled-{length}": (
        described(
            f"Training step of GPT-2 small, T {length}, bf16; operations count towards the GPU's bf16 peak.",
            functools.partial(compiled_candidates, length),
        ),
        20,
    )
    for length in (128, 1024)
}
