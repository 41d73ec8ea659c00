"""Studies at a few steps: the grid, what is skipped, resumed and refused, tables, and a page that stands alone."""

import json
import math
import re
import shutil
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from filelock import FileLock
from transformers import AutoModelForCausalLM

from hf_lnfree.analysis.entropy_report import published_reports
from hf_lnfree.cli.main import main
from hf_lnfree.cli.study import DEMO
from hf_lnfree.pages.study import unfinished, write_study_report
from hf_lnfree.studies import search
from hf_lnfree.studies.cells import Cell, cells_of
from hf_lnfree.studies.comparison import compare_studies
from hf_lnfree.studies.running import run_study
from hf_lnfree.studies.search import rule
from hf_lnfree.studies.study import Study
from hf_lnfree.studies.summary import by_row, environment_of, share, summary_table
from hf_lnfree.training.log import read_log
from hf_lnfree.training.results import RunResults
from hf_lnfree.training.run import train
from tests.pages.pages import held, read

TINY = {
    "config_overrides": {"n_layer": 2, "n_embd": 32, "n_head": 2},
    "vocab_size": 300,
    "context_length": 32,
    "max_steps": 6,
    "max_validation_windows": 32,
    "logging_steps": 2,
    "probe_steps": 2,
    "eval_steps": 3,
    "save_steps": 2,
}
ROWS = ["SM+LN+G", "SM+LN+R", "SM+G", "SM+R"]


@pytest.fixture(scope="module")
def changes(corpus):
    return {**TINY, "data": str(corpus)}


@pytest.fixture(scope="module")
def local(cache_dir):
    return {"cache_dir": cache_dir, "use_cpu": True, "disable_tqdm": True}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, changes, local):
    """The demo's four rows with two seeds."""
    folder = tmp_path_factory.mktemp("study")
    study = Study.load(DEMO, changes=changes)
    cells = run_study(study, [0, 1], folder, announce=lambda text: None, **local)
    table = write_study_report(study, cells, folder)
    return folder, study, cells, table


def test_four_rows_two_seeds_and_their_checkpoints(finished):
    _, _, cells, _ = finished
    assert [(c.row, c.seed) for c in cells] == [(row, seed) for seed in (0, 1) for row in ROWS]
    for cell in cells:
        assert cell.state == "finished"
        model = AutoModelForCausalLM.from_pretrained(cell.folder)
        assert model.config.norm == ("layernorm" if "LN" in cell.row else "none")
        assert model.config.activation_function == ("gelu" if cell.row.endswith("G") else "relu")
        assert {"tokenizer.json", "log.jsonl", "choices.json", "entropy.json"} <= {
            p.name for p in cell.folder.iterdir()
        }
        assert cell.results.environment["torch"]
        assert len(cell.results.data["train"]["sha256"]) == 64
    first, second = (c.results.eval_perplexity for c in cells if c.row == "SM+G")
    assert first != second


def test_a_study_and_its_cells_show_themselves(finished):
    folder, study, cells, table = finished
    assert repr(study) == f"<Study {study.title} at the minutes scale: {', '.join(ROWS)}; seeds 0>"
    shown = cells_of(study, [0, 1, 2], folder)
    shown[1].damage = "results.json: " + 40 * "wrong "
    assert shown.verdict() == "12 cells: 7 finished, 1 not read, 4 to do."
    lines = shown.table().rows
    assert [(line[0], line[1]) for line in lines] == [(cell.row, str(cell.seed)) for cell in shown]
    assert lines[0][2:4] == ["finished", f"{cells[0].results.eval_perplexity:.2f}"]
    assert lines[0][4] == f"{100 * cells[0].entropy.overloaded():.0f} %"
    assert lines[-1][2:] == ["to do", "", "", ""]
    assert repr(cells[0]) == f"<Cell SM+LN+G, seed 0: finished, perplexity {lines[0][3]}>"
    assert repr(cells).splitlines()[0] == "8 cells: 8 finished."
    assert len(repr(cells).splitlines()) == 2 + 8
    for page, first in ((cells._repr_html_(), cells.verdict()), (table._repr_html_(), table.header[0])):
        assert re.findall(r">([^<]+)<", page)[0] == first


