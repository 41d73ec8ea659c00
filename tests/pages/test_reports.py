"""What a reader of a report meets, and in which order."""

import json
import math
import re
from dataclasses import replace
from importlib.resources import files
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_rgba_array

from hf_lnfree import AttentionEntropyAnalyzer
from hf_lnfree.analysis.entropy_report import EntropyReport
from hf_lnfree.analysis.linearity import attribute
from hf_lnfree.pages.answer import answer_sentence, best_row
from hf_lnfree.pages.attribution import write_attribution
from hf_lnfree.pages.differences import curves_and_differences, minus_first
from hf_lnfree.pages.entropy import write_entropy_page
from hf_lnfree.pages.heads import entropy_verdict
from hf_lnfree.pages.plots import curves, heatmaps, layer_dynamics, save
from hf_lnfree.pages.removal import verdict as removal_verdict
from hf_lnfree.pages.removal import write_removal_report
from hf_lnfree.pages.report import Choice, Fold, Listing, Picture, Section, Verdict, write_report
from hf_lnfree.removal.results import RemovalSummary
from hf_lnfree.studies.cells import Cell
from hf_lnfree.studies.summary import share
from hf_lnfree.tables import Table
from tests.conftest import GPT2
from tests.pages.pages import read

TEMPLATES = files("hf_lnfree.pages") / "templates"


@pytest.fixture(scope="module")
def report() -> EntropyReport:
    """40 keys, 12 sequences, and chosen entropies: head h of layer l at (l + 8 h + 1.25) / 66 of the bound."""
    ids = torch.randint(3, 99, (12, 40), generator=torch.Generator().manual_seed(1)).split(6)
    model = GPT2.model(seed=0, activation="relu", max_position_embeddings=64, num_hidden_layers=8, n_head=8)
    found = AttentionEntropyAnalyzer(model).run(ids, name="model")
    share = (torch.arange(8)[:, None] + 8 * torch.arange(8) + 1.25).double() / 66
    return replace(found, entropy=share * found.bound, replicates=(share * found.bound).expand(4, 8, 8).clone())


def test_a_picture_says_what_each_head_is_under_the_pointer(report, tmp_path):
    save(heatmaps([report]), tmp_path / "heads", [".svg", ".png"])
    namespace = {"svg": "http://www.w3.org/2000/svg"}
    cells = ElementTree.parse(tmp_path / "heads.svg").findall(".//svg:g[@pointer-events='all']/svg:rect", namespace)
    texts = {cell.find("svg:title", namespace).text: cell for cell in cells}
    assert len(texts) == 64
    top = float(report.bound[0, 0])
    said = f"layer 2, head 7: {59.25 / 66 * top:.2f} of {top:.2f} nats, 90 %, overloaded"
    assert said in texts
    assert f"layer 0, head 4: {33.25 / 66 * top:.2f} of {top:.2f} nats, 50 %" in texts
    # It lies where the number of that head is written.
    rect = {key: float(value) for key, value in texts[said].attrib.items()}
    figure = (tmp_path / "heads.svg").read_text()
    places = re.findall(rf'x="([\d.]+)" y="([\d.]+)"[^>]*>{59.25 / 66 * top:.2f}</text>', figure)
    assert len(places) == 1
    x, y = map(float, places[0])
    assert rect["x"] < x < rect["x"] + rect["width"]
    assert rect["y"] < y < rect["y"] + rect["height"]


