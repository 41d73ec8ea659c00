"""Reports of geometry against whole matrices in float64, however the rows came."""

import math

import pytest
import torch
import torch.nn.functional as F
import transformers as tf

from hf_lnfree import GeometryAnalyzer, GeometryReport, compare_geometry
from hf_lnfree.analysis.mlp_capture import record_mlp
from hf_lnfree.analysis.row_classes import most_frequent, next_tokens
from hf_lnfree.analysis.texts import TextWindows
from hf_lnfree.analysis.token_kinds import KINDS, token_kinds
from hf_lnfree.data.tokenization import train_bpe
from tests.analysis.test_mlp_capture import EXPERTS, FAMILIES, KV, MLP, T5, build
from tests.conftest import SIZES, run_in_two

TEXTS = [
    f'import os, sys\n\ndef f{i}(x):\n    """Add {i}."""\n    return x + {i}.5  # done\n' * (i % 3 + 1)
    for i in range(30)
]


@pytest.fixture(scope="module")
def gpt2():
    cls, config, *_ = FAMILIES["GPT2"]
    return build(cls, config).double()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 99, (40, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def whole(gpt2, ids):
    return GeometryAnalyzer(gpt2).run(ids, name="whole")


def all_rows(model, **inputs):
    found = {}
    with record_mlp(model, lambda rows: found.update({rows.name: rows})), torch.no_grad():
        model(**inputs)
    return found


def assert_alike(one, other, rtol=1e-10, left=True):
    assert one.modules == other.modules
    assert list(one.values) == list(other.values)
    for metric in one.values:
        for name in ("values", "standard_errors", "left_out") if left else ("values",):
            pair = (getattr(report, name)[metric] for report in (one, other))
            torch.testing.assert_close(*pair, rtol=rtol, atol=1e-9, equal_nan=True, msg=f"{metric} {name}")


def test_metrics_are_those_of_whole_matrices(gpt2, ids, whole):
    rows = all_rows(gpt2, input_ids=ids)
    for layer, each in enumerate(rows.values()):
        found = {metric: float(values[layer]) for metric, values in whole.values.items()}
        for side, x in (("pre", each.pre), ("post", each.post)):
            spectrum = torch.linalg.eigvalsh(torch.cov(x.T)).flip(0).clamp_min(1e-12)
            p = spectrum / spectrum.sum()
            assert found[f"spectral_entropy_{side}"] == pytest.approx(float(-(p * p.log()).sum()), rel=1e-9)
            assert found[f"participation_ratio_{side}"] == pytest.approx(float(1 / p.square().sum()), rel=1e-9)
            torch.testing.assert_close(whole.units[f"spectrum_{side}"][layer], spectrum, rtol=1e-8, atol=1e-12)
        assert found["participation_gain"] == pytest.approx(
            found["row_participation_ratio_post"] / found["row_participation_ratio_pre"]
        )
        fires = (each.pre > 0).double()
        torch.testing.assert_close(whole.units["frequency"][layer], fires.mean(0))
        assert found["frequency"] == pytest.approx(float(fires.mean()))
        labels = torch.arange(480) % 12  # position
        buckets = (labels + 1).double().log2().ceil()
        between = torch.stack(
            [(buckets == b).sum() * (each.post[buckets == b].mean(0) - each.post.mean(0)) ** 2 for b in range(5)]
        )
        share = between.sum(0) / 480 / each.post.var(0, correction=0)
        assert found["between_share/position"] == pytest.approx(float(share.mean()))
        means = torch.stack([each.pre.relu()[buckets == b].mean(0) for b in range(5)])
        rest = (means.sum(0) - means.amax(0)) / 4
        selectivity = (means.amax(0) - rest) / (means.amax(0) + rest)
        assert found["class_selectivity/position"] == pytest.approx(float(selectivity.nanmean()))
        for kind, y in (("inputs", each.inputs), ("position", F.one_hot(buckets.long()).double())):
            assert found[f"alignment/{kind}"] == pytest.approx(cka(each.post, y), rel=1e-8)


def cka(x, y):
    """Debiased, of kernels without their diagonals."""
    k, m = ((z @ z.T).fill_diagonal_(0) for z in (x, y))
    n = len(x)

    def hsic(a, b):
        terms = (a * b).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (a.sum(0) @ b.sum(1))
        return terms / (n * (n - 3))

    return float(hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt())


@pytest.mark.parametrize("batches", [7, 100])
def test_batches_do_not_matter(gpt2, ids, batches):
    many = torch.cat((ids, ids.flip(0), 101 - ids))[:100]
    one = GeometryAnalyzer(gpt2).run(many)
    assert_alike(one, GeometryAnalyzer(gpt2).run(list(many.tensor_split(batches))))


def test_two_processes_add_up_to_one(gpt2, ids, whole):
    tokens = most_frequent([{"input_ids": ids}], 32)
    analyzer = GeometryAnalyzer(gpt2, next_tokens=tokens)
    parts = [analyzer.sums(ids[:17]), analyzer.sums(ids[17:], first_document=17)]
    assert_alike(whole, (parts[0] + parts[1]).report())
    assert (parts[0] + parts[1]).about["data_sha256"] == (parts[1] + parts[0]).about["data_sha256"]
    with pytest.raises(ValueError, match="other groups cannot be added: 10 and 2"):
        parts[0] + GeometryAnalyzer(gpt2, 2, next_tokens=tokens).sums(ids[:4])
    with pytest.raises(ValueError, match="other next_tokens cannot be added"):
        parts[0] + GeometryAnalyzer(gpt2, next_tokens=[5]).sums(ids[:4])


PROGRAM = """
import sys
import torch
import torch.distributed as dist
from hf_lnfree import GeometryAnalyzer
from transformers import GPT2LMHeadModel

dist.init_process_group("gloo")
ids, folder, rank = torch.load(f"{sys.argv[1]}/ids.pt"), sys.argv[1], dist.get_rank()
mine, first = (ids[:17], 0) if rank == 0 else (ids[17:], 17)
model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float64)
sums = GeometryAnalyzer(model, next_tokens=range(3, 35)).sums(list(mine.split(5)), first_document=first)
both = [None, None]
dist.all_gather_object(both, sums)
if rank == 0:
    (both[0] + both[1]).report("both").save(f"{folder}/both.json")
dist.destroy_process_group()
"""


def test_two_processes_over_a_wire_are_one(gpt2, ids, tmp_path):
    gpt2.save_pretrained(tmp_path)
    torch.save(ids, tmp_path / "ids.pt")
    (tmp_path / "program.py").write_text(PROGRAM)
    done = run_in_two(str(tmp_path / "program.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr
    one = GeometryAnalyzer(gpt2, next_tokens=range(3, 35)).run(ids)
    assert_alike(one, GeometryReport.load(tmp_path / "both.json"))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(gpt2, ids, whole, side):
    padding = torch.full((40, 5), 2)
    hidden, shown = torch.zeros(40, 5, dtype=torch.long), torch.ones_like(ids)
    order = (lambda a, b: (a, b)) if side == "left" else (lambda a, b: (b, a))
    batch = {
        "input_ids": torch.cat(order(padding, ids), 1),
        "attention_mask": torch.cat(order(hidden, shown), 1),
        "position_ids": torch.cat(order(hidden, torch.arange(12).expand(40, -1)), 1),
    }
    assert_alike(whole, GeometryAnalyzer(gpt2).run(batch), rtol=1e-6)


def test_windows_of_a_document_stay_in_one_group(gpt2, ids, whole):
    halves = {"input_ids": ids.view(80, 6), "document": torch.arange(80) // 2}
    found = GeometryAnalyzer(gpt2, 4).run(halves)
    assert found.documents == 40
    alone = GeometryAnalyzer(gpt2, 1).run({"input_ids": ids[torch.arange(40) % 4 != 1].view(60, 6)})
    for metric in ("specialisation", "row_participation_ratio_post", "within_selectivity/position"):
        torch.testing.assert_close(found.left_out[metric][1], alone.values[metric], rtol=1e-9, atol=0)
    assert all(errors.isnan().all() for errors in alone.standard_errors.values())
    assert whole.standard_errors["spectral_entropy_post"].gt(0).all()


def test_memory_does_not_grow_with_tokens(gpt2, ids):
    def size(count):
        sums = GeometryAnalyzer(gpt2, 2, next_tokens=[4, 5]).sums(ids[:count]).mlps["transformer.h.0.mlp"]
        return sum(t.numel() for part in (sums.pre, sums.post, sums.signs, sums.cross) for t in vars(part).values())

    assert size(3) == size(40)


def test_more_units_than_rows_have_no_spectra(gpt2, ids):
    report = GeometryAnalyzer(gpt2).run(ids[:4])
    assert report.rows.tolist() == [48] * 3
    assert report.few_rows.all()
    for metric in ("spectral_entropy_pre", "early_enrichment_post", "jensen_shannon", "patterns"):
        assert report.values[metric].isnan().all()
    assert report.values["row_participation_ratio_pre"].isfinite().all()
    assert "No spectra of layer_00, layer_01, layer_02: no more rows than units." in str(report)
    assert "4 documents in 10 groups" in str(report)


def inputs_of(model):
    ids = torch.randint(3, 99, (20, 12), generator=torch.Generator().manual_seed(2))
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(20, 1, 8, 8), "labels": torch.arange(20) % 3}
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :7]} if model.config.is_encoder_decoder else {})