def test_table_shows_intervals_and_differences_paired_by_seed(finished):
    _, _, cells, table = finished
    assert [row[0] for row in table.rows] == ROWS
    assert table.rows[0][3] == ""
    assert all(re.fullmatch(r"[+-]\d+\.\d ± \d+\.\d %", row[3]) for row in table.rows[1:])
    assert "95 % interval over seeds" in table.note
    gaps = [
        c.results.eval_perplexity / d.results.eval_perplexity - 1 for c, d in zip(cells[3::4], cells[2::4], strict=True)
    ]
    assert f"Perplexity of SM+R to SM+G: {100 * sum(gaps) / 2:+.1f} ± " in table.note


def test_page_is_self_contained_and_shows_measured_beside_published(finished):
    folder, _, cells, _ = finished
    page = (folder / "report.html").read_text()
    assert re.findall(r'(?:href|src)="(?!#|data:)([^"]+)"', page) == []
    # the answer; of two seeds heat maps, three pictures of training and two of losses; published heat maps
    assert page.count("<svg") == 1 + 2 * 6 + 1
    data_hash = cells[0].results.data["train"]["sha256"]
    for words in ("SM+LN+G (measured)", "SM+LN+G (published)", "1/4 to 1/2", data_hash, "Published, GPT-2 T=128"):
        assert words in page
    assert "2.936" in page
    measured = page[page.index("What came out") :]
    assert "2.936" not in measured[: measured.index("</table>")]
    assert page.index("does ReLU win?") < page.index("<svg") < page.index("What came out")


def test_the_page_holds_every_head_at_every_probe(finished):
    folder, _, cells, _ = finished
    found = held(read(folder / "report.html"))
    assert [data["steps"] for data in found] == 2 * [[0, 2, 4, 6]]
    variants = [variant for data in found for variant in data["variants"]]
    assert [variant["name"] for variant in variants] == [cell.row for cell in cells]
    for variant, cell in zip(variants, cells, strict=True):
        probes = [entry for entry in read_log(cell.folder) if "entropy/mean" in entry]
        assert {len(layers) for layers in variant["probes"]} == {2}
        for shown, entry in zip(variant["probes"], probes, strict=True):
            for i, heads in enumerate(entry["head_entropies"]):
                assert shown[i] == pytest.approx(heads, abs=0.00501)
                assert sum(heads) / 2 == pytest.approx(entry[f"entropy/layer_{i:02d}"], abs=1e-4)
    assert found[0]["tokensAStep"] == cells[0].results.tokens / 6


def test_tables_for_papers_and_programs(finished):
    folder, _, cells, table = finished
    markdown = (folder / "table.md").read_text().splitlines()
    assert markdown[0] == "| row | seeds | perplexity | to SM+LN+G | overloaded | collapsed |"
    assert len(markdown) == 2 + 4 + 2
    latex = (folder / "table.tex").read_text()
    assert latex.count(r"\\") == 5
    assert r"$\pm$" in latex
    assert all(line.startswith("% ") for line in latex.splitlines() if re.search(r"(?<!\\)%", line))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["rows"] == table.rows
    assert [c["eval_perplexity"] for c in summary["cells"]] == [c.results.eval_perplexity for c in cells]
    assert summary["environment"] == cells[0].results.environment
    assert summary["data"]["validation"]["sha256"] == cells[0].results.data["validation"]["sha256"]


def test_a_summary_says_where_cells_were_trained(finished):
    _, _, cells, _ = finished
    moved = [Cell(cell.row, cell.seed, cell.folder).load() for cell in cells[:3]]
    moved[1].results.environment["device"] = "NVIDIA H200"
    found = environment_of(moved)
    assert found["device"] == [moved[0].results.environment["device"], "NVIDIA H200"]
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__


