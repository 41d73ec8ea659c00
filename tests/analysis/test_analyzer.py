"""The analyzer against the model's own float64 attentions, with padding, batches, and models of other families."""

import json
import math

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from hf_lnfree import AttentionEntropyAnalyzer, EntropyReport
from hf_lnfree.analysis import causal_bound


def reference(model, ids):
    """Per-row entropies [L, B, H, T] in float64, by the definition."""
    model = model.double()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = torch.stack(model(ids, output_attentions=True).attentions).double()
    return -(maps * maps.clamp_min(1e-300).log()).sum(-1)


@pytest.fixture
def model(family):
    return family.model(activation="relu")


def test_mean_and_standard_error_equal_the_definition(model, family):
    ids = torch.randint(3, 99, (7, 12), generator=torch.Generator().manual_seed(1))
    report = AttentionEntropyAnalyzer(model).run([ids[:3], ids[3:5], ids[5:]])
    rows = reference(model, ids)
    per_sequence = rows.mean(-1)  # equal lengths: the ratio estimator is the mean of means
    torch.testing.assert_close(report.entropy, rows.mean((1, 3)), rtol=0, atol=1e-5)
    expected = per_sequence.std(1) / 7**0.5
    torch.testing.assert_close(report.standard_error, expected, rtol=1e-3, atol=1e-6)
    share = rows[..., 1:] / torch.arange(2, 13).double().log()
    torch.testing.assert_close(report.normalized, share.mean((1, 3)), rtol=0, atol=1e-5)
    assert (report.rows, report.sequences, report.context_length) == (84, 7, 12)
    assert report.bound == pytest.approx(causal_bound(12))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(model, side, input_ids):
    plain = AttentionEntropyAnalyzer(model).run([input_ids])
    pad = torch.full((2, 5), 2)
    parts, ones = (pad, input_ids), torch.ones_like(input_ids)
    masks = (torch.zeros_like(pad), ones)
    if side == "right":
        parts, masks = parts[::-1], masks[::-1]
    mask = torch.cat(masks, 1)
    batch = {
        "input_ids": torch.cat(parts, 1),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp_min(0),
    }
    padded = AttentionEntropyAnalyzer(model).run([batch])
    torch.testing.assert_close(padded.entropy, plain.entropy, rtol=0, atol=1e-5)
    torch.testing.assert_close(padded.normalized, plain.normalized, rtol=0, atol=1e-5)
    assert padded.rows == plain.rows
    assert padded.bound == pytest.approx(plain.bound)


def test_leaves_the_model_as_it_was_also_after_an_error(model, input_ids):
    model.train()
    model.base_model.get_submodule("drop" if hasattr(model.base_model, "drop") else "emb_dropout").eval()
    modes = [m.training for m in model.modules()]
    AttentionEntropyAnalyzer(model).run([input_ids])
    with pytest.raises(IndexError):
        AttentionEntropyAnalyzer(model).run([input_ids * 0 + 10_000])
    assert [m.training for m in model.modules()] == modes
    assert model.config._attn_implementation == "sdpa"
    assert all(p.grad is None for p in model.parameters())


def test_nan_is_reported_as_nan_and_counted(model, family, input_ids):
    with torch.no_grad():
        block = family.block_list(model)[1]
        block.get_submodule("attn.c_attn" if family.name == "gpt2" else "attention.query_key_value").weight.fill_(
            math.nan
        )
    report = AttentionEntropyAnalyzer(model).run([input_ids])
    assert report.entropy[0].isfinite().all()
    assert report.entropy[1:].isnan().all()
    assert report.nonfinite_rows.tolist() == [[0] * 4, [24] * 4, [24] * 4]
    assert "has diverged" in str(report)


def test_other_families_causal_and_bidirectional(input_ids):
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3))
    bert = BertModel(BertConfig(**sizes, num_attention_heads=4, initializer_range=0.3)).eval()
    for model, bound in ((llama, causal_bound(12)), (bert, math.log(12))):
        report = AttentionEntropyAnalyzer(model).run([input_ids])
        assert report.entropy.shape == (2, 4)
        torch.testing.assert_close(report.entropy, reference(model, input_ids).mean((1, 3)), rtol=0, atol=1e-5)
        assert report.bound == pytest.approx(bound)


def test_nothing_to_analyse_is_an_error(model):
    with pytest.raises(ValueError, match="nothing to analyse"):
        AttentionEntropyAnalyzer(model).run([])


def test_report_round_trip_table_and_picture(model, input_ids, tmp_path):
    from hf_lnfree.analysis.plots import save_heatmap

    report = AttentionEntropyAnalyzer(model).run([input_ids], name="tiny")
    report.standard_error[0, 0] = math.nan
    report.metadata["seed"] = 3
    report.save(tmp_path / "r.json")
    json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)  # strict JSON: no NaN literal
    loaded = EntropyReport.load(tmp_path / "r.json")
    for name in ("entropy", "standard_error", "normalized", "nonfinite_rows"):
        torch.testing.assert_close(
            getattr(loaded, name).double(), getattr(report, name).double(), rtol=0, atol=0, equal_nan=True
        )
    assert (loaded.name, loaded.bound, loaded.metadata) == (report.name, report.bound, {"seed": 3})
    assert "tiny: mean attention entropy in nats (measured)" in str(loaded)
    assert f"{float(report.entropy[2, 3]):.2f}" in str(loaded)
    save_heatmap(loaded, tmp_path / "r.svg")
    svg = (tmp_path / "r.svg").read_text()
    assert all(f">{value:.2f}<" in svg for value in report.entropy.flatten().tolist())