def test_the_verdict_comes_first_and_ten_heads_are_listed(report, tmp_path):
    write_entropy_page(tmp_path, [report])
    page = read(tmp_path / "report.html")
    verdict, picture, table = page.all("p", class_="verdict")[0], page.all("svg")[0], page.all("table")[0]
    order = [element for element in walk(page) if element in (verdict, picture, table)]
    assert order == [verdict, picture, table]
    over, under = sum(k + 1.25 > 49.5 for k in range(64)), sum(k + 1.25 <= 16.5 for k in range(64))
    assert over != under
    words = r"model: (\d+) of 64 heads are overloaded \(above 3/4 of the causal maximum\), (\d+) collapsed .*"
    assert (
        re.fullmatch(words, verdict.text).groups()
        == (str(over), str(under))
        == tuple(re.match(words, report.verdict()).groups())
    )
    bound = f"{report.bound[0, 0]:.2f} nats"
    limits = page.all("p", class_="note")[0].text
    for said in (bound, f"{100 * over / 64:.0f} % (", f"{100 * under / 64:.0f} % ("):
        assert said in limits
    listed, folded = [element for element in page.all("table") if "verdict" in element.all("thead")[0].text]
    assert not listed.inside("details")
    assert folded.inside("details")
    rows = [[cell.text for cell in row.all("td")] for row in listed.all("tbody")[0].all("tr")]
    assert len(rows) == 10
    assert rows[0][:4] == ["0", "0", "collapsed", "2 %"]
    assert {int(row[0]) + 8 * int(row[1]) for row in rows} == {*range(5), *range(59, 64)}
    assert len(folded.all("tbody")[0].all("tr")) == over + under
    open_tables = [element for element in page.all("table") if not element.inside("details")]
    assert sum("1/4 to 1/2" in element.text for element in open_tables) == 1  # one maximum


def test_a_text_that_is_too_short_has_no_verdict(report, tmp_path):
    short = replace(report, context_length=31)
    write_entropy_page(tmp_path, [short])
    page = read(tmp_path / "report.html")
    verdict = page.all("p", class_="verdict")[0].text
    assert "too short for a verdict" in verdict
    assert "overloaded" not in verdict
    assert all("overloaded" not in cell.text for cell in page.all("td"))
    assert all("overloaded" not in title.text for title in page.all("title"))
    assert "too short" not in entropy_verdict([report], "causal").said


def test_a_study_passes_no_verdict_on_heads_of_short_texts(report, tmp_path):
    cell = Cell("SM+G", 0, tmp_path, entropy=report)
    assert share([cell], "overloaded") == "23 %"
    rows = {"SM+G": [cell], "SM+R": [replace(cell, row="SM+R", entropy=replace(report, context_length=31))]}
    assert share(rows["SM+R"], "overloaded") == "too short"
    assert "No verdict on heads" in answer_sentence(rows, None)
    assert "overloaded" not in answer_sentence(rows, None)


def test_any_study_has_a_verdict(tmp_path):
    def cells(row, *values):
        found = [SimpleNamespace(score=value, measure="perplexity") for value in values]
        return [Cell(row, seed, tmp_path, results=results) for seed, results in enumerate(found)]

    rows = {"a": cells("a", 10.0, 10.0), "b": cells("b", 9.0, 9.1), "c": cells("c", 8.0, math.nan)}
    assert best_row(rows) == (
        "The lowest perplexity is that of b, 9.05 ± 0.64, 9.5 ± 6.4 % below that of a. Seeds diverged in c."
    )
    rows["b"] = cells("b", 9.0, 10.7)
    assert "(the interval holds 0: no difference is shown)" in best_row(rows)
    rows = {"a": cells("a", 10.0), "b": cells("b", 9.0)}
    assert "(one seed, so no interval)" in best_row(rows)


def test_intervals_that_are_not_there_are_explained(report):
    few = replace(report, sequences=9)
    assert "No intervals for model: they need 10 sequences." in entropy_verdict([few], "causal").limits
    assert "No intervals" not in entropy_verdict([report], "causal").limits


def walk(element):
    for child in element.children:
        if not isinstance(child, str):
            yield child
            yield from walk(child)


@pytest.fixture
def page(tmp_path):
    figure = curves({"a": [(0, 1.0), (1, 2.0)]}, "step", "loss")
    other = curves({"b": [(0, 3.0), (1, 2.0)]}, "step", "loss")
    table = Table(["name", "loss"], [["x", "15.64 ± 0.22"], ["y", "9.1"], ["sum", "24.74"]], "A note.", foot=1)
    options = {"0": [Picture(figure, "Of 0.", "Curve 0")], "1": [Picture(other, "Of 1.", "Curve 1")]}
    blocks = [
        Verdict("It is <so>.", "Not elsewhere."),
        table,
        Choice("seed", options),
        Fold("Settings", [Listing("{}")]),
    ]
    write_report(tmp_path / "report.html", "Title", "lead", [Section("First", blocks)])
    return read(tmp_path / "report.html")