def test_finished_cells_are_kept_and_interrupted_ones_go_on(finished, changes, local, tmp_path, monkeypatch):
    folder, study, _, table = finished
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "SM+G" / "seed-1" / "results.json").unlink()
    shutil.rmtree(copy / "SM+G" / "seed-1" / "checkpoint-6")
    trained = []

    def counting(model, data, args, **options):
        trained.append(args.output_dir)
        return train(model, data, args, **options)

    monkeypatch.setattr("hf_lnfree.studies.running.train", counting)
    assert [c.state for c in cells_of(study, [1], copy, ["SM+G"])] == ["interrupted"]
    said = []
    finished_cells = []
    finish = lambda folder, args: finished_cells.append((folder, args.seed))  # noqa: E731
    again = run_study(study, [0, 1], copy, announce=said.append, finish=finish, **local)
    assert trained == [str(copy / "SM+G" / "seed-1")]
    assert finished_cells == [(copy / "SM+G" / "seed-1", 1)]
    assert sum("finished, found in" in line for line in said) == 7
    assert any("resumes" in line for line in said)
    assert summary_table(study, by_row(again)).rows[2][2] == table.rows[2][2]


def test_changed_settings_are_refused_with_the_difference(finished, changes, local, tmp_path):
    folder, _, cells, _ = finished
    before = (folder / "study.json").read_text()
    changed = Study.load(DEMO, changes={**changes, "learning_rate": 1e-4})
    with pytest.raises(ValueError, match=r"other settings \(.*SM\+G: learning_rate was 0.003, is 0.0001"):
        run_study(changed, [0], folder, **local)
    assert (folder / "study.json").read_text() == before
    assert [c.load().state for c in cells] == ["finished"] * 8
    run_study(changed, [0], tmp_path / "other", ["SM+R"], announce=lambda text: None, **local)


def command(folder, changes, local, *flags):
    fields = {**changes, "disable_tqdm": True}
    settings = [part for key, value in fields.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    where = ["--out", str(folder), "--cache-dir", local["cache_dir"], "--device", "cpu", "--jobs", "1"]
    return main(["study", str(DEMO), *settings, *where, *flags])


@pytest.mark.parametrize("dry", [["--dry-run"], []], ids=["dry", "real"])
@pytest.mark.parametrize("rows", ["SM+R", "SM+G"])
def test_what_is_refused_is_refused_in_a_dry_run_and_writes_nothing(finished, changes, local, capsys, dry, rows):
    """Whichever rows are chosen: the tables are of all."""
    folder, *_ = finished
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert command(folder, changes | {"learning_rate": 1e-4}, local, "--rows", rows, *dry) == 1
    assert "SM+G: learning_rate was 0.003, is 0.0001" in " ".join(capsys.readouterr().err.split())
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_cells_of_one_study_are_of_one_corpus(changes, local, corpus, tmp_path):
    own = shutil.copytree(corpus, tmp_path / "corpus")
    study = Study.load(DEMO, changes={**changes, "data": str(own), "max_steps": 1})
    run_study(study, [0], tmp_path / "out", ["SM+R"], announce=lambda text: None, **local)
    (own / "one_more.py").write_text("x = 1\n" * 200)
    with pytest.raises(ValueError, match=r"The data of .*seed-0 has changed since \(train_sha256 was"):
        run_study(study, [0], tmp_path / "out", ["SM+R", "SM+G"], announce=lambda text: None, **local)
    assert not list((tmp_path / "out").glob("SM+G/seed-0/*.json"))


@pytest.mark.parametrize("names", [("results.json", "log.jsonl"), ("entropy.json", "run.json")], ids=str)
def test_damaged_cells_are_told_and_the_others_go_on(finished, changes, local, tmp_path, capsys, names):
    copy = shutil.copytree(finished[0], tmp_path / "copy")
    paths = {row: copy / row / "seed-0" / name for row, name in zip(("SM+LN+G", "SM+R"), names, strict=True)}
    for path in paths.values():
        path.write_text(path.read_text()[:30])
    assert command(copy, changes, local) == 1
    printed, page = " ".join(capsys.readouterr().out.split()), (copy / "report.html").read_text()
    assert printed.count(": finished, found in") == 2
    for row, path in paths.items():
        assert f"{row}, seed 0: not read: {path} " in printed
        assert f"{row}, seed 0: not read" in page


def test_a_folder_of_something_else_is_refused(finished, changes, local, tmp_path, capsys):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "main.py").write_text("")
    for folder, holds in ((tmp_path / "project", "main.py"), (finished[0] / "SM+G" / "seed-0", "README.md")):
        before = sorted(folder.iterdir())
        for flags in ([], ["--search", "relu,gelu", "--rows", "SM+G", "--budget", "99"]):
            assert command(folder, changes, local, *flags) == 1
            assert "is not empty and holds no study" in " ".join(capsys.readouterr().err.split())
        assert sorted(folder.iterdir()) == before, holds


