"""results.json, removal.json and log.jsonl as objects: what is written is read, what is damaged is named."""

import json
import math
from dataclasses import fields

import pytest

from hf_lnfree.removal.results import RemovalSummary
from hf_lnfree.training.log import curve, layer_curves, read_log
from hf_lnfree.training.results import RunResults

# A file as version 0.1 wrote it, its long parts cut.
WRITTEN = {
    **{"row": "SM+R", "base_model": None, "hub_dataset": None, "eval_loss": 5.5, "eval_perplexity": 244.7},
    **{"train_loss": 5.4, "steps": 60, "diverged_at": None, "nonfinite_events": [], "tokens": 61440},
    **{"tokens_per_second": 11311.1, "train_seconds": 5.43, "resumed_at": 0, "seed": 0, "parameters": 411460},
    **{"trainable_parameters": 411472, "data": {"train": {"context_length": 128}}, "model": {"norm": "none"}},
    **{"choices": {"attn_implementation": "sdpa", "loss": "plain"}, "arguments": {"model": {"row": "SM+R"}}},
    **{"environment": {"torch": "2.13.0"}, "command": "hf-lnfree train"},
}
REMOVAL = {
    **{"model": "gpt2", "loss_before": 3.0, "loss_after": 3.2, "loss_plain": 2.9, "gap": 0.3, "norms_left": "none"},
    **{"events": [], "curves": {"removal": [[0, 3.0], [10, 3.2]], "plain": [[0, 3.0], [10, 2.9]]}, "steps": 10},
    **{"tokens": 1280, "sigma": {}, "arguments": {}, "seed": 0, "data": {}, "environment": {}, "command": "hf-lnfree"},
    **{"diverged_at": None},
}


def write(folder, values, record=RunResults):
    (folder / record.file).write_text(values if isinstance(values, str) else json.dumps(values))


def read(folder, record=RunResults):
    return json.loads((folder / record.file).read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("extra", [{}, {"lora_rank": 2, "overloaded_heads": 0.5}, {"of_my_procedure": [1, 2]}])
def test_a_file_is_read_and_written_as_it_was(tmp_path, extra):
    write(tmp_path, WRITTEN | extra)
    results = RunResults.load(tmp_path)
    assert (results.seed, results.name, results.context_length, results.diverged) == (0, "SM+R", 128, False)
    assert (results.lora_rank, results.overloaded_heads) == (extra.get("lora_rank"), extra.get("overloaded_heads"))
    assert results.more == {key: value for key, value in extra.items() if key == "of_my_procedure"}
    results.save(tmp_path)
    assert read(tmp_path) == WRITTEN | extra
    assert list(read(tmp_path))[:4] == list(WRITTEN)[:4]
    assert RunResults.load(tmp_path) == results


def test_what_is_not_finite_is_null_in_the_file_and_nan_here(tmp_path):
    gone = {"eval_loss": math.nan, "eval_perplexity": math.inf, "overloaded_heads": math.nan, "diverged_at": 5}
    RunResults.of(**WRITTEN | gone).save(tmp_path)
    assert [read(tmp_path)[key] for key in ("eval_loss", "eval_perplexity", "overloaded_heads")] == [None] * 3
    results = RunResults.load(tmp_path)
    assert all(math.isnan(x) for x in (results.eval_loss, results.overloaded_heads))
    assert results.eval_perplexity == math.inf
    assert results.collapsed_heads is None  # was not measured
    assert (results.diverged, results.base_model) == (True, None)


def test_infinities_anywhere_are_told_from_nan(tmp_path):
    curves = {"removal": [(0, 3.0), (10, math.inf)], "plain": [(0, math.nan), (10, -math.inf)]}
    events = [{"a/b~c": math.inf, "loss": math.nan}]
    summary = RemovalSummary.of(
        **REMOVAL | {"curves": curves, "events": events, "gap": -math.inf, "loss_plain": math.nan}
    )
    summary.save(tmp_path)
    assert read(tmp_path, RemovalSummary)["curves"] == {
        "removal": [[0, 3.0], [10, None]],
        "plain": [[0, None], [10, None]],
    }
    found = RemovalSummary.load(tmp_path)
    assert (found.gap, found.curves["removal"], found.curves["plain"][1]) == (
        -math.inf,
        curves["removal"],
        curves["plain"][1],
    )
    assert math.isnan(found.loss_plain)
    assert math.isnan(found.curves["plain"][0][1])
    assert found.events == [{"a/b~c": math.inf, "loss": None}]
    assert found.more == {}
    write(tmp_path, REMOVAL | {"infinite": {"/nowhere/3": "inf"}}, RemovalSummary)
    with pytest.raises(ValueError, match=r"removal\.json is damaged: its key 'infinite'"):
        RemovalSummary.load(tmp_path)


def test_files_with_nan_of_earlier_versions_are_read(tmp_path):
    write(tmp_path, json.dumps(WRITTEN | {"eval_loss": math.nan}))
    assert math.isnan(RunResults.load(tmp_path).eval_loss)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(WRITTEN)[:200], r"results\.json is damaged"),
        ("[]", r"results\.json is damaged: it holds no mapping"),
        (
            {k: v for k, v in WRITTEN.items() if k not in ("seed", "steps")},
            r"results\.json .*: it has no steps, seed",
        ),
        (None, r"holds no readable results\.json"),
    ],
)
def test_damaged_results_are_named(tmp_path, content, message):
    if content is not None:
        write(tmp_path, content)
    with pytest.raises(ValueError, match=message):
        RunResults.load(tmp_path)


