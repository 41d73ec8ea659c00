"""The analyzer against the model's own float64 attentions, with padding, batches, and models of other families."""

import json
import math
import shutil
from dataclasses import fields

import datasets
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import (
    AlbertConfig,
    AlbertModel,
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from hf_lnfree import AttentionEntropyAnalyzer, EntropyReport
from hf_lnfree.analysis import causal_bound, compare_reports
from hf_lnfree.analysis.comparison import inside, simultaneous
from hf_lnfree.analysis.parts import kind_of
from hf_lnfree.analysis.totals import EntropyTotals
from hf_lnfree.attention import RowEntropies
from hf_lnfree.errors import DataError
from tests.attention import models
from tests.attention.softmaxes import Softmaxes


def reference(model, ids, **inputs):
    """Per-row entropies [L, B, H, T] in float64, by the definition."""
    model = model.double()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = torch.stack(model(ids, output_attentions=True, **inputs).attentions).double()
    return -(maps * maps.clamp_min(1e-300).log()).sum(-1)


def close(found, expected, atol=1e-5):
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=atol)


@pytest.fixture
def model(family):
    return family.model(activation="relu")


@pytest.mark.parametrize("method", ["auto", "fused", "attentions"])
def test_statistics_equal_the_definition(model, method):
    ids = torch.randint(3, 99, (7, 12), generator=torch.Generator().manual_seed(1))
    report = AttentionEntropyAnalyzer(model, method).run([ids[:3], ids[3:5], ids[5:]])
    rows = reference(model, ids)
    per_sequence = rows.mean(-1)  # equal lengths: the ratio estimator is the mean of means
    close(report.entropy, rows.mean((1, 3)))
    torch.testing.assert_close(report.standard_error, per_sequence.std(1) / 7**0.5, rtol=1e-3, atol=1e-6)
    share = rows[..., 1:] / torch.arange(2, 13).double().log()
    close(report.normalized, share.mean((1, 3)))
    close(report.row_variance, rows.var((1, 3), correction=0))
    close(report.row_minimum, rows.amin((1, 3)))
    close(report.row_maximum, rows.amax((1, 3)))
    assert (report.rows == 84).all()
    assert (report.sequences, report.context_length) == (7, 12)
    close(report.bound, torch.full((3, 4), causal_bound(12)))
    assert len(report.modules) == 3
    assert report.heads.all()


def test_quantiles_strata_and_histogram(model):
    ids = torch.randint(3, 99, (5, 12), generator=torch.Generator().manual_seed(1))
    report = AttentionEntropyAnalyzer(model).run([ids[:3], ids[3:]])
    rows = reference(model, ids).permute(0, 2, 1, 3)  # L H B T
    assert (report.histogram.sum(-1) == 60).all()
    levels = [0.05, 0.5, 0.9]
    for by_layer, values in ((False, rows.flatten(2)), (True, rows.flatten(1))):
        for level, quantile in zip(levels, report.quantiles(levels, by_layer), strict=True):
            below, above = ((values <= quantile[..., None] + bin_).double().mean(-1) for bin_ in (-1 / 64, 1 / 64))
            assert (below <= level).all()
            assert (above >= level).all()
    strata = [(0, 1), (1, 2), (2, 4), (4, 8), (8, 12)]  # positions 1, 2, 3-4, 5-8, 9-12
    close(report.strata_entropy, torch.stack([rows[..., a:b].mean((2, 3)) for a, b in strata], -1))
    logs = torch.arange(1, 13).double().log()
    close(report.strata_bound[0, 0], torch.stack([logs[a:b].mean() for a, b in strata]))
    assert report.strata_rows[0, 0].tolist() == [5, 5, 10, 20, 20]