def test_a_row_may_be_added_and_others_left_out(finished, changes, local):
    folder, study, _, _ = finished
    wider = Study(study.title, {**study.rows, "SM+LeakyR": {**study.rows["SM+R"], "row": "SM+LeakyR"}})
    cells = run_study(wider, [0], folder, ["SM+LeakyR"], announce=lambda text: None, **local)
    assert [(c.row, c.state) for c in cells] == [("SM+LeakyR", "finished")]
    assert set(json.loads((folder / "study.json").read_text())["rows"]) == {*ROWS, "SM+LeakyR"}
    shutil.rmtree(folder / "SM+LeakyR")


def test_a_cell_that_another_process_trains_is_passed_over(changes, local, tmp_path):
    study = Study.load(DEMO, changes=changes)
    busy = tmp_path / "SM+G" / "seed-0"
    busy.mkdir(parents=True)
    with FileLock(busy / ".lock"):
        cells = run_study(study, [0], tmp_path, ["SM+G", "SM+R"], announce=lambda text: None, **local)
    assert [c.state for c in cells] == ["in another process", "finished"]
    assert unfinished(cells) == "Not in the tables: SM+G, seed 0: in another process."


def test_a_cell_that_another_process_has_just_finished_is_kept(finished, changes, local, tmp_path, monkeypatch):
    """It finishes, and drops the checkpoint that was there, between a look at the cell and its lock."""

    @contextmanager
    def after_the_other(args):
        shutil.copytree(done, args.output_dir)
        yield

    done = finished[0] / "SM+R" / "seed-0"
    monkeypatch.setattr("hf_lnfree.studies.running.only_run", after_the_other)
    said: list[str] = []
    (cell,) = run_study(Study.load(DEMO, changes=changes), [0], tmp_path, ["SM+R"], said.append, **local)
    assert said == ["[1/1] SM+R, seed 0: finished"]
    assert cell.results == RunResults.load(done)