def test_every_picture_has_a_text_for_those_who_do_not_see_it(page):
    assert len(page.all("svg")) == 2
    for svg, alt in zip(page.all("svg"), ("Curve 0", "Curve 1"), strict=True):
        assert svg.parent.attributes == {"role": "img", "aria-label": alt}


def test_captions_stand_above_tables_which_scroll_in_a_box_of_their_own(page):
    (table,) = page.all("table")
    box = table.parent
    assert box.attributes["class"] == "scroll"
    around = [child for child in box.parent.children if not isinstance(child, str)]
    assert [child.tag for child in around] == ["figcaption", "div"]
    assert around[0].text == "A note."
    assert [button.text for button in table.all("thead")[0].all("button")] == ["name", "loss"]
    assert [row.all("td")[0].text for row in table.all("tbody")[0].all("tr")] == ["x", "y"]
    assert [row.all("td")[0].text for row in table.all("tfoot")[0].all("tr")] == ["sum"]


def test_all_seeds_are_there_to_choose_from(page):
    (choice,) = page.all("div", class_="choice")
    assert [option.text for option in choice.all("option")] == ["0", "1"]
    shown = choice.all("div", class_="option")
    assert [option.attributes["data-option"] for option in shown] == ["0", "1"]
    assert all("hidden" not in option.attributes for option in shown)  # without JavaScript each is shown
    assert choice.all("label")[0].attributes.get("hidden", "") is None


def test_pictures_of_a_page_share_no_ids_and_lack_none(page):
    ids = [element.attributes["id"] for element in walk(page) if "id" in element.attributes]
    assert len(ids) == len(set(ids)) > 0
    wanted = {
        target
        for element in walk(page)
        for value in element.attributes.values()
        for target in re.findall(r"(?:^#|url\(#)([^)]+)", value or "")
    }
    assert wanted == set(ids)


def test_a_column_sorts_by_the_number_that_a_cell_begins_with():
    pattern = re.compile(re.search(r"NUMBER = /(.*)/;", (TEMPLATES / "report.js").read_text())[1])
    numbers = {"15.64 ± 0.22": 15.64, "-3.1 ± 2.0 %": -3.1, "33 % (20 to 47)": 33, "+0.12": 0.12, "1.2e-05": 1.2e-5}
    assert {text: float(pattern.match(text)[0]) for text in numbers} == numbers
    assert pattern.match("SM+R") is None


def test_pages_are_made_for_the_dark_for_paper_and_for_narrow_screens():
    style, script = ((TEMPLATES / f"report.{kind}").read_text() for kind in ("css", "js"))
    assert "prefers-color-scheme: dark" in style
    assert re.search(r"\.picture svg {[^}]*background: #fff;[^}]*max-width: 100%", style)
    assert re.search(r"\.scroll {[^}]*overflow-x: auto", style)
    assert "@media print" in style
    assert re.search(r'"beforeprint"[^}]*open = true|"beforeprint"[^;]*;[^;]*open = true', script)


def test_rows_that_lie_on_each_other_are_told_apart_by_their_difference():
    lines = {"a": [(0, 5.0), (10, 4.0)], "b": [(0, 5.1), (5, 4.6), (10, math.nan)], "c": []}
    assert minus_first(lines)["b"][0] == (0, pytest.approx(0.1))
    assert [x for x, _ in minus_first(lines)["b"]] == [0, 10]
    left, right = curves_and_differences(lines, "step", "loss").axes
    assert [list(line.get_xdata()) for line in right.lines] == [[0, 10], [0, 10], []]
    assert [line.get_color() for line in left.lines] == [line.get_color() for line in right.lines]
    assert len(curves_and_differences({"a": lines["a"]}, "step", "loss").axes) == 1