def test_bootstrap_replicates_are_as_spread_as_the_standard_error(model):
    ids = torch.randint(3, 99, (64, 12), generator=torch.Generator().manual_seed(1))
    report = AttentionEntropyAnalyzer(model, replicates=2000).run(ids.split(16))
    close(report.replicates.mean(0), report.entropy, atol=5e-3)
    torch.testing.assert_close(report.replicates.std(0), report.standard_error, rtol=0.15, atol=0)
    for maximum in ("observed", "causal", "log_length", 2.0):
        shares, intervals = report.buckets(maximum), report.bucket_intervals(maximum)
        assert (intervals[:, 0] <= shares).all()
        assert (shares <= intervals[:, 1]).all()
    again = AttentionEntropyAnalyzer(model, replicates=2000).run(ids.split(16))
    assert torch.equal(again.replicates, report.replicates)
    alone = AttentionEntropyAnalyzer(model).run([ids[:1]])
    assert alone.bucket_intervals().isnan().all()


def test_few_sequences_have_no_intervals_and_say_so(model):
    ids = torch.randint(3, 99, (10, 12), generator=torch.Generator().manual_seed(1))
    for count in (2, 3, 9, 10):
        report = AttentionEntropyAnalyzer(model).run([ids[:count]])
        assert report.replicates.isfinite().all()
        assert report.bucket_intervals().isfinite().all() == (count == 10)
        assert (f"no intervals: {count} sequences, 10 are needed" in str(report)) == (count < 10)


def normal_report(entropy, seed):
    """Of sequences [N, H] of one row each."""
    totals = EntropyTotals(seed=seed)
    rows = {"a": RowEntropies(entropy[..., None], torch.full((1, 1, 1), 1000), None)}
    totals.add(rows, [torch.ones(len(entropy), 1, dtype=torch.bool)])
    return EntropyReport(
        "", **totals.fields(), kinds=["causal"] * len(totals.modules), metadata={"data_sha256": "", "bootstrap": seed}
    )


@pytest.mark.parametrize("count", [2, 4, 6, 30])
def test_comparisons_of_few_sequences_are_no_bolder_than_they_say(count):
    """Of 400 pairs that differ by chance, the simultaneous interval of 8 heads is left by one in twenty or fewer."""
    noise = torch.randn(400, 2, count, 8, generator=torch.Generator().manual_seed(0)).double()
    reports = [[normal_report(3 + entropy / 10, seed) for entropy in pair] for seed, pair in enumerate(noise)]
    assert 4 <= sum(bool(compare_reports(*pair).moved.any()) for pair in reports) <= 34
    if count > 2:
        apart = [compare_reports(first, normal_report(6.7 + noise[0, 0] / 10, 0)) for first in reports[0][1:]]
        assert apart[0].moved.all()


# From printed tables of Student's distribution: 97.5 %.
@pytest.mark.parametrize(("freedom", "t"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (10, 2.228),
                                            (100, 1.984), (1000, 1.962)])  # fmt: skip
def test_quantiles_of_student(freedom, t):
    assert inside(t, freedom) == pytest.approx(0.95, abs=3e-4)
    assert simultaneous(1, freedom + 1) == pytest.approx(t, rel=3e-3)


def test_comparison_pairs_what_saw_the_same_batches(model, family):
    ids = torch.randint(3, 99, (48, 12), generator=torch.Generator().manual_seed(1)).split(16)
    before = AttentionEntropyAnalyzer(model).run(ids, name="before")
    rows = reference(model, torch.cat(ids))
    model.float().set_attn_implementation("sdpa")
    same = compare_reports(before, AttentionEntropyAnalyzer(model).run(ids, name="same"))
    assert same.paired
    assert not same.moved.any()
    with torch.no_grad():  # queries of one layer, a little longer: its entropies fall
        name = "attn.c_attn" if family.name == "gpt2" else "attention.query_key_value"
        family.block_list(model)[1].get_submodule(name).weight.mul_(1.05)
    after = AttentionEntropyAnalyzer(model).run(ids, name="after")
    comparison = compare_reports(before, after)
    change = reference(model, torch.cat(ids)) - rows
    close(comparison.difference, change.mean((1, 3)))
    torch.testing.assert_close(comparison.standard_error[1:], (change.mean(-1).std(1) / 48**0.5)[1:], rtol=0.25, atol=0)
    assert not comparison.moved[0].any()
    assert comparison.moved[1].any()
    assert "after against before" in str(comparison)
    assert "layer 1 head" in str(comparison)
    model.float().set_attn_implementation("sdpa")
    unpaired = compare_reports(before, AttentionEntropyAnalyzer(model).run([i + 0 for i in reversed(ids)]))
    assert not unpaired.paired
    assert (unpaired.standard_error[1] > comparison.standard_error[1]).all()
    with pytest.raises(ValueError, match="3 x 4 and 2 x 4"):
        compare_reports(before, AttentionEntropyAnalyzer(family.model(num_hidden_layers=2)).run(ids))


