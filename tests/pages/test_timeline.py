"""Every head over training in the page of a study: what it holds, how large it is, and what a browser shows of it."""

import math
import random
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hf_lnfree.analysis.entropy_report import published_reports
from hf_lnfree.pages.report import Choice, Section, write_report
from hf_lnfree.pages.study import write_study_report
from hf_lnfree.pages.timeline import head_timeline
from hf_lnfree.studies.cells import Cell
from hf_lnfree.studies.study import Study
from tests.browser import TEXT, Browser, find_browser
from tests.pages.pages import held, read

ROWS = ["SM+LN+G", "SM+LN+R", "SM+G", "SM+R"]
SAMPLED = ("entropy", "residual_rms", "sparsity")
BOUND = sum(math.log(i) for i in range(1, 129)) / 128


def cell(row, seed, steps, layers=3, heads=4, tokens=1000, report=True):
    """A cell that was probed at these steps: at step s, head h of layer l is at 4 - l / 4 - h / 8 - s / 1000 nats."""
    probes = [
        {"step": s, "head_entropies": [[4 - i / 4 - h / 8 - s / 1000 for h in range(heads)] for i in range(layers)]}
        for s in steps
    ]
    results = SimpleNamespace(tokens=tokens * max(steps, default=0), steps=max(steps, default=0))
    entropy = SimpleNamespace(
        bound=torch.full((layers, heads), BOUND), heads=torch.ones(layers, heads).bool(), parts={"h.*.attn": []}
    )
    return Cell(row, seed, None, results=results, entropy=entropy if report else None, log=probes)


def write(path, cells_of_seed):
    options = {str(seed): [head_timeline(cells, seed)] for seed, cells in cells_of_seed.items()}
    write_report(path, "Title", "", [Section("Heads", [Choice("seed", options)])])
    return path


def test_a_page_holds_what_was_recorded(tmp_path):
    cells = {row: cell(row, 0, [0, 50, 100]) for row in ("SM+G", "</script><b>")}
    cells["SM+G"].log[1]["head_entropies"][2][1] = math.nan
    page = read(write(tmp_path / "report.html", {0: cells}))
    (data,) = held(page)
    assert data["steps"] == [0, 50, 100]
    assert data["tokensAStep"] == 1000
    assert data["bound"] == pytest.approx(BOUND)
    for variant, (name, found) in zip(data["variants"], cells.items(), strict=True):
        assert variant["name"] == name
        for shown, entry in zip(variant["probes"], found.log, strict=True):
            for layer, expected in zip(shown, entry["head_entropies"], strict=True):
                assert layer == pytest.approx(expected, abs=0.00501, nan_ok=True)
    (slider,) = page.all("input")
    assert slider.attributes == {"type": "range", "min": "0", "max": "2", "value": "2"}
    assert slider.parent.tag == "label"
    (figure,) = page.all("figure")
    assert "hidden" in figure.attributes  # the script shows it: without JavaScript it would be empty


def test_a_variant_that_stopped_early_has_no_probes_after_that():
    found = head_timeline({"SM+G": cell("SM+G", 0, [0, 50, 100]), "SM+R": cell("SM+R", 0, [0, 50])}, 0)
    assert found.data["steps"] == [0, 50, 100]
    assert [probe is None for probe in found.data["variants"][1]["probes"]] == [False, False, True]
    assert found.data["variants"][0]["colour"] != found.data["variants"][1]["colour"]


def test_without_two_probes_there_is_no_slider():
    """A run without probes, one that logged the means of layers alone, and one that was probed once."""
    for steps in ([], [100]):
        assert head_timeline({"SM+G": cell("SM+G", 0, steps)}, 0) is None
    older = replace(
        cell("SM+G", 0, []), log=[{"step": s, "entropy/mean": 2.0, "entropy/layer_00": 2.0} for s in (0, 9)]
    )
    assert head_timeline({"SM+G": older}, 0) is None


def test_tokens_are_told_only_where_they_are_the_same_for_all():
    cells = {"SM+G": cell("SM+G", 0, [0, 50]), "SM+R": cell("SM+R", 0, [0, 50], tokens=2000)}
    assert head_timeline(cells, 0).data["tokensAStep"] is None
    assert head_timeline({"SM+G": cell("SM+G", 0, [0, 50], report=False)}, 0).data["bound"] is None


LAYERS, HEADS, PROBES = 12, 12, 50


def trained(row, seed, folder, rng):
    """A cell with everything that a page draws, of random numbers, which no curve can be simplified for."""
    log = []
    for step in range(0, 100 * PROBES, 100):
        heads = [[rng.uniform(0, BOUND) for _ in range(HEADS)] for _ in range(LAYERS)]
        means = {f"{key}/layer_{i:02d}": rng.random() for key in SAMPLED for i in range(LAYERS)}
        log.append({"step": step, "entropy/mean": 2.0, "head_entropies": heads, **means})
        log += [{"step": step, "loss": rng.random()}, {"step": step, "eval_loss": rng.random()}]
    kept = {key: {} for key in ("parameters", "choices", "model", "arguments", "environment", "data")}
    results = SimpleNamespace(
        **{"eval_perplexity": 9 + rng.random(), "eval_loss": 2.0, "tokens": 10**7, "tokens_per_second": 1.0},
        **{"steps": 5000, "diverged": False, "diverged_at": None, "nonfinite_events": [], "command": "", **kept},
        **{
            "overloaded_heads": 0.5,
            "collapsed_heads": 0.1,
            "parameters_outside_embeddings": None,
            "measure": "perplexity",
            "score": 10.0,
        },
    )
    entropy = replace(published_reports()[row], source="measured")
    return Cell(row, seed, folder, results=results, entropy=entropy, log=log)