def test_a_diverged_cell_is_recorded_and_the_others_go_on(changes, local, tmp_path, capsys):
    path = tmp_path / "study.yaml"
    rows = {"wild": {"row": "SM+G", "learning_rate": 1e6, "max_grad_norm": 0.0}, "calm": {"row": "SM+LN+G"}}
    shared = {**changes, "max_steps": 30, "weight_decay": 0.1}
    path.write_text(yaml.safe_dump({**shared, "rows": rows}, sort_keys=False))
    flags = ["--out", str(tmp_path / "out"), "--cache-dir", local["cache_dir"], "--device", "cpu", "--jobs", "1"]
    assert main(["study", str(path), *flags]) == 3
    printed = capsys.readouterr().out
    assert re.search(r"wild, seed 0 diverged at step \d+: see .*flight_recorder.json", printed)
    study = Study.load(path)
    wild, calm = cells_of(study, [0], tmp_path / "out")
    assert calm.state == "finished"
    assert wild.state == f"diverged at step {wild.results.diverged_at}"
    assert math.isnan(wild.results.eval_perplexity)
    table = summary_table(study, by_row([wild, calm]))
    assert table.rows[0][0] == "wild (diverged: seed 0)"
    assert table.rows[0][2] == "not finite"
    assert table.rows[1][3] == "not finite"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "wild (diverged: seed 0)" in page
    written = [*(tmp_path / "out").glob("*.json"), *(tmp_path / "out").glob("*/seed-0/*.json")]
    assert {"study.json", "summary.json", "results.json"} <= {path.name for path in written}
    for file in written:
        json.loads(file.read_text(), parse_constant=pytest.fail)
    for cell in (wild, calm):  # the command finishes what it trains
        assert {"README.md", "entropy.svg"} <= {path.name for path in cell.folder.iterdir()}
    assert wild.results.nonfinite_events[0]["verdict"] in page


def test_two_studies_compare_over_their_common_seeds(finished, changes, local, tmp_path, capsys):
    folder, _, cells, _ = finished
    other = Study.load(DEMO, changes={**changes, "learning_rate": 1e-2})
    run_study(other, [1, 2], tmp_path / "faster", ["SM+R", "SM+G"], announce=lambda text: None, **local)
    table = compare_studies(folder, tmp_path / "faster")
    assert [row[0] for row in table.rows] == ["SM+G", "SM+R"]
    before = next(c for c in cells if (c.row, c.seed) == ("SM+G", 1)).results.eval_perplexity
    after = cells_of(other, [1], tmp_path / "faster", ["SM+G"])[0].results.eval_perplexity
    assert table.rows[0][3] == f"{100 * (after / before - 1):+.1f} % (1 seed)"
    assert "do not compare" not in table.note
    assert main(["compare", str(folder), str(tmp_path / "faster"), "--out", str(tmp_path / "out")]) == 0
    assert "SM+R" in (tmp_path / "out" / "comparison.tex").read_text()
    with pytest.raises(ValueError, match="holds no finished cell of a study"):
        compare_studies(folder, tmp_path / "out")


def test_report_of_what_activations_learn(changes, local, tmp_path):
    path = tmp_path / "study.yaml"
    rows: dict = {scope: {"row": f"SM+LearnableR-{scope}"} for scope in ("layer", "global")}
    rows["mix"] = {
        "row": "SM+R",
        "config_overrides": {**changes["config_overrides"], "activation_function": "gelu_relu"},
    }
    path.write_text(yaml.safe_dump({**changes, "max_steps": 2, "rows": rows}, sort_keys=False))
    study = Study.load(path)
    cells = run_study(study, [0], tmp_path / "out", announce=lambda text: None, **local)
    write_study_report(study, cells, tmp_path / "out")
    assert "Learnable slopes." in (tmp_path / "out" / "report.html").read_text()
    assert cells[0].curve("slope/layer_01")
    assert cells[1].curve("slope/global")
    assert cells[2].curve("gelu_share/layer_01")[0] == (0, pytest.approx(0.5))
    of_layer, _, of_mix = written = json.loads((tmp_path / "out" / "summary.json").read_text())["cells"]
    assert [set(cell["layers"]) for cell in written] == [{"entropy", "slope"}, {"entropy"}, {"entropy", "gelu_share"}]
    slopes = [cells[0].curve(f"slope/layer_0{i}") for i in range(2)]
    assert of_layer["layers"]["slope"] == [slope[-1][1] for slope in slopes]
    means = [[step, pytest.approx((one + other) / 2)] for (step, one), (_, other) in zip(*slopes, strict=True)]
    assert of_layer["over_training"] == {"slope": means}
    assert of_mix["over_training"]["gelu_share"][0] == [0, pytest.approx(0.5)]