def test_rows_without_a_key_are_left_out_and_counted():
    entropy = torch.tensor([[[0.0, 0.5, 1.0]]])  # B H Q
    totals = EntropyTotals(replicates=0)
    totals.add({"a": RowEntropies(entropy, torch.tensor([[[0, 2, 3]]]), None)}, [torch.ones(1, 3, dtype=torch.bool)])
    fields = totals.fields()
    assert (fields["rows"].item(), fields["masked_rows"].item(), fields["entropy"].item()) == (2, 1, 0.75)
    with pytest.raises(ValueError, match="differ in the attention modules"):
        totals.add({"b": RowEntropies(entropy, torch.ones(1, 1, 3), None)}, [torch.ones(1, 3, dtype=torch.bool)])


def test_modules_of_another_batch_size_count_their_own_sequences():
    totals = EntropyTotals(replicates=4000)
    sizes, values = {"pictures": 1, "texts": 3}, {"pictures": [], "texts": []}
    for seed in range(10):
        rows = {}
        for name, size in sizes.items():
            # Texts of one batch are alike: were they drawn together, replicates would be further apart.
            entropy = torch.rand(1, 1, 4, generator=torch.Generator().manual_seed(seed)).double().expand(size, -1, -1)
            values[name].append(entropy.mean(-1))
            rows[name] = RowEntropies(entropy, torch.full((1, 1, 4), 5), None)
        totals.add(rows, [torch.ones(size, 4, dtype=torch.bool) for size in sizes.values()])
    fields = totals.fields()
    for layer, name in enumerate(sizes):
        means = torch.cat(values[name])  # one a sequence
        close(fields["entropy"][layer], means.mean(0))
        close(fields["standard_error"][layer], means.std(0) / len(means) ** 0.5)
        torch.testing.assert_close(
            fields["replicates"][:, layer].std(0), fields["standard_error"][layer], rtol=0.15, atol=0
        )
    assert fields["sequences"] == 30


def test_texts_and_datasets(model, cache_dir, corpus):
    from hf_lnfree.data import DataArguments, load_data

    tokenizer = load_data(DataArguments(str(corpus), cache_dir=cache_dir, vocab_size=300, context_length=8)).tokenizer
    texts = ["def f(x):\n    return x", "", "import os"] * 5
    model.resize_token_embeddings(len(tokenizer))
    options = {"tokenizer": tokenizer, "context_length": 10, "batch_size": 4}
    report = AttentionEntropyAnalyzer(model).run(texts, **options)
    singles = [torch.tensor([tokenizer(text)["input_ids"][:10]]) for text in texts if text]
    expected = AttentionEntropyAnalyzer(model).run(singles)
    close(report.entropy, expected.entropy)
    assert report.sequences == 10
    with pytest.raises(ValueError, match="exceeds the 64 positions"):
        AttentionEntropyAnalyzer(model).run(texts, tokenizer=tokenizer, context_length=65)
    dataset = datasets.Dataset.from_dict({"code": texts})
    close(AttentionEntropyAnalyzer(model).run(dataset, text_column="code", **options).entropy, report.entropy)


