"""The demo at a few steps: four rows, a table, a page that needs nothing from outside."""

import json
import re
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_lnfree.training.demo import DemoSettings, run_demo
from hf_lnfree.training.demo_report import summary_table

SETTINGS = replace(DemoSettings(), n_layer=2, n_embd=32, n_head=2, vocab_size=512, steps=6, validation_windows=32)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache_dir):
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_demo(folder, [0, 1], settings=SETTINGS, cache_dir=cache_dir, use_cpu=True)


def test_four_rows_and_their_checkpoints(runs):
    folder, done = runs
    assert [(r.row, r.seed) for r in done] == [
        (row, seed) for seed in (0, 1) for row in ("SM+LN+G", "SM+LN+R", "SM+G", "SM+R")
    ]
    for run in done:
        model = AutoModelForCausalLM.from_pretrained(folder / run.row / f"seed-{run.seed}")
        assert model.config.norm == ("layernorm" if "LN" in run.row else "none")
        assert model.config.activation_function == ("gelu" if run.row.endswith("G") else "relu")
    first, second = (r.results["eval_perplexity"] for r in done if r.row == "SM+G")
    assert first != second


def test_table_shows_differences_paired_by_seed(runs):
    table = summary_table(runs[1])
    assert table.rows[0][0] == "SM+LN+G"
    assert table.rows[0][2] == ""
    assert all(re.fullmatch(r"[+-]\d+\.\d ± \d+\.\d %", row[2]) for row in table.rows[1:])
    assert "95 % interval over 2 seeds" in table.note
    assert re.search(r"ReLU \(SM\+R\) to that of GELU \(SM\+G\): [+-]\d+\.\d ± \d+\.\d %\.", table.note)


def test_page_is_self_contained_and_shows_measured_beside_published(runs):
    page = (runs[0] / "report.html").read_text()
    assert re.findall(r'(?:href|src)="(?!#|data:)([^"]+)"', page) == []
    assert page.count("<svg") == 4
    data_hash = runs[1][0].results["data"]["train"]["sha256"]
    for words in ("SM+LN+G (measured)", "SM+LN+G (published)", "max/4..max/2", data_hash):
        assert words in page
    assert "4.086" in page  # a published perplexity


def test_finished_rows_are_found_again(runs, cache_dir, monkeypatch):
    def forbidden(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr("hf_lnfree.training.demo.train", forbidden)
    folder, done = runs
    again = run_demo(folder, [0, 1], settings=SETTINGS, cache_dir=cache_dir, use_cpu=True)
    assert summary_table(again).rows == summary_table(done).rows
    assert json.loads((folder / "summary.json").read_text())["rows"] == summary_table(done).rows
    with pytest.raises(ValueError, match="other settings"):
        run_demo(folder, [0], settings=replace(SETTINGS, steps=7), cache_dir=cache_dir, use_cpu=True)
    assert torch.load(folder / "SM+G" / "seed-0" / "training_args.bin", weights_only=False).seed == 0


def test_a_diverged_row_is_shown_as_such(tmp_path, cache_dir):
    settings = replace(SETTINGS, learning_rate=1e6, steps=30)
    done = run_demo(tmp_path, [0], rows=("SM+LN+G", "SM+G"), settings=settings, cache_dir=cache_dir, use_cpu=True)
    table = summary_table(done)
    name, perplexity, gap, *_ = table.rows[1]
    assert name == "SM+G (diverged: seed 0)"
    assert perplexity == "nan"
    assert gap == "+nan %"
    assert "diverged: seed 0" in (tmp_path / "report.html").read_text()
