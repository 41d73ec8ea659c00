"""What reports, comparisons, attributions and records look like in a terminal, in a notebook and in pandas."""

import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from matplotlib.figure import Figure
from transformers import BartConfig, BartModel

from hf_lnfree import AttentionEntropyAnalyzer, published_reports, record_attention_entropy
from hf_lnfree.analysis import compare_reports
from hf_lnfree.analysis.linearity import attribute
from hf_lnfree.errors import SettingsError
from hf_lnfree.tables import LARGEST_SHOWN, Table

from ..conftest import GPT2


class Shown(HTMLParser):
    """The texts of a page in order, and the cells of its table by row."""

    def __init__(self, page):
        super().__init__()
        self.texts, self.rows = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        assert tag in ("div", "p", "table", "tr", "th", "td")
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_data(self, data):
        self.texts.append(data)
        if self.rows:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def reports():
    ids = torch.randint(3, 99, (24, 40), generator=torch.Generator().manual_seed(1)).split(8)
    sharp = GPT2.model(seed=0, activation="relu", initializer_range=0.5)
    return [
        AttentionEntropyAnalyzer(model).run(ids, name=name)
        for model, name in ((GPT2.model(seed=1, initializer_range=0.02), "flat"), (sharp, "a <b>sharp</b> & $one$"))
    ]


def counts(report):
    """Heads that are overloaded and collapsed, by the definition."""
    share = report.entropy / report.bound
    return [int((share > 0.75).sum()), int((share <= 0.25).sum())]


def test_a_report_begins_with_its_verdict(reports):
    assert counts(reports[0])[0] == 12  # nearly uniform rows
    assert counts(reports[1])[1] > 0
    for report in reports:
        verdict = report.verdict()
        numbers = re.search(
            r"(\d+) of 12 heads are overloaded \(above 3/4 of the causal maximum\), (\d+) coll", verdict
        )
        assert list(map(int, numbers.groups())) == counts(report)
        assert repr(report) == f"<EntropyReport {verdict}>"
        shown = Shown(report._repr_html_())
        assert shown.texts[0] + "".join(shown.texts[1 : shown.texts.index("layer")]) == verdict
        header, *rows = shown.rows
        assert header[:3] == ["layer", "mean (nats)", "bound (nats)"]
        assert [row[0] for row in rows] == ["0", "1", "2"]
        assert [row[1] for row in rows] == [f"{mean:.2f}" for mean in report.layer_means()]
        for column, count in zip(header[4:], counts(report), strict=True):
            assert sum(int(row[header.index(column)].split(" of ")[0]) for row in rows) == count