def test_long_texts_are_cut_into_windows_as_the_command_cuts_them(model, cache_dir, corpus):
    from hf_lnfree.data import DataArguments, load_data
    from hf_lnfree.data.building import Cutter

    tokenizer = load_data(DataArguments(str(corpus), cache_dir=cache_dir, vocab_size=300, context_length=8)).tokenizer
    model.resize_token_embeddings(len(tokenizer))
    texts = ["import os\n" * 41, "def f(x):\n    return x\n" * 20]
    ids = [np.array(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    windows, lost = [Cutter(16, "exact", None)(row) for row in ids], [len(row) % 16 for row in ids]
    expected = torch.from_numpy(np.concatenate(windows)).long()
    assert len(expected) > 20
    assert all(lost)
    report = AttentionEntropyAnalyzer(model).run(texts, tokenizer=tokenizer, context_length=16, batch_size=7)
    close(report.entropy, AttentionEntropyAnalyzer(model).run(expected.split(7)).entropy)
    assert report.sequences == len(expected)
    assert report.metadata["texts"] == {"texts": 2, "windows": len(expected), "tokens_left_out": sum(lost)}
    assert f"{sum(lost)} tokens after the last whole windows of 2 texts were left out" in str(report)
    few = AttentionEntropyAnalyzer(model).run(
        texts, tokenizer=tokenizer, context_length=16, max_batches=2, batch_size=3
    )
    assert few.sequences == 6


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
    close(padded.strata_entropy, plain.strata_entropy)
    assert torch.equal(padded.rows, plain.rows)
    close(padded.bound, plain.bound)


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
        close(report.bound, torch.full((2, 4), bound))


def test_layers_that_share_a_module_are_told_apart(input_ids):
    sizes = {"vocab_size": 99, "hidden_size": 32, "embedding_size": 8, "intermediate_size": 64, "num_hidden_layers": 3}
    torch.manual_seed(0)
    albert = AlbertModel(AlbertConfig(**sizes, num_attention_heads=4, initializer_range=0.3)).eval()
    report = AttentionEntropyAnalyzer(albert).run([input_ids])
    assert [name.split("#")[1] for name in report.modules] == ["0", "1", "2"]
    close(report.entropy, reference(albert, input_ids).mean((1, 3)))
    assert not torch.equal(report.entropy[0], report.entropy[1])


def test_pictures_of_a_module_are_told_apart_and_beside_texts():
    model, inputs = models.build(models.qwen2_vl, "sdpa")
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(0), "input_ids": inputs["input_ids"].flip(1)}
    other["input_ids"] = torch.where(inputs["input_ids"] == 90, 90, other["input_ids"].clamp_max(89))
    report = AttentionEntropyAnalyzer(model).run([inputs, other])
    assert report.modules == [
        *(f"visual.blocks.{layer}.attn#{picture}" for layer in range(2) for picture in range(2)),
        *(f"language_model.layers.{layer}.self_attn" for layer in range(2)),
    ]
    rows = []
    model, _ = models.doubled(*models.build(models.qwen2_vl, "eager"))
    for batch in (inputs, other):
        with Softmaxes() as eager, torch.no_grad():
            model(**models.doubled(model, batch)[1])
        rows.append(eager.entropies())
    tokens = torch.cat([inputs["attention_mask"]] * 2).bool()
    for layer, parts in enumerate(zip(*rows, strict=True)):
        found, error = report.entropy[layer], report.standard_error[layer]
        if layer < 4:  # of each batch a picture, all of which counts
            close(found, (parts[0] + parts[1])[0].mean(-1) / 2)
            close(error, (parts[0] - parts[1])[0].mean(-1).abs() / 2)
        else:
            close(found, torch.cat(parts).transpose(0, 1)[:, tokens].mean(-1))
            sequences = zip(torch.cat(parts), tokens, strict=True)
            sums = torch.stack([entropy[:, mask].sum(-1) - found * mask.sum() for entropy, mask in sequences])
            close(error, sums.square().sum(0).mul(4 / 3).sqrt() / tokens.sum())
    assert report.rows[:, 0].tolist() == [32, 24, 32, 24, 40, 40]
    assert report.sequences == 4
    alone = models.build(models.qwen2_vl, "sdpa", [(4, 4)])[1]
    with pytest.raises(DataError, match=r"visual\.blocks\.0\.attn \(2 times, then 1\), 1 more\. Batches must be alike"):
        AttentionEntropyAnalyzer(models.build(models.qwen2_vl, "sdpa")[0]).run([inputs, alone])


def test_windows_bound_their_layers(input_ids):
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, sliding_window=4)
    report = AttentionEntropyAnalyzer(MistralForCausalLM(config)).run([input_ids])
    expected = torch.arange(1, 13).clamp_max(4).double().log().mean()
    close(report.bound, torch.full((2, 4), float(expected)))
    assert report.context_length == 4


