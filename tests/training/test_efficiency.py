"""What a run chooses: attention by device, dtype and length; loss by memory and work; written down and kept."""

import json

import pytest
import torch

from hf_lnfree import LNFreeTrainingArguments, paper_config
from hf_lnfree.data.objectives import CAUSAL
from hf_lnfree.training import ModelArguments, efficiency
from hf_lnfree.training.efficiency import Choices, choose, choose_attention, choose_loss

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GIB = 2**30


@pytest.mark.parametrize(
    ("device", "dtype", "length", "dropout", "expected"),
    [
        (CPU, torch.bfloat16, 128, 0.0, "eager"),
        (CPU, torch.bfloat16, 1024, 0.0, "sdpa"),
        (CPU, torch.bfloat16, 1024, 0.1, "eager"),
        (CPU, torch.float32, 128, 0.0, "sdpa"),
        (CUDA, torch.bfloat16, 128, 0.0, "sdpa"),
    ],
)
def test_attention(device, dtype, length, dropout, expected):
    assert choose_attention(device, dtype, length, dropout) == expected


@pytest.mark.parametrize(
    ("logits", "steps", "free", "compiler", "expected"),
    [
        (8 * 128 * 50_000, 30_000, 20 * GIB, True, "compiled"),
        (8 * 128 * 50_000, 30_000, 20 * GIB, False, "plain"),
        (8 * 128 * 50_000, 10, 20 * GIB, True, "plain"),
        (128 * 128 * 50_000, 30_000, 20 * GIB, True, "chunked"),
    ],
)
def test_loss(monkeypatch, logits, steps, free, compiler, expected):
    monkeypatch.setattr(efficiency, "free_memory", lambda device: free)
    monkeypatch.setattr(efficiency, "can_compile", lambda device: compiler)
    assert choose_loss(CPU, logits, steps) == expected


def test_free_memory_and_compiler_are_read_from_the_machine(monkeypatch):
    assert GIB / 10 < efficiency.free_memory(CPU) < 2**50
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert efficiency.can_compile(CPU) is False


def test_choices_are_kept(tmp_path):
    path = tmp_path / "run" / "choices.json"
    Choices("eager", "chunked").save(path)
    assert Choices.load(path) == Choices("eager", "chunked")
    assert json.loads(path.read_text()) == {"attn_implementation": "eager", "loss": "chunked"}


def test_flags_win_over_what_was_recorded_and_that_over_what_suits_now(tmp_path):
    args = LNFreeTrainingArguments(str(tmp_path), use_cpu=True, bf16=True)
    config = paper_config("gpt2", "SM+R")
    recorded = Choices("sdpa", "compiled")

    def chosen(model_args, recorded):
        return choose(model_args, args, config, CAUSAL, 128, 10, recorded)

    assert chosen(ModelArguments(), None) == Choices("eager", "plain")
    assert chosen(ModelArguments(), recorded) == recorded
    assert chosen(ModelArguments(attn_implementation="eager"), recorded) == Choices("eager", "compiled")