@pytest.mark.parametrize("record", [RunResults, RemovalSummary])
def test_every_key_is_told_in_the_docstring(record):
    for field in fields(record):
        assert f"{field.name}:" in record.__doc__ or f"{field.name}," in record.__doc__ or field.name == "more"


def test_a_removal_that_diverged_is_told_from_one_without_a_baseline(tmp_path):
    diverged = {"loss_after": None, "gap": None, "curves": REMOVAL["curves"] | {"removal": [[0, 3.0], [10, None]]}}
    write(tmp_path, REMOVAL | diverged, RemovalSummary)
    summary = RemovalSummary.load(tmp_path)
    assert summary.loss_plain == 2.9
    assert all(map(math.isnan, (summary.loss_after, summary.gap, summary.curves["removal"][1][1])))
    summary.save(tmp_path)
    assert read(tmp_path, RemovalSummary) == REMOVAL | diverged
    alone = {"gap": None, "loss_plain": None, "curves": {"removal": [[0, 3.0]]}}
    write(tmp_path, REMOVAL | alone, RemovalSummary)
    summary = RemovalSummary.load(tmp_path)
    assert (summary.gap, summary.loss_plain) == (None, None)


def test_a_log_is_read_with_its_curves(tmp_path):
    lines = ['{"loss": 2.0, "step": 1}', '{"loss": null, "step": 2}', '{"loss": NaN, "step": 3}']
    lines += ['{"entropy/layer_01": 0.5, "entropy/layer_00": 1.5, "step": 3}']
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    entries = read_log(tmp_path)
    points = curve(entries, "loss")
    assert points[0] == (1, 2.0)
    assert [step for step, loss in points if math.isnan(loss)] == [2, 3]
    assert layer_curves(entries, "entropy") == {"": [[(3, 1.5)], [(3, 0.5)]]}
    assert layer_curves(entries, "slope") == {}


@pytest.mark.parametrize("line", ['{"loss": 2.0, "st', "[1]", ""])
def test_a_damaged_line_of_a_log_is_named(tmp_path, line):
    (tmp_path / "log.jsonl").write_text(f'{{"loss": 2.0, "step": 1}}\n{line}\n{{"loss": 2.0, "step": 3}}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl is damaged in line 2"):
        read_log(tmp_path)
    with pytest.raises(ValueError, match=r"holds no log\.jsonl"):
        read_log(tmp_path / "nowhere")