def test_encoder_decoders_have_three_kinds_of_attention():
    torch.manual_seed(0)
    sizes = {"encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 2}
    config = BartConfig(vocab_size=99, d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, init_std=0.3, **sizes)
    model = BartModel(config)
    ids, mask = torch.randint(3, 99, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :5]}
    report = AttentionEntropyAnalyzer(model).run([batch])
    assert report.modules == [
        "encoder.layers.0.self_attn", "encoder.layers.1.self_attn",
        "decoder.layers.0.self_attn", "decoder.layers.0.encoder_attn",
    ]  # fmt: skip
    assert report.heads.tolist() == [[True] * 4] * 2 + [[True] * 2 + [False] * 2] * 2
    assert report.rows.tolist() == [[15] * 4] * 2 + [[10, 10, 0, 0]] * 2
    model.double().set_attn_implementation("eager")
    with torch.no_grad():
        out = model.eval()(**batch, output_attentions=True)
    encoder = torch.special.entr(out.encoder_attentions[1]).sum(-1)  # B H Q
    close(report.entropy[1], torch.cat([encoder[0], encoder[1, :, :6]], -1).mean(-1))
    close(report.entropy[3, :2], torch.special.entr(out.cross_attentions[0]).sum(-1).mean((0, 2)))
    close(report.bound[3, :2], torch.full((2,), (math.log(9) + math.log(6)) / 2))
    assert report.buckets().sum() == 1
    assert report.kinds == ["bidirectional", "bidirectional", "causal", "cross"]
    assert report.parts == {
        "encoder.layers.*.self_attn": [0, 1], "decoder.layers.*.self_attn": [2], "decoder.layers.*.encoder_attn": [3]
    }  # fmt: skip
    parts = report.summary()["parts"]
    for part, layers in report.parts.items():
        heads = report.entropy[layers][report.heads[layers]]
        assert parts[part]["mean_entropy"] == pytest.approx(float(heads.mean()))
        assert parts[part]["heads"] == len(heads)
    text = str(report)
    bound = (9 * math.log(9) + 6 * math.log(6)) / 15
    assert f"encoder.layers.*.self_attn: heads by quarter of {bound:.2f} nats (bidirectional): " in text
    assert f"decoder.layers.*.self_attn: heads by quarter of {causal_bound(5):.2f} nats (causal): " in text
    bound = (math.log(9) + math.log(6)) / 2
    assert f"decoder.layers.*.encoder_attn: heads by quarter of {bound:.2f} nats (cross): " in text
    assert report.name_of() == "bidirectional and causal and cross"
    observed = report.maximum("observed")
    assert observed[0, 0] == observed[1, 0] == report.entropy[:2].max()
    assert observed[3, 0] == report.entropy[3, :2].max()