def test_dry_run_tells_the_state_of_every_cell(finished, changes, capsys):
    folder, *_ = finished
    settings = [part for key, value in changes.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    flags = ["--out", str(folder), "--seeds", "0,2", "--rows", "SM+R", "--dry-run"]
    assert main(["study", str(DEMO), *settings, *flags]) == 0
    assert capsys.readouterr().out.splitlines() == ["SM+R, seed 0: finished", "SM+R, seed 2: to do"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("title: x", "`rows` must map names"),
        ("rows: {a: {row: SM+G, no_such_field: 1}}", "row a has unknown fields: no_such_field"),
        ("rows: {a: nowhere.yaml}", "There is no configuration file .*nowhere.yaml"),
        ("rows: {a: {row: SM+X}}", "'SM\\+X' is not known"),
        ("rows: {a: {row: SM+G}}\ncompare: [[a, b]]", "compares rows that it does not have: b"),
        ("rows: {a: {row: SM+G}}\npublished: mine", "published='mine' is not known: GPT-2 T=128"),
        ("rows: [", "is not YAML"),
        ("rows: {../../evil: {row: SM+G}}", "the row '../../evil' becomes a folder"),
        ("rows: {..: {row: SM+G}}", "becomes a folder"),
    ],
)
def test_wrong_studies_say_what_is_wrong(tmp_path, content, message):
    path = tmp_path / "study.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        Study.load(path)


def test_scales_win_over_files_of_rows_and_changes_over_all(tmp_path):
    (tmp_path / "row.yaml").write_text("row: SM+G\nconfig_overrides: {n_layer: 4, n_head: 2}\nmax_steps: 10\n")
    (tmp_path / "small.yaml").write_text("max_steps: 5\nvocab_size: 399\n")
    path = tmp_path / "study.yaml"
    path.write_text(
        "seed: 3\nrows: {a: row.yaml, b: {base: row.yaml, max_steps: 7}}\nscales:\n  paper: {}\n"
        "  cpu: {base: small.yaml, vocab_size: 377, config_overrides: {n_layer: 1}}\n"
    )
    paper, cpu = Study.load(path), Study.load(path, "cpu", {"learning_rate": 0.5})
    assert (paper.scale, paper.rows["a"]["max_steps"]) == ("paper", 10)
    assert cpu.rows["a"] == {
        **{"seed": 3, "row": "SM+G", "max_steps": 5, "vocab_size": 377, "learning_rate": 0.5},
        "config_overrides": {"n_layer": 1, "n_head": 2},
    }
    assert cpu.rows["b"] == cpu.rows["a"] | {"max_steps": 7}  # what stands in the row itself wins over the scale
    model, data, training = cpu.arguments("a", 9, tmp_path / "cell", use_cpu=True)
    assert (model.overrides, data.vocab_size, training.seed) == ({"n_layer": 1, "n_head": 2}, 377, 9)
    with pytest.raises(ValueError, match=r"no scale 'gpu'. It has: paper, cpu"):
        Study.load(path, "gpu")
    with pytest.raises(ValueError, match=r"no row c. It has: a, b"):
        cells_of(paper, [0], tmp_path, ["c"])


def test_training_arguments_of_a_cell_hold_its_seed(finished):
    folder, *_ = finished
    assert torch.load(folder / "SM+G" / "seed-1" / "training_args.bin", weights_only=False).seed == 1


