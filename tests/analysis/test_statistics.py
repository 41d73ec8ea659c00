"""Logits, sinks and outputs of a model's heads against its eager maps, and as sums over batches."""

import json
import math

import pytest
import torch
import transformers as tf

from hf_lnfree import AttentionEntropyAnalyzer, EntropyReport
from hf_lnfree.analysis.capture import record_attention_entropy
from hf_lnfree.analysis.head_statistics import STATISTICS
from hf_lnfree.errors import AttentionError, SettingsError
from tests.analysis.test_capture import MLP, SIZES, TOKENS, batch, build
from tests.attention import models

SAYS_ITS_LOGITS = ["GPT2", "GPTNeoX", "Llama", "Mistral", "Qwen3", "OPT", "BERT"]


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", SAYS_ITS_LOGITS)
def test_masses_equal_those_of_eager_maps(name, side):
    model, inputs = build(name), batch(side)
    with torch.no_grad(), record_attention_entropy(model, statistics=True) as record:
        model(**inputs)
    maps = build(name, "eager")(**inputs, output_attentions=True).attentions
    first = inputs["attention_mask"].argmax(-1)
    for map_, found, support in zip(maps, record.statistics.values(), record.support.values(), strict=True):
        alive = (support > 0).expand(map_.shape[:3])
        sink = torch.stack([row[..., i] for row, i in zip(map_, first, strict=True)])
        top = map_.sort(-1, descending=True).values[..., :8].sum(-1)
        torch.testing.assert_close(found.sink_mass[alive], sink[alive], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.top_mass[alive], top[alive], rtol=1e-5, atol=1e-5)


def test_logits_and_outputs_equal_those_of_the_modules():
    model, inputs = build("GPT2").double(), batch()
    attention, seen = model.transformer.h[1].attn, {}
    attention.c_attn.register_forward_hook(lambda module, args, output: seen.update(qkv=output))
    attention.c_proj.register_forward_pre_hook(lambda module, args: seen.update(output=args[0]))
    with torch.no_grad(), record_attention_entropy(model, statistics=True) as record:
        model(**inputs)
    q, k, _ = (x.unflatten(-1, (4, 8)).transpose(1, 2) for x in seen["qkv"].split(32, -1))
    logits = q @ k.mT / math.sqrt(8)
    shown = torch.ones(12, 12, dtype=torch.bool).tril()
    found = record.statistics["transformer.h.1.attn"]
    torch.testing.assert_close(found.largest_logit, logits.masked_fill(~shown, -math.inf).amax(-1))
    variance = torch.stack([logits[:, :, i, : i + 1].var(-1, correction=0) for i in range(12)], -1)
    torch.testing.assert_close(found.logit_variance, variance, rtol=1e-9, atol=1e-12)
    norm = seen["output"].unflatten(-1, (4, 8)).norm(dim=-1).transpose(1, 2)
    torch.testing.assert_close(found.output_norm, norm)


def t5():
    config = tf.T5Config(vocab_size=99, d_model=32, d_kv=8, num_layers=2, num_heads=4, d_ff=64, initializer_factor=2.0)
    return tf.T5ForConditionalGeneration(config), {
        "input_ids": batch()["input_ids"],
        "decoder_input_ids": batch()["input_ids"][:, :7],
    }


def vit():
    torch.manual_seed(0)
    config = tf.ViTConfig(**{k: v for k, v in SIZES.items() if k != "vocab_size"}, **MLP, image_size=8, patch_size=2)
    return tf.ViTModel(config), {"pixel_values": torch.randn(3, 3, 8, 8)}


def gemma3():
    config = tf.Gemma3TextConfig(**SIZES, **MLP, **TOKENS, num_key_value_heads=2, head_dim=8, sliding_window=5)
    return tf.Gemma3ForCausalLM(config), batch("left")


def gpt_oss():
    config = tf.GptOssConfig(**models.TEXT, head_dim=8, sliding_window=5, num_local_experts=4)
    return tf.GptOssForCausalLM(config), {"input_ids": torch.randint(3, models.TEXT["vocab_size"], (2, 12))}