IMAGES = {k: v for k, v in SIZES.items() if k != "vocab_size"} | MLP
OTHERS = {
    "Mixtral": (tf.MixtralModel, tf.MixtralConfig(**SIZES, **MLP, **KV, **EXPERTS)),
    "T5": (tf.T5Model, tf.T5Config(**T5, feed_forward_proj="gated-gelu")),
    "ViT": (tf.ViTModel, tf.ViTConfig(**IMAGES, image_size=8, patch_size=4, num_channels=1)),
}


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_every_family_has_a_report(family):
    model = build(*(OTHERS.get(family) or FAMILIES[family][:2]))
    report = GeometryAnalyzer(model).run(inputs_of(model), name=family)
    rows = {"Mixtral": 3 * 2 * 240, "T5": 3 * (240 + 140), "ViT": 3 * 100}
    assert int(report.rows.sum()) == rows.get(family, 3 * 240)
    enough = ~report.few_rows
    assert enough.any()
    assert report.values["jensen_shannon"][enough].isfinite().all()
    assert report.standard_errors["specialisation"][enough].gt(0).all()
    assert report.values["alignment/inputs"][enough].gt(0.1).all()
    kinds = ["label"] if family == "ViT" else ["next_token", "position"]
    assert report.kinds == ["inputs", *kinds]
    for kind in kinds:
        assert report.values[f"between_share/{kind}"].nanmean() > 0


