"""The pictures say the numbers of the reports, and the page stands alone."""

import re
from dataclasses import replace
from html import escape

import pytest
import torch
import transformers

from hf_lnfree import AttentionEntropyAnalyzer, published_reports
from hf_lnfree.analysis import compare_reports
from hf_lnfree.pages.entropy import file_names, write_entropy_page
from hf_lnfree.pages.plots import (
    bucket_bars,
    curves,
    difference_heatmaps,
    distributions,
    entropy_dynamics,
    heatmaps,
    position_curves,
    save,
    to_svg,
)


@pytest.fixture(scope="module")
def reports():
    from tests.conftest import GPT2

    ids = torch.randint(3, 99, (24, 12), generator=torch.Generator().manual_seed(1)).split(8)
    models = [GPT2.model(seed=seed, activation="relu") for seed in (0, 1)]
    return [AttentionEntropyAnalyzer(m).run(ids, name=f"model {i}") for i, m in enumerate(models)]


def texts(figure):
    return re.findall(r"<text[^>]*>([^<]*)</text>", to_svg(figure))


def test_heatmaps_print_every_head_on_one_scale(reports):
    figure = heatmaps(reports)
    shown = texts(figure)
    for report in reports:
        assert {f"{value:.2f}" for value in report.entropy.flatten().tolist()} <= set(shown)
        assert f"{report.name} (measured)" in shown
    images = [ax.images[0] for ax in figure.axes if ax.images]
    assert len({image.get_clim() for image in images}) == 1
    assert images[0].get_clim() == (0.0, float(reports[0].bound.max()))


def test_differences_frame_what_moved(reports):
    comparison = compare_reports(*reports)
    figure = difference_heatmaps([comparison])
    assert len(figure.axes[0].patches) == int(comparison.moved.sum()) > 0
    assert f"{comparison.difference[0, 0]:+.2f}" in texts(figure)
    low, high = figure.axes[0].images[0].get_clim()
    assert low == -high


def test_bucket_bars_are_the_shares(reports):
    figure = bucket_bars(reports)
    for ax, maximum in zip(figure.axes, ("observed", "causal", "log_length"), strict=True):
        heights = [bar.get_height() for bar in ax.patches]
        expected = torch.cat([report.buckets(maximum) for report in reports]) * 100
        assert heights == pytest.approx(expected.tolist())


SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 32, "max_position_embeddings": 64, "pad_token_id": 0}
GEMMA = SMALL | {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 4}
LAYERS = ["sliding_attention", "full_attention"] * 2
WINDOWED = {
    "ModernBert": (SMALL | {"local_attention": 8, "global_attn_every_n_layers": 3}, [[0, 3], [1, 2]]),
    "Gemma2": (GEMMA | {"layer_types": LAYERS}, [[0, 2], [1, 3]]),
    "Gemma3Text": (GEMMA | {"layer_types": LAYERS}, [[0, 2], [1, 3]]),
    "Mistral": (SMALL | {"num_key_value_heads": 2, "sliding_window": 4}, [[0, 1, 2, 3]]),
}