def test_the_parts_of_a_model_stand_in_a_column():
    ids = torch.randint(3, 90, (4, 40), generator=torch.Generator().manual_seed(0))
    sizes = {"vocab_size": 99, "d_model": 32, "max_position_embeddings": 64}
    sizes |= {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    model = BartModel(BartConfig(**sizes, encoder_ffn_dim=32, decoder_ffn_dim=32)).eval()
    report = AttentionEntropyAnalyzer(model).run([{"input_ids": ids, "decoder_input_ids": ids}])
    header, *rows = Shown(report._repr_html_()).rows
    assert header[0] == "part"
    assert {row[0] for row in rows} == set(report.parts)
    assert len(rows) == len(report.modules)


def test_a_report_says_why_there_is_no_verdict(reports):
    short = AttentionEntropyAnalyzer(GPT2.model()).run([torch.arange(24)[None]], name="short")
    assert "overloaded" not in short.verdict()
    assert "It needs queries of 32 keys; the longest here have 24." in short.verdict()
    lost = reports[0].nonfinite_rows.clone()
    lost[1, :2] = 3
    broken = replace(reports[0], nonfinite_rows=lost, entropy=reports[0].entropy.where(lost == 0, torch.nan))
    assert "10 of 12 heads are overloaded" in broken.verdict()
    assert "2 of 12 heads have rows that are not finite" in broken.verdict()
    assert "not finite" in Shown(broken._repr_html_()).rows[2]


def test_a_comparison_begins_with_its_verdict(reports):
    comparison = compare_reports(*reports)
    moved = int(comparison.moved.sum())
    assert f"{moved} of 12 heads moved" in comparison.verdict()
    assert moved > 2
    assert repr(comparison) == f"<EntropyComparison {comparison.verdict()}>"
    header, *rows = Shown(comparison._repr_html_()).rows
    assert header == ["layer", "head", "before (nats)", "after (nats)", "difference (nats)"]
    assert len(rows) == min(10, moved)
    for layer, head, before, after, change in rows:
        place = int(layer), int(head)
        assert comparison.moved[place]
        assert [before, after] == [f"{report.entropy[place]:.2f}" for report in reports]
        assert change.startswith(f"{comparison.difference[place]:+.2f} ± ")
    same = compare_reports(reports[0], reports[0])
    assert "0 of 12 heads moved" in same.verdict()
    assert Shown(same._repr_html_()).rows == []


def test_pictures_in_one_line(reports):
    figure = reports[0].plot(reports[1])
    assert isinstance(figure, Figure)
    for ax, report in zip(figure.axes, reports, strict=False):
        assert torch.equal(torch.tensor(ax.images[0].get_array().data), report.entropy)
    comparison = compare_reports(*reports)
    image = comparison.plot().axes[0].images[0]
    assert torch.equal(torch.tensor(image.get_array().data), comparison.difference)
    assert image.get_clim()[0] == -image.get_clim()[1]
    for drawn in (figure, comparison.plot(comparison), published_reports()["SM+G"].plot()):
        assert drawn._repr_png_().startswith(b"\x89PNG")


def test_a_data_frame_has_a_line_for_each_head(reports):
    bound = reports[0].bound.clone()
    bound[1, 3] = torch.nan  # a layer with one head less
    report = replace(reports[0], bound=bound)
    frame = report.to_pandas()
    assert list(frame.columns) == ["layer", "head", "entropy", "bound", "share", "standard_error", "flag"]
    assert list(zip(frame.layer, frame["head"], strict=True)) == [
        (layer, head) for layer in range(3) for head in range(4) if (layer, head) != (1, 3)
    ]
    for line in frame.itertuples(index=False):
        place = line[0], line[1]
        assert line.entropy == report.entropy[place]
        assert line.standard_error == report.standard_error[place]
        assert line.share == pytest.approx(float(report.entropy[place] / report.bound[place]))
        assert line.flag == ("overloaded" if line.share > 0.75 else "collapsed" if line.share <= 0.25 else "")


def test_without_pandas_it_says_what_to_install(reports, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(SettingsError, match="pip install pandas"):
        reports[0].to_pandas()


@pytest.mark.parametrize("norm", ["none", "layernorm"])
def test_an_attribution_begins_with_how_exact_it_is(norm, input_ids):
    found = attribute(GPT2.model(norm=norm, final_norm=norm).double(), input_ids)
    verdict = found.verdict()
    assert f"{found.logits[0, -1]:.4f} of token {found.targets[0, -1]} is the sum of {len(found.names)} " in verdict
    assert ("frozen" in verdict) == (norm == "layernorm")
    assert repr(found) == f"<Attribution {verdict}>"
    header, *rows = Shown(found._repr_html_()).rows
    assert header[0] == "component"
    rest = [f"the other {len(found.names) - 10}", "all together, the logit"]
    assert [row[0] for row in rows] == [*(name for name, *_ in found.at()[:10]), *rest]
    *parts, total = (float(row[1]) for row in found.largest().rows)
    assert sum(parts) == pytest.approx(total, abs=1e-3)
    assert found.certificate() in verdict
    assert ("all positions" in verdict) == (found.logits.shape[1] > 1)
    alone = attribute(GPT2.model(norm=norm, final_norm=norm).double(), input_ids, position=-1)
    assert "positions" not in alone.verdict()
    values = found.plot().axes[0].images[0].get_array()
    assert values[2, 1] == pytest.approx(float(found.direct[found.names.index("layer 2 head 1"), 0, -1]))


def test_a_record_is_no_dump_of_tensors(input_ids):
    model = GPT2.model()
    with record_attention_entropy(model) as record:
        model(input_ids)
        model(input_ids)
    assert repr(record) == "<AttentionRecord 3 attention modules, 6 calls>"


def test_a_table_shows_itself():
    table = Table(["row", "loss"], [["a|<i>", "1.0"], ["b", "22.50"]], "A note.")
    assert repr(table).splitlines() == ["row    loss", "a|<i>  1.0", "b      22.50", "A note."]
    shown = Shown(table._repr_html_())
    assert shown.rows[:2] == [["row", "loss"], ["a|<i>", "1.0"]]
    assert shown.texts[-1] == "A note."
    long = Shown(Table(["n"], [[str(n)] for n in range(100)])._repr_html_()).rows
    assert len(long) == LARGEST_SHOWN + 2  # a header, and a row for those left out
    assert (long[1], long[-1]) == (["0"], ["99"])


def test_pictures_are_not_imported_before_they_are_drawn():
    code = (
        "import sys, torch, transformers; from hf_lnfree import AttentionEntropyAnalyzer\n"
        "size = dict(n_layer=1, n_embd=8, n_head=2, vocab_size=9, n_positions=8)\n"
        "model = transformers.GPT2Model(transformers.GPT2Config(**size))\n"
        "report = AttentionEntropyAnalyzer(model).run([torch.tensor([[1, 2, 3]])])\n"
        "report, repr(report), report._repr_html_()\n"
        "assert 'matplotlib' not in sys.modules\n"
        "report.plot()\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
