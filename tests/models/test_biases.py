"""linear_bias="query_key": the published code's biases, and its parameter counts."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_lnfree import paper_config
from hf_lnfree.models import LNFreeGPT2ForCausalLM

ROWS_WITH_COUNTS = {"SM+LN+G": 124_242_432, "SM+LN+R": 124_242_432, "SM+G": 124_205_568, "SM+R": 124_205_568}


@pytest.mark.parametrize(("row", "total"), ROWS_WITH_COUNTS.items())
def test_paper_parameter_counts(row, total):
    """124.242M with LayerNorm, 124.206M without; 64,512 of them zero biases that are never trained."""
    with torch.device("meta"):
        model = LNFreeGPT2ForCausalLM(paper_config("gpt2", row))
    assert model.num_parameters() == total
    assert total - model.num_parameters(only_trainable=True) == 64_512


@pytest.mark.parametrize(
    ("family", "vocabulary", "total"),
    [("llama", 49_152, 134_515_008), ("opt", 50_272, 125_239_296), ("qwen3", 151_936, 596_049_920)],
)
def test_published_parameter_counts_of_other_families(family, vocabulary, total):
    """SmolLM-135M, OPT-125M and Qwen3-0.6B as their cards count them; without norms that many gains and biases less."""
    counts = {}
    for row in ("SM+LN+G", "SM+G"):
        config = paper_config(family, row, vocab_size=vocabulary)
        with torch.device("meta"):
            counts[row] = AutoModelForCausalLM.from_config(config).num_parameters()
    assert counts["SM+LN+G"] == total
    of_a_norm = config.hidden_size * (2 if family == "opt" else 1)
    assert counts["SM+G"] == total - 2 * config.num_hidden_layers * of_a_norm


def biases(model):
    parts = ("att", "mlp", "fc")
    return {
        n: p
        for n, p in model.named_parameters()
        if n.endswith("bias") and any(p in n for p in parts) and "norm" not in n
    }


def value_part(family, bias):
    """The entries that belong to value: the last third for GPT-2, a third of every head for GPT-NeoX, else none."""
    if family.name not in ("gpt2", "gpt_neox"):
        return bias[:0]
    return bias[64:] if family.name == "gpt2" else bias.view(4, 3, 8)[:, 2]


def test_only_query_and_key_biases_are_trained(family, input_ids, tmp_path):
    model = family.model(linear_bias="query_key", initializer_range=0.02)
    start = {n: p.clone() for n, p in biases(model).items()}
    assert all((p == 0).all() for p in start.values())
    # Loading replaces every parameter by a fresh one.
    model.save_pretrained(tmp_path / "saved")
    model = family.head("CausalLM").from_pretrained(tmp_path / "saved")
    examples = [{"input_ids": ids, "labels": ids} for ids in input_ids]
    args = TrainingArguments(
        tmp_path, max_steps=5, learning_rate=1e-2, weight_decay=0.1, use_cpu=True, dataloader_pin_memory=False,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, args, train_dataset=examples).train()
    moved = {n for n, p in biases(model).items() if (p != 0).any()}
    assert moved == {n for n in start if any(part in n for part in ("c_attn", "query_key_value", "q_proj", "k_proj"))}
    for name in moved:
        bias = biases(model)[name]
        assert (value_part(family, bias) == 0).all()
        assert (bias != 0).sum() > len(bias) / 3


def test_frozen_biases_still_act_when_a_checkpoint_brings_them(family, input_ids, tmp_path):
    stock = family.stock_model(**({"attention_bias": True} if family.gated else {}))
    with torch.no_grad():
        for bias in biases(stock).values():
            bias.normal_()
    stock.save_pretrained(tmp_path)
    ours = family.head("CausalLM").from_pretrained(tmp_path, norm=family.norm, linear_bias="query_key")
    torch.testing.assert_close(ours(input_ids).logits, stock(input_ids).logits, rtol=1e-5, atol=1e-5)