def test_under_different_bounds_shares_are_compared(input_ids):
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    reports = []
    for is_decoder in (False, True):
        torch.manual_seed(0)
        config = BertConfig(**sizes, num_attention_heads=4, initializer_range=0.3, is_decoder=is_decoder)
        report = AttentionEntropyAnalyzer(BertModel(config)).run(torch.cat([input_ids] * 6).split(6))
        reports.append(report)
    assert [report.name_of() for report in reports] == ["bidirectional", "causal"]
    assert "(bidirectional)" in str(reports[0])
    assert "causal" not in str(reports[0])
    comparison = compare_reports(*reports)
    assert comparison.shares
    shares = [report.entropy / bound for report, bound in zip(reports, (math.log(12), causal_bound(12)), strict=True)]
    close(comparison.difference, shares[1] - shares[0])
    errors = [r.replicates / bound for r, bound in zip(reports, (math.log(12), causal_bound(12)), strict=True)]
    close(comparison.standard_error, (errors[1] - errors[0]).std(0) * math.sqrt(13 / 11))
    mean = 100 * float((shares[1] - shares[0]).mean())
    assert f"{mean:+.1f} % of the bound on average" in str(comparison)
    assert not compare_reports(reports[0], reports[0]).shares


@pytest.mark.parametrize(
    ("name", "support", "kind"),
    [
        ("h.0.attn", [1, 2, 3, 4], "causal"),
        ("h.0.attn", [1, 2, 2, 2], "causal"),
        ("h.0.attn", [0, 0, 1, 2], "causal"),
        ("h.0.attn", [4, 5, 6, 7], "causal"),
        ("h.0.attn", [4, 4, 4, 4], "bidirectional"),
        ("h.0.attn", [3, 4, 4, 3], "bidirectional"),
        ("crossattention", [1, 2, 3, 4], "cross"),
    ],
)
def test_kinds_of_attention_by_what_their_queries_see(name, support, kind):
    support = torch.tensor(support).view(1, 1, 4)
    rows = RowEntropies(torch.zeros(2, 3, 4), support, None)
    assert kind_of(name, rows, (support[:, 0] > 0).expand(2, 4)) == kind


def test_nothing_to_analyse_is_an_error(model):
    with pytest.raises(ValueError, match="nothing to analyse"):
        AttentionEntropyAnalyzer(model).run([])


def test_what_can_be_handed_over_at_once(model):
    ids = torch.randint(3, 99, (12, 3), generator=torch.Generator().manual_seed(1)).T  # not contiguous
    expected = AttentionEntropyAnalyzer(model).run([ids.contiguous()])
    for batches in ([ids], ids, {"input_ids": ids}, [{"input_ids": ids}]):
        report = AttentionEntropyAnalyzer(model).run(batches)
        close(report.entropy, expected.entropy)
        assert report.sequences == 3
        assert report.metadata["data_sha256"] == expected.metadata["data_sha256"]
    for texts in ("one text", ["one text"]):
        with pytest.raises(DataError, match="need a tokenizer"):
            AttentionEntropyAnalyzer(model).run(texts)


def test_one_text_is_one_sequence(model, cache_dir, corpus):
    from hf_lnfree.data import DataArguments, load_data

    tokenizer = load_data(DataArguments(str(corpus), cache_dir=cache_dir, vocab_size=300, context_length=8)).tokenizer
    model.resize_token_embeddings(len(tokenizer))
    report, expected = (
        AttentionEntropyAnalyzer(model).run(texts, tokenizer=tokenizer, context_length=10)
        for texts in ("import os", ["import os"])
    )
    assert report.sequences == expected.sequences == 1
    close(report.entropy, expected.entropy)


def test_sequences_of_one_token_make_a_file(model, tmp_path):
    report = AttentionEntropyAnalyzer(model).run([torch.tensor([[5], [6]])])
    report.save(tmp_path / "r.json")
    assert not report.flags()
    assert not EntropyReport.load(tmp_path / "r.json").entropy.any()