def test_a_colour_bar_names_every_layer():
    layers = [[(0, float(i)), (1, float(i))] for i in range(8)]
    figure = layer_dynamics({"row": layers}, "entropy")
    figure.draw_without_rendering()
    panel, bar = figure.axes
    assert [text.get_text() for text in bar.get_yticklabels()] == [str(i) for i in range(8)]
    colours = next(part for part in bar.collections if isinstance(part, QuadMesh)).get_facecolors()
    assert to_rgba_array([line.get_color() for line in panel.lines]) == pytest.approx(colours)


@pytest.mark.parametrize("norm", ["none", "layernorm"])
def test_an_attribution_says_how_likely_its_token_is_and_sums_what_it_does_not_list(norm, tmp_path):
    model = GPT2.model(seed=0, norm=norm, final_norm=norm).double()
    ids = torch.tensor([[5, 17, 3]])
    with torch.no_grad():
        chances = model(ids).logits[0, -1].softmax(-1)
    token = int(chances.argsort(descending=True)[2])
    found = attribute(model, ids, torch.full_like(ids, token))
    write_attribution(tmp_path, found, "model", "a prompt", "word", top=3)
    record = json.loads((tmp_path / "attribution.json").read_text())
    assert record["probability"] == pytest.approx(float(chances[token]))
    assert record["rank"] == 3
    page = read(tmp_path / "report.html")
    verdict = page.all("p", class_="verdict")[0].text
    assert f"a probability of {chances[token]:.3g}, rank 3 of all tokens" in verdict
    (table,) = page.all("table")
    assert len(table.all("th")) == (2 if norm == "none" else 3)  # equal columns say nothing
    listed = [float(row.all("td")[1].text) for row in table.all("tr")[1:]]
    assert len(listed) == 3 + 2
    assert sum(listed[:-1]) == pytest.approx(listed[-1], abs=3e-4)
    assert next(row.all("td")[0].text for row in table.all("tfoot")[0].all("tr")).startswith("the other ")


def removal(**changes):
    events = [
        {"step": i, "norm": f"norm {i}", "part": "all", "loss_before": 3.0, "loss_after": 3.0 + (7 * i % 12) / 100}
        for i in range(12)
    ]
    fields = {
        **{"model": "gpt2", "loss_before": 3.5, "loss_after": 3.45, "loss_plain": 3.4, "gap": 0.05, "steps": 20},
        **{"norms_left": "none", "events": events, "curves": {"removal": [(0, 3.5)], "plain": [(0, 3.5)]}},
        **{"tokens": 100, "sigma": {}, "arguments": {"removal_windows": 4}, "seed": 0, "data": {}, "environment": {}},
        **{"command": "", "diverged_at": None},
    }
    return RemovalSummary(**(fields | changes))


def test_a_removal_begins_with_what_it_cost(tmp_path):
    write_removal_report(tmp_path, removal())
    page = read(tmp_path / "report.html")
    verdict = page.all("p", class_="verdict")[0].text
    assert "0.0500 nats a token higher than after as many steps of plain fine-tuning: 3.4500 against 3.4000" in verdict
    worst = next(table for table in page.all("table") if "norm" in table.all("thead")[0].text.split("loss")[0])
    assert not worst.inside("details")
    steps = [int(row.all("td")[0].text) for row in worst.all("tbody")[0].all("tr")]
    assert steps == sorted(range(12), key=lambda i: -(7 * i % 12))[:10]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"curves": {"removal": [(0, 3.5)]}}, "cannot be told without as many steps of plain fine-tuning"),
        ({"loss_after": math.nan, "gap": math.nan, "diverged_at": 7}, "diverged at step 7"),
        ({"norms_left": "mixed"}, "Norms are left in the model (mixed)"),
        ({"loss_after": 3.35, "gap": -0.05}, "0.0500 nats a token lower"),
    ],
)
def test_what_the_verdict_of_a_removal_cannot_say(changes, words):
    said = removal_verdict(removal(**changes))
    assert words in f"{said.said} {said.limits}"
    assert "nan" not in said.said