@pytest.mark.parametrize("kind", WINDOWED)
def test_each_kind_of_layer_has_its_own_bound(kind):
    """A mean over layers with and without windows lies below those without."""
    fields, kinds = WINDOWED[kind]
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(getattr(transformers, f"{kind}Config")(**fields)).eval()
    ids = torch.randint(3, 99, (4, 32), generator=torch.Generator().manual_seed(1))
    report = AttentionEntropyAnalyzer(model).run([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    lines = position_curves([report]).axes[0].lines
    layers, bounds = lines[: fields["num_hidden_layers"]], lines[fields["num_hidden_layers"] :]
    assert len(bounds) == len(kinds)
    assert sorted(line.get_label() for line in bounds) == sorted(
        ["maximum"] if len(kinds) == 1 else [f"maximum, layers {', '.join(map(str, found))}" for found in kinds]
    )
    for line, found in zip(sorted(bounds, key=lambda line: line.get_label()), sorted(kinds), strict=True):
        for layer in found:
            assert all(x <= y + 1e-4 for x, y in zip(layers[layer].get_ydata(), line.get_ydata(), strict=True))
            assert line.get_ydata()[-1] == pytest.approx(float(report.strata_bound[layer, 0, -1]), abs=1e-3)


def test_position_curves_and_distributions(reports):
    ax = position_curves(reports).axes[0]
    line = ax.lines[0]
    assert list(line.get_xdata()) == [1.0, 2.0, 3.5, 6.5, 12.5]
    assert line.get_ydata() == pytest.approx(reports[0].strata_entropy[0].mean(0).tolist())
    ax = distributions(reports).axes[0]
    assert ax.lines[0].get_xdata() == pytest.approx(reports[0].quantiles([0.5], by_layer=True)[0].tolist())


def test_published_means_alone_can_be_drawn(tmp_path):
    reports = list(published_reports().values())[:2]
    write_entropy_page(tmp_path, reports)
    assert "published" in (tmp_path / "report.html").read_text()


def test_dynamics_from_a_log_history():
    history = [{"step": s, "entropy/layer_00": 1.0 + s, "entropy/layer_01": 2.0, "loss": 3.0} for s in (0, 10)]
    figure = entropy_dynamics({"run": [*history, {"step": 10, "loss": 1.0}]}, bounds={"run": {"": 4.0}})
    lines = figure.axes[0].lines
    assert [list(line.get_ydata()) for line in lines] == [[1.0, 11.0], [2.0, 2.0], [4.0, 4.0]]
    with pytest.raises(ValueError, match="without an attention probe"):
        entropy_dynamics({"run": [{"step": 1, "loss": 2.0}]})


def test_the_same_numbers_are_the_same_picture(reports, tmp_path):
    for name in ("a", "b"):
        save(heatmaps(reports), tmp_path / name)
    for suffix in (".svg", ".png"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_the_page_stands_alone(reports, tmp_path):
    write_entropy_page(tmp_path / "page", reports)
    page = (tmp_path / "page" / "report.html").read_text()
    loads = re.findall(r'(?:src|href)="(?!#)([^"]*)"', page)
    assert [target[:40] for target in loads if not target.startswith("data:")] == []
    assert page.count("<svg") == 5 + len(reports[0].sequence_entropy) == 11
    for report in reports:
        assert report.metadata["data_sha256"] in page
        for flag in report.flags():
            assert flag.reason.split(",")[0] in page.replace("&#43;", "+")
    assert file_names(reports) == ["model-0", "model-1"]
    assert file_names([reports[0], reports[0]]) == ["model-0-0", "model-0-1"]
    for names in (["x", "x", "x-1"], ["Model", "model"], ["a b", "a/b"], ["", "."]):
        files = [name.lower() for name in file_names([replace(reports[0], name=name) for name in names])]
        assert len(set(files)) == len(names)


@pytest.mark.parametrize("name", ["cost of $$", r"a $\foo$ model", "$x", "100 % _ ^ {"])
def test_names_are_text_and_no_formulas(name, reports, tmp_path):
    report = replace(reports[0], name=name)
    save(heatmaps([report]), tmp_path / "picture", [".svg", ".png"])
    assert escape(name, quote=False) in (tmp_path / "picture.svg").read_text()
    save(curves({name: [(0, 1.0), (1, 2.0)]}, "step", name), tmp_path / "curves", [".svg"])


def test_a_page_of_sequences_of_one_token(tmp_path):
    from tests.conftest import GPT2

    report = AttentionEntropyAnalyzer(GPT2.model()).run([torch.tensor([[5], [6]])])
    write_entropy_page(tmp_path, [report, report])
    assert (tmp_path / "report.html").exists()


def test_ticks_of_logarithmic_axes_are_plain_numbers(reports):
    positions = position_curves(reports)
    assert {"1", "4"} <= set(texts(positions))
    losses = curves({"SM+R": [(0, 3.0), (10, 800.0)]}, "step", "perplexity", log=True)
    assert {"10", "100"} <= set(texts(losses))
    for text in (*texts(positions), *texts(losses)):
        assert "mathdefault" not in text