def test_flags_say_why(model, input_ids):
    report = AttentionEntropyAnalyzer(model).run([input_ids])
    report.entropy[:] = report.bound * 0.5
    report.entropy[0, 1] = report.bound[0, 1] * 0.9
    report.entropy[2, 3] = report.bound[2, 3] * 0.24
    report.standard_error[:] = 0.01
    report.standard_error[2, 3] = 0.2
    report.nonfinite_rows[1, 0] = 3
    assert [f.kind for f in report.flags()] == ["too short", "not finite", "too short"]
    assert (
        report.flags()[0].reason == "1.50 nats is 90 % of 1.67 (above 75 %), ± 0.02; 12 keys are too few for a verdict"
    )
    assert "too short for a verdict on heads, which needs queries of 32 keys; 24 rows of 2 sequences" in str(report)
    report.context_length = 32
    assert "overloaded 8.3 %, collapsed 8.3 %; 24 rows" in str(report)
    flags = {(f.layer, f.head): f for f in report.flags()}
    assert [f.kind for f in flags.values()] == ["overloaded", "not finite", "collapsed"]
    assert flags[0, 1].reason == "1.50 nats is 90 % of 1.67 (above 75 %), ± 0.02"
    assert flags[1, 0].reason == "3 of 24 rows are NaN or infinite"
    assert flags[2, 3].reason.endswith("(at most 25 %), ± 0.39, which reaches the threshold")
    assert [f.kind for f in report.flags(report.bound[0, 0].item() * 10)].count("collapsed") == 11


def test_report_round_trip_and_table(model, input_ids, tmp_path):
    report = AttentionEntropyAnalyzer(model).run([input_ids], name="tiny")
    report.standard_error[0, 0] = math.nan
    report.metadata["seed"] = 3
    report.save(tmp_path / "r.json")
    text = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)  # strict JSON: no NaN literal
    assert text["standard_error"][0][0] is None
    assert text["summary"]["buckets"]["causal"]["shares"] == report.buckets("causal").tolist()
    assert text["metadata"]["environment"]["torch"] == torch.__version__
    assert len(text["metadata"]["data_sha256"]) == 64
    with safe_open(tmp_path / "r.safetensors", "pt") as file:
        assert json.loads(file.metadata()["metadata"])["data_sha256"] == report.metadata["data_sha256"]
    loaded = EntropyReport.load(tmp_path / "r.json")
    for field in fields(EntropyReport):
        ours, theirs = getattr(report, field.name), getattr(loaded, field.name)
        if isinstance(ours, torch.Tensor):
            torch.testing.assert_close(theirs, ours, rtol=0, atol=0, equal_nan=True)
        else:
            assert theirs == ours
    assert "tiny: mean attention entropy in nats (measured)" in str(loaded)
    assert f"{float(report.entropy[2, 3]):.2f}" in str(loaded)
    del text["kinds"]
    (tmp_path / "r.json").write_text(json.dumps(text))
    assert "(causal)" in str(EntropyReport.load(tmp_path / "r.json"))
    (tmp_path / "r.safetensors").unlink()
    with pytest.raises(ValueError, match=r"r\.safetensors beside it are no entropy report"):
        EntropyReport.load(tmp_path / "r.json")


@pytest.mark.parametrize("suffix", ["", ".json"])
def test_reports_with_dots_in_their_names_are_two_reports(model, input_ids, tmp_path, suffix):
    saved = {}
    for size, ids in (("0.5B", input_ids), ("0.6B", input_ids + 1)):
        saved[size] = AttentionEntropyAnalyzer(model).run([ids], name=size)
        saved[size].save(tmp_path / f"qwen-{size}{suffix}")
    assert not torch.equal(*(report.entropy for report in saved.values()))
    for size, report in saved.items():
        assert torch.equal(EntropyReport.load(tmp_path / f"qwen-{size}{suffix}").entropy, report.entropy)
    assert {p.name for p in tmp_path.iterdir()} == {f"qwen-{n}.{s}" for n in saved for s in ("json", "safetensors")}
    shutil.copy(tmp_path / "qwen-0.5B.safetensors", tmp_path / "qwen-0.6B.safetensors")
    with pytest.raises(ValueError, match=r"6B\.safetensors is not the file that qwen-0\.6B\.json was written with"):
        EntropyReport.load(tmp_path / f"qwen-0.6B{suffix}")
    for damaged in ("[]", "{", "{}"):
        (tmp_path / "qwen-0.5B.json").write_text(damaged)
        with pytest.raises(ValueError, match="are no entropy report"):
            EntropyReport.load(tmp_path / "qwen-0.5B.json")