def test_factors_multiply_rows(tmp_path):
    path = tmp_path / "study.yaml"
    shared = {"family": "gpt2", "config_overrides": {"n_layer": 2}}
    factors = {"norm": ["none", "dyt"], "slope_weight_decay": [None, 0.1]}
    path.write_text(
        yaml.safe_dump({**shared, "rows": {"G": {"row": "SM+G"}, "R": {"row": "SM+R"}}, "factors": factors})
    )
    rows = Study.load(path).rows
    assert len(rows) == 8
    chosen = rows["R norm=dyt, slope_weight_decay=0.1"]
    assert chosen["row"] == "SM+R"
    assert chosen["config_overrides"] == {"n_layer": 2, "norm": "dyt"}
    assert chosen["slope_weight_decay"] == 0.1
    path.write_text(yaml.safe_dump({**shared, "row": "SM+G", "factors": {"layer_activations": ["relu:0,gelu:1"]}}))
    assert list(Study.load(path).rows) == ["layer_activations=relu:0,gelu:1"]
    sizes = {"one": {"max_steps": 7, "config_overrides": {"n_layer": 1}}, "two": {"config_overrides": {"n_layer": 2}}}
    together = {"size": sizes, "norm": ["none", "dyt"]}
    several = {**shared, "rows": {"G": {"row": "SM+G"}}, "factors": together}
    path.write_text(yaml.safe_dump(several, sort_keys=False))
    rows = Study.load(path).rows
    assert list(rows) == [f"G size={size}, norm={norm}" for size in sizes for norm in ("none", "dyt")]
    assert rows["G size=one, norm=dyt"]["max_steps"] == 7
    assert rows["G size=one, norm=dyt"]["config_overrides"] == {"n_layer": 1, "norm": "dyt"}
    assert rows["G size=two, norm=none"]["config_overrides"]["n_layer"] == 2
    path.write_text(yaml.safe_dump({**shared, "factors": {"size": {"one": 3}}}))
    with pytest.raises(ValueError, match="the factor size must map one to fields, got 3"):
        Study.load(path)
    path.write_text(yaml.safe_dump({**shared, "factors": {"norm": "dyt"}}))
    with pytest.raises(ValueError, match="the factor norm must be a list of values"):
        Study.load(path)