@pytest.mark.parametrize("make", [t5, vit, gemma3, gpt_oss])
def test_the_mass_of_sinks_in_other_kinds_of_attention(make):
    torch.manual_seed(0)
    model, inputs = make()
    model = model.eval()
    with torch.no_grad(), record_attention_entropy(model, statistics=True) as record:
        model(**inputs)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(**inputs, output_attentions=True)
    kinds = ("encoder_attentions", "decoder_attentions", "cross_attentions", "attentions")
    maps = [map_ for kind in kinds for map_ in out.get(kind) or ()]
    first = inputs.get("attention_mask", torch.ones(1, 1)).argmax(-1)
    expected = [
        torch.stack([row[..., i] for row, i in zip(map_, first.expand(len(map_)), strict=True)]) for map_ in maps
    ]
    found = list(record.statistics.values())
    assert len(found) == len(maps) > 1
    order = sorted(range(len(found)), key=lambda i: "EncDec" in list(record.statistics)[i])  # cross-attentions last
    for index, mass in zip(order, expected, strict=True):
        alive = found[index].sink_mass.isfinite()
        assert alive.double().mean() > 0.8
        torch.testing.assert_close(found[index].sink_mass[alive], mass[alive], rtol=1e-5, atol=1e-5)


def test_means_over_tokens_and_errors_over_sequences():
    model = build("GPT2").double()
    ids = torch.randint(3, 99, (21, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[::3, :5] = 0
    batches = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(4), mask.split(4), strict=True)]
    whole = AttentionEntropyAnalyzer(model, statistics=True).run({"input_ids": ids, "attention_mask": mask})
    parts = AttentionEntropyAnalyzer(model, statistics=True).run(batches)
    for name in ("statistics", "statistics_error"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name), rtol=1e-10, atol=1e-10, equal_nan=True)

    with torch.no_grad(), record_attention_entropy(model, statistics=True) as record:
        model(input_ids=ids, attention_mask=mask)
    rows = torch.stack(record.statistics["transformer.h.0.attn"])  # S B H Q
    kept = mask.bool()[None, :, None].expand_as(rows)
    mean = rows.where(kept, 0.0).sum((1, 3)) / mask.sum()
    torch.testing.assert_close(whole.statistics[1:, 0], mean[1:], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(whole.statistics[0, 0], rows[0].where(kept[0], -math.inf).amax((0, 2)))
    # The jackknife over sequences estimates the same error.
    left_out = torch.stack(
        [
            rows[:, keep].where(kept[:, keep], 0.0).sum((1, 3)) / mask[keep].sum()
            for keep in (torch.arange(21) != out for out in range(21))
        ]
    )
    jackknife = ((left_out - left_out.mean(0)).square().sum(0) * 20 / 21).sqrt()
    torch.testing.assert_close(whole.statistics_error[1:, 0], jackknife[1:], rtol=0.05, atol=0)
    assert whole.statistics_error[0].isnan().all()


def test_reports_keep_print_and_judge_them(tmp_path):
    model = build("GPT2")
    report = AttentionEntropyAnalyzer(model, statistics=True).run(batch())
    norm, mass = report.statistic("output_norm"), report.statistic("sink_mass")
    norm[0] = torch.tensor([1.0, 10.0, 10.0, 10.0])
    norm[1] = 5.0
    mass[:] = torch.tensor([0.2, 0.31, 0.3, math.nan], dtype=mass.dtype)
    assert report.dormant_heads() == pytest.approx(1 / 8)
    assert report.dormant_heads(below=0.01) == 0
    assert report.sink_heads() == pytest.approx(1 / 3)
    assert report.sink_heads(eps=0.1) == 1
    assert "attention sinks in 33.3 % of heads (mass above 0.3), 12.5 % dormant" in report.table()
    report.save(tmp_path / "report.json")
    again = EntropyReport.load(tmp_path / "report")
    assert torch.equal(again.statistics, report.statistics) or again.statistics.isnan().sum() == 2
    saved = json.loads((tmp_path / "report.json").read_text())["summary"]
    assert list(saved["statistics"]) == list(STATISTICS)
    assert saved["sink_heads"] == pytest.approx(1 / 3)
    assert report.statistics_by_layer().header[1:] == [
        "largest logit", "logit variance", "sink mass", "top 8 mass", "output norm",
    ]  # fmt: skip


def test_what_was_not_asked_for_says_so():
    model = build("GPT2")
    report = AttentionEntropyAnalyzer(model).run(batch())
    assert "sink" not in report.table()
    assert "statistics" not in report.summary()
    with pytest.raises(SettingsError, match=r"no statistic 'sink_mass'.*statistics=True"):
        report.sink_heads()
    with (
        pytest.raises(AttentionError, match="maps do not tell"),
        record_attention_entropy(model, "attentions", statistics=True),
    ):
        model(**batch())


def test_modules_that_offer_maps_alone_have_none():
    report = AttentionEntropyAnalyzer(build("Bloom"), statistics=True).run(batch())
    assert report.statistics.isnan().all()
    assert report.entropy.isfinite().all()
    assert math.isnan(report.sink_heads())