def test_units_that_know_their_label_are_selective():
    model = build(*OTHERS["ViT"])
    pictures = torch.randn(3, 1, 8, 8)[torch.arange(60) % 3]
    known = GeometryAnalyzer(model).run({"pixel_values": pictures, "labels": torch.arange(60) % 3})
    mixed = GeometryAnalyzer(model).run({"pixel_values": pictures, "labels": torch.arange(60) // 20})
    assert (known.values["between_share/label"] > 10 * mixed.values["between_share/label"]).all()
    assert (known.values["alignment/label"] > mixed.values["alignment/label"]).all()


def test_few_documents_are_told(gpt2, ids):
    one, three = (GeometryAnalyzer(gpt2).run(ids[:count]) for count in (1, 3))
    assert one.notes()[-1] == "A single document has no standard errors."
    assert one.standard_errors["frequency"].isnan().all()
    assert three.notes()[-1] == "3 documents in 10 groups: standard errors are rough."
    assert three.standard_errors["frequency"].isfinite().all()


def test_own_columns_are_classes(gpt2, ids):
    columns = {"half": (torch.arange(12) >= 6).long().expand(40, -1), "speaker": torch.arange(40) % 5 - 1}
    analyzer = GeometryAnalyzer(gpt2, classes=["half", "speaker"])
    report = analyzer.run([{"input_ids": ids, **columns}])
    assert report.kinds == ["inputs", "half", "speaker"]
    post = all_rows(gpt2, input_ids=ids)["transformer.h.0.mlp"].post.unflatten(0, (40, 12))
    halves = torch.stack((post[:, :6].flatten(0, 1), post[:, 6:].flatten(0, 1)))
    share = halves.mean(1).var(0, correction=0) / post.flatten(0, 1).var(0, correction=0)
    assert float(report.values["between_share/half"][0]) == pytest.approx(float(share.mean()))
    with pytest.raises(ValueError, match="classes='speaker' needs a column 'speaker' of whole numbers"):
        analyzer.run([{"input_ids": ids, "half": columns["half"]}])


def test_next_tokens_are_those_that_follow():
    ids = torch.tensor([[5, 6, 7, 6], [6, 6, 9, 2]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    assert most_frequent([{"input_ids": ids, "attention_mask": mask}], 2) == [6, 7]
    assert next_tokens(ids, mask, [6, 7]).tolist() == [[0, 1, 0, -1], [0, -1, -1, -1]]


def test_kinds_are_those_of_python():
    text = 'if x1 == 2.5:  # why\n    s = f"a {y}"\n'
    offsets = [(i, i + 1) for i in range(len(text))]
    kinds = [KINDS[k] for k in token_kinds(text, offsets)]
    expected = ["keyword"] * 2 + ["whitespace"] + ["name"] * 2 + ["whitespace"] + ["operator"] * 2 + ["whitespace"]
    expected += ["number"] * 3 + ["operator"] + ["whitespace"] * 2 + ["comment"] * 5 + ["whitespace"] * 5 + ["name"]
    assert kinds[: len(expected)] == expected
    assert kinds[text.index('f"')] == kinds[text.index("a {")] == "string"
    assert token_kinds("x = (", [(0, 1), (2, 3)]) == [KINDS.index("name"), KINDS.index("operator")]
    assert token_kinds("a ? b", [(0, 1), (4, 5)]) == [KINDS.index("name"), -1]
    assert token_kinds("x", [(0, 0), (0, 1)]) == [-1, KINDS.index("name")]


def test_texts_are_read_by_document_with_the_kinds_of_their_tokens():
    tokenizer = train_bpe(TEXTS, 300)
    model = build(tf.GPT2Model, tf.GPT2Config(**{**SIZES, "vocab_size": 300}, n_inner=48))
    analyzer = GeometryAnalyzer(model, classes=["token_kind", "next_token"])
    report = analyzer.run(TEXTS, tokenizer=tokenizer, context_length=24, name="texts")
    assert report.documents == 30
    assert report.metadata["token_kinds"] == list(KINDS)
    assert (report.values["between_share/token_kind"] > 0.02).all()
    windows = TextWindows(TEXTS, tokenizer, "text", 24, 8, token_kinds)
    for window in windows.cut():
        for token, kind in zip(window.ids, window.kinds, strict=True):
            text = tokenizer.decode([token]).strip()
            if text in ("import", "def", "return"):
                assert KINDS[kind] == "keyword", (text, kind)
            if text in ("+", ",", ":"):
                assert KINDS[kind] == "operator"
    with pytest.raises(ValueError, match="Texts need a tokenizer"):
        analyzer.run(TEXTS)


def test_a_report_saves_loads_and_compares(gpt2, ids, whole, tmp_path):
    whole.save(tmp_path / "report.json")
    loaded = GeometryReport.load(tmp_path / "report")
    assert_alike(whole, loaded, rtol=0)
    assert str(loaded) == str(whole)
    assert loaded.units.keys() == whole.units.keys()
    frame = loaded.to_pandas()
    assert len(frame) == 3 * len(whole.values)
    cls, config, *_ = FAMILIES["GPT2"]
    config = type(config)(**{**config.to_dict(), "activation_function": "relu"})
    relu = cls(config).double()
    relu.load_state_dict(gpt2.state_dict())
    other = GeometryAnalyzer(relu.eval()).run(ids, name="relu")
    change = compare_geometry(whole, other)
    assert change.paired
    assert change.moved["jensen_shannon"][0]
    assert not change.moved["frequency"][0]  # the first pre-activation is the same
    assert float(change.standard_errors["frequency"][0]) == pytest.approx(0, abs=1e-9)
    unpaired = compare_geometry(whole, GeometryAnalyzer(gpt2).run(ids[:30]))
    assert not unpaired.paired
    errors = [report.standard_errors["overlap"] for report in (whole, unpaired.other)]
    torch.testing.assert_close(unpaired.standard_errors["overlap"], (errors[0] ** 2 + errors[1] ** 2).sqrt())
    assert "relu against whole" in change.verdict()
    assert "participation gain" in str(change)
    (tmp_path / "report.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is not the file that report.json was written with"):
        GeometryReport.load(tmp_path / "report")


def test_a_model_that_has_diverged_is_nan(ids):
    cls, config, *_ = FAMILIES["GPT2"]
    model = build(cls, config)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.bias[3] = math.nan
    report = GeometryAnalyzer(model).run(ids)
    assert report.values["spectral_entropy_post"].isnan().tolist() == [False, True, True]
    assert report.units["frequency"][1].isnan().nonzero().flatten().tolist() == [3]
    assert report.values["frequency"].isnan().tolist() == [False, True, True]


def test_what_cannot_be_analysed_is_told(gpt2, ids):
    with pytest.raises(ValueError, match="nothing to analyse"):
        GeometryAnalyzer(gpt2).run([])
    with pytest.raises(ValueError, match="nothing to analyse"):
        GeometryAnalyzer(gpt2, only="no such").run(ids)
    with pytest.raises(ValueError, match="groups=0"):
        GeometryAnalyzer(gpt2, 0)
    one = GeometryAnalyzer(gpt2, only=r"h\.1\.").run(ids)
    assert one.modules == ["transformer.h.1.mlp"]
    with pytest.raises(ValueError, match="they have 1 and 3"):
        compare_geometry(one, GeometryAnalyzer(gpt2).run(ids[:3]))


def test_row_corrected_ratios_are_those_of_the_package_dimensionality(gpt2, ids, whole):
    dimensionality = pytest.importorskip("dimensionality")
    for layer, rows in enumerate(all_rows(gpt2, input_ids=ids).values()):
        expected = dimensionality.participation_ratio(rows.pre.numpy(), return_all=True)["row"]
        assert float(whole.values["row_participation_ratio_pre"][layer]) == pytest.approx(float(expected), rel=1e-9)