def test_a_search_halves_its_candidates_and_goes_on(tmp_path, changes, local, cache_dir, capsys):
    path = tmp_path / "study.yaml"
    small = {**changes, "config_overrides": {"n_layer": 3, "n_embd": 32, "n_head": 2}, "row": "SM+G", "save_steps": 50}
    path.write_text(yaml.safe_dump({"rows": {"SM+G": {}}, **small, "attention_report_windows": 8}))
    command = ["study", str(path), "--search", "relu,gelu", "--budget", "24", "--cache-dir", cache_dir]
    command += ["--device", "cpu", "--out", str(tmp_path / "search"), "--set", "disable_tqdm=true"]
    assert main(command) == 0
    found = json.loads((tmp_path / "search" / "search.json").read_text())
    assert [(rung["steps"], len(rung["losses"])) for rung in found["rungs"]] == [(3, 4), (6, 2)]
    assert {"relu:0-2", "gelu:0-2"} <= set(found["rungs"][0]["losses"])
    first = min(found["rungs"][0]["losses"], key=found["rungs"][0]["losses"].get)
    assert first in found["rungs"][1]["losses"]
    assert found["layer_activations"] == min(found["rungs"][1]["losses"], key=found["rungs"][1]["losses"].get)
    most = found["order"][0]  # of the candidates with one ReLU, that of the most overloaded layer
    alone = next(c for c in found["rungs"][0]["losses"] if sum("relu" in part for part in expand(c)) == 1)
    assert expand(alone)[most] == "relu"
    assert f'layer_activations: "{found["layer_activations"]}"' in capsys.readouterr().out
    assert main(command) == 0  # every cell is there
    again = json.loads((tmp_path / "search" / "search.json").read_text())
    assert again["rungs"] == found["rungs"]
    for wrong, message in (
        (["--search", "relu"], "two activations"),
        (["--budget", "3"], "take a budget of 8 or more"),
        (["--dry-run"], "found on the way"),
        (["--rows", "SM"], "The study has no row SM. It has: SM+G"),
    ):
        assert main([*command, *wrong]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("layers", [1, 2, 4, 6, 8, 12])
def test_a_search_stays_within_its_budget(layers, tmp_path, monkeypatch):
    """Whatever the number of layers: rungs are counted, not trained."""
    spent = []

    def counted(study, seeds, folder, rows, announce, finish, jobs, **local):
        spent.extend(folder / f"{row}-{study.rows[row]['max_steps']}" for row in rows)
        report = SimpleNamespace(entropy=torch.rand(layers, 2), bound=torch.ones(layers, 2))
        results = SimpleNamespace(eval_loss=1.0)
        return [SimpleNamespace(row=row, results=results, entropy=report, folder=folder) for row in rows]

    monkeypatch.setattr(search, "run_study", counted)
    fields = {"row": "SM+G", "config_overrides": {"n_layer": layers, "n_embd": 32, "n_head": 2}, "use_cpu": True}
    search.search_layers(Study("", {"SM+G": fields}), ["relu", "gelu"], 1000, [0], tmp_path, announce=lambda text: None)
    steps = sum(int(cell.name.rpartition("-")[2]) for cell in set(spent))  # what rung 0 begins with is trained once
    assert 500 < steps <= 1000


def test_a_search_begins_with_the_layers_that_are_overloaded(tmp_path, monkeypatch):
    """By the model of the second activation, whose heads are nearest to the maximum in layers 2, 0, 3, 1."""
    shares = {"gelu:0-3": [0.6, 0.1, 0.9, 0.4], "relu:0-3": [0.1, 0.2, 0.3, 0.4]}
    rungs = []

    def told(study, seeds, folder, rows, announce, finish, jobs, **local):
        rungs.append(list(rows))
        for row in rows:
            entropy = 5.0 * torch.tensor(shares.get(row, [0.5] * 4))[:, None]
            report = SimpleNamespace(entropy=entropy, bound=torch.full((4, 1), 5.0))
            results = SimpleNamespace(eval_loss=float(len(row)))
            yield SimpleNamespace(row=row, results=results, entropy=report, folder=folder)

    monkeypatch.setattr(search, "run_study", lambda *args, **options: list(told(*args, **options)))
    fields = {"row": "SM+G", "config_overrides": {"n_layer": 4, "n_embd": 32, "n_head": 2}, "use_cpu": True}
    study = Study("", {"SM+G": fields})
    found = search.search_layers(study, ["relu", "gelu"], 1000, [0], tmp_path, announce=lambda text: None)
    assert found["order"] == [2, 0, 3, 1]
    expected = [
        "gelu:0-3",
        "gelu:0-1,relu:2,gelu:3",
        "relu:0,gelu:1,relu:2,gelu:3",
        "relu:0,gelu:1,relu:2-3",
        "relu:0-3",
    ]
    assert rungs[1] == expected


def test_shares_of_a_table_are_of_the_bound_on_the_data():
    """Where no head is near it, none is overloaded, though one is always the largest that was observed."""
    report = published_reports()["SM+LN+G"]
    low = replace(report, entropy=report.bound * torch.linspace(0.3, 0.7, 12).expand(12, 12))
    assert low.overloaded("observed") > 0.3
    cells = [SimpleNamespace(entropy=low)]
    assert (share(cells, "overloaded"), share(cells, "collapsed")) == ("0 %", "0 %")
    high = [SimpleNamespace(entropy=replace(report, entropy=report.bound * 0.8))]
    assert share(high, "overloaded") == "100 %"


def expand(text):
    from hf_lnfree.models.configuration_lnfree import expand_rule

    return expand_rule("layer_activations", text, 3)


def test_rules_are_the_shortest():
    assert rule(["relu", "relu", "gelu", "relu"]) == "relu:0-1,gelu:2,relu:3"
    assert rule(["gelu"]) == "gelu:0"