def test_four_variants_with_five_seeds_fit_into_a_page_that_can_be_sent(tmp_path):
    """Drawn with two seeds; three more are as large as the first, which stands before the second in every choice."""
    rng = random.Random(0)
    cells = [trained(row, seed, tmp_path, rng) for row in ROWS for seed in (0, 1)]
    write_study_report(Study("Large", {row: {} for row in ROWS}), cells, tmp_path)
    found = held(read(tmp_path / "report.html"))
    assert [len(data["variants"]) for data in found] == [4, 4]
    variants = [variant for data in found for variant in data["variants"]]
    for shown, one in zip(variants, cells[::2] + cells[1::2], strict=True):
        assert shown["name"] == one.row
        recorded = [entry["head_entropies"] for entry in one.log if "head_entropies" in entry]
        assert torch.tensor(shown["probes"]).shape == (PROBES, LAYERS, HEADS)
        assert (torch.tensor(shown["probes"]) - torch.tensor(recorded)).abs().max() < 0.00501
    page = (tmp_path / "report.html").read_bytes()
    first = re.findall(rb'data-option="0">(.*?)data-option="1">', page, re.DOTALL)
    assert len(first) == 3
    assert len(page) + 3 * sum(map(len, first)) < 1_950_000


def press(browser, key, code):
    for kind in ("keyDown", "keyUp"):
        browser.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)


@pytest.mark.skipif(find_browser() is None, reason="needs a Chromium on the path, or named by CHROME")
def test_a_slider_moves_the_maps_and_a_head_has_its_curve(tmp_path):
    seeds = {
        0: {"SM+G": cell("SM+G", 0, [0, 50, 100]), "SM+R": cell("SM+R", 0, [0, 50])},
        1: {"SM+G": cell("SM+G", 1, [0, 50, 100])},
    }
    page = write(tmp_path / "report.html", seeds)
    with Browser(find_browser(), str(tmp_path / "profile")) as browser:
        browser.send("Page.navigate", url=page.as_uri())
        browser.wait_for(f"document.body && {TEXT}.includes('step 100, 0.10M tokens')")
        said = "[...document.querySelectorAll('.said')].map(each => each.textContent)"
        assert browser.ask(said) == ["At step 100, layer 0, head 0: SM+G 3.90 nats."] * 2
        browser.ask("document.querySelector('input[type=range]').focus()")
        for kind in ("keyDown", "keyUp"):
            browser.send(
                "Input.dispatchKeyEvent", type=kind, key="ArrowLeft", code="ArrowLeft", windowsVirtualKeyCode=37
            )
        browser.wait_for(f"{TEXT}.includes('step 50, 0.05M tokens')")
        assert browser.ask(said)[0] == "At step 50, layer 0, head 0: SM+G 3.95 nats, SM+R 3.95 nats."
        browser.ask("document.querySelectorAll('.maps svg')[1].querySelectorAll('[role=button]')[6].focus()")
        assert browser.ask(said)[0] == "At step 50, layer 1, head 2: SM+G 3.45 nats, SM+R 3.45 nats."
        for kind in ("keyDown", "keyUp"):
            browser.send(
                "Input.dispatchKeyEvent", type=kind, key="ArrowDown", code="ArrowDown", windowsVirtualKeyCode=40
            )
        assert browser.ask(said)[1] == "At step 50, layer 2, head 2: SM+G 3.20 nats."  # of the seed that is not shown
        paths = browser.ask("[...document.querySelectorAll('.curve')].map(each => each.getAttribute('d'))")
        assert [len(path.split("L")) for path in paths] == [3, 2, 3]
        cells = "[...document.querySelectorAll('.maps svg')[0].querySelectorAll('[role=button]')]"
        assert browser.ask(f"{cells}[4].textContent") == "layer 1, head 0: 3.70 nats"
        assert browser.ask(f"{cells}.filter(each => each.tabIndex === 0).length") == 1  # one stop of the Tab key a map
        fill = f"{cells}[11].getAttribute('fill')"
        low = browser.ask(fill)
        assert browser.ask(f"{cells}[0].getAttribute('fill')") == "rgb(253,231,37)"  # the largest that is possible
        browser.ask(f"{cells}[0].closest('figure').querySelector('input').value = 0")
        browser.ask("document.querySelector('input').dispatchEvent(new Event('input'))")
        assert browser.ask(fill) != low
        names = browser.ask("[...document.querySelectorAll('.maps .name')].map(each => each.textContent)")
        assert names == ["SM+G", "SM+R", "layer 2, head 2", "SM+G", "layer 2, head 2"]
        browser.ask("(s => { s.value = 2; s.dispatchEvent(new Event('input')) })(document.querySelector('input'))")
        assert browser.ask("document.querySelectorAll('.maps .name')[1].textContent") == "SM+R: not probed at this step"
        assert browser.problems == []
        assert browser.requests == [page.as_uri()]
