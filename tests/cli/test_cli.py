"""The command line: exit codes, one-line errors, and each command end to end at a tiny size."""

import io
import json

import pytest
import torch
import transformers
from rich.console import Console
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

import hf_lnfree
from hf_lnfree.cli.main import main
from hf_lnfree.cli.study import rich_table
from hf_lnfree.cli.train import parse_arguments
from hf_lnfree.errors import SettingsError
from hf_lnfree.models.errors import ConfigurationError
from hf_lnfree.tables import Table

TINY = "{n_layer: 2, n_embd: 32, n_head: 2, n_positions: 32}"


@pytest.fixture
def yaml_file(corpus, cache_dir, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"row: SM+G\nconfig_overrides: {TINY}\ndata: {corpus}\ncache_dir: {cache_dir}\nvocab_size: 300\n"
        "context_length: 32\nmax_steps: 4\nlearning_rate: 1e-3\nprobe_steps: 2\nlogging_steps: 2\nsave_strategy: 'no'\n"
        "device: cpu\ndisable_tqdm: true\n"
    )
    return path


def test_flags_win_over_the_file_and_text_becomes_numbers(yaml_file):
    model, data, training = parse_arguments([str(yaml_file), "--learning-rate", "2e-3", "--row", "SM+R"])
    assert (model.row, training.learning_rate, data.vocab_size) == ("SM+R", 2e-3, 300)
    assert parse_arguments([str(yaml_file)])[2].learning_rate == 1e-3
    assert model.overrides == {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 32}


def test_train_then_entropy(yaml_file, corpus, tmp_path, capsys):
    folder = tmp_path / "out"
    assert main(["train", str(yaml_file), "--out", str(folder)]) == 0
    assert "SM+G: eval perplexity" in capsys.readouterr().out
    data = ["--data", str(corpus), "--context-length", "32"]
    assert main(["entropy", str(folder), str(folder), *data, "--out", str(tmp_path / "e"), "--max-windows", "6"]) == 0
    out = capsys.readouterr().out
    assert "mean attention entropy in nats (measured)" in out
    assert "0 of 4 heads moved (simultaneous 95 % interval, paired by sequence)" in out
    report = json.loads(next((tmp_path / "e").glob("*.json")).read_text())
    assert f"{report['entropy'][1][1]:.2f}" in out
    names = {path.name for path in (tmp_path / "e").iterdir()}
    pictures = {"heatmaps", "differences", "distributions", "positions", "buckets"}
    assert {f"{name}.{suffix}" for name in pictures for suffix in ("svg", "png")} | {"report.html"} <= names
    one_file = [*data[2:], "--data", str(next(corpus.glob("*.py"))), "--maximum", "2.5", "--method", "attentions"]
    assert main(["entropy", str(folder), *one_file]) == 0
    assert "heads by quarter of 2.50 nats (2.5)" in capsys.readouterr().out


def test_entropy_of_other_families(corpus, tmp_path, yaml_file, capsys):
    """Encoders, and a decoder beside an encoder: any checkpoint of AutoModel with a tokenizer."""
    assert main(["train", str(yaml_file), "--out", str(tmp_path / "out")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": 1}
    bert = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    t5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    BertForMaskedLM(BertConfig(**sizes, **bert)).save_pretrained(tmp_path / "bert")
    T5ForConditionalGeneration(T5Config(**sizes, **t5)).save_pretrained(tmp_path / "t5")
    for name in ("bert", "t5"):
        tokenizer.save_pretrained(tmp_path / name)
    capsys.readouterr()
    data = ["--data", str(corpus), "--context-length", "16", "--max-windows", "4", "--out", str(tmp_path / "e")]
    models = [str(tmp_path / name) for name in ("out", "bert", "t5")]
    assert main(["entropy", *models, *data]) == 0
    out = capsys.readouterr().out
    assert "bert against out" in out
    assert "t5 against out" in out
    assert "other layers or heads" in out  # six attention modules against two
    assert main(["entropy", models[1], *data, "--maximum", "large"]) == 1
    assert "--maximum must be one of" in capsys.readouterr().err


def test_norms_out_of_a_trained_model_and_what_it_becomes(yaml_file, corpus, cache_dir, tmp_path, capsys):
    """The way of a user: train with LayerNorm, remove it, attribute a logit, hand the model on."""
    norms, free = tmp_path / "norms", tmp_path / "free"
    assert main(["train", str(yaml_file), "--row", "SM+LN+R", "--out", str(norms)]) == 0
    settings = tmp_path / "removal.yaml"
    settings.write_text(
        f"data: {corpus}\ncache_dir: {cache_dir}\ncontext_length: 32\nmax_steps: 20\nlearning_rate: 1e-3\n"
        "probe_steps: 0\ndevice: cpu\ndisable_tqdm: true\nsave_strategy: 'no'\nattention_report_windows: 0\n"
        "schedule:\n- {norms: mlp, start: 1}\n- {norms: attention, start: 3}\n- {norms: final, start: 6}\n"
        "- {norms: first, start: 7}\n"
    )
    assert main(["remove-norms", str(norms), str(settings), "--out", str(free)]) == 0
    assert "gap" in capsys.readouterr().out
    assert {"report.html", "removal.json", "loss.svg", "results.json", "plain"} <= {p.name for p in free.iterdir()}

    attribute = ["attribute", "--prompt", "def function(first", "--out", str(tmp_path / "attribution")]
    assert main([*attribute, str(free)]) == 0
    out = capsys.readouterr().out
    assert "No norm divides before the logits" in out
    record = json.loads((tmp_path / "attribution" / "attribution.json").read_text())
    assert record["largest_error"] < 1e-9
    total = sum(component["direct"] for component in record["components"])
    assert total == pytest.approx(record["logit"], abs=1e-9)
    assert {"report.html", "attribution.svg", "attribution.png"} <= {
        p.name for p in (tmp_path / "attribution").iterdir()
    }
    assert main([*attribute, str(norms), "--target", "("]) == 0
    assert "frozen attributions are off by" in " ".join(capsys.readouterr().out.split())
    assert main([*attribute, str(norms), "--target", "function first"]) == 1
    assert "--target must be one token of the model" in capsys.readouterr().err

    for to, words in {"stock": "Logits on random tokens", "onnx": "2 Relu, 2 Softmax"}.items():
        assert main(["convert", str(free), str(tmp_path / to), "--to", to]) == 0
        assert words in capsys.readouterr().out
    assert json.loads((tmp_path / "stock" / "config.json").read_text())["model_type"] == "gpt2"
    assert main(["convert", str(norms), str(tmp_path / "folded"), "--to", "folded", "--dtype", "float64"]) == 0
    assert "5 norms: layernorm -> rmspre" in capsys.readouterr().out


def test_diverged_run_has_an_exit_code(yaml_file, tmp_path, capsys):
    flags = ["--learning-rate", "1e4", "--max-grad-norm", "0", "--max-steps", "40"]
    assert main(["train", str(yaml_file), "--out", str(tmp_path / "out"), *flags]) == 3
    assert "diverged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "nowhere.yaml"], 1, "There is no configuration file nowhere.yaml"),
        (["train", "--no-such-field", "3"], 1, "Unknown flags: --no-such-field 3"),
        (["train", "--row", "SM+X"], 1, "row='SM+X' is not known. Allowed: 'SM+LN+G'"),
        (["train", "--config-overrides", "{norm: rms}"], 1, "norm='rms' is not known"),
        (["entropy", "./nowhere"], 1, "nowhere"),
        (["demo", "--seeds", "one"], 1, "whole numbers with commas"),
        (["demo", "--seeds", "1,1"], 1, "names a seed twice"),
        (["demo", "--nonsense"], 2, "No such option"),
        (["demo", "--set", "max_steps"], 1, "--set takes field=value"),
        (["study", "nowhere.yaml"], 1, "There is no configuration file nowhere.yaml"),
        (["convert", "./nowhere", "out"], 1, "nowhere"),
        (["convert", ".", "out", "--to", "tensorflow"], 2, "Invalid value for '--to'"),
        (["convert", ".", "out", "--dtype", "int8"], 2, "Invalid value for '--dtype'"),
        (["remove-norms"], 1, "remove-norms takes MODEL"),
        (["remove-norms", "./nowhere", "--schedule", "slowly"], 1, "neither 'auto' nor a file"),
        (["remove-norms", "./nowhere", "--gate-steps", "-1"], 1, "--gate-steps must be at least 0"),
        (["attribute", ".", "--prompt", "x", "--dtype", "float16"], 2, "Invalid value for '--dtype'"),
        (["no-command"], 2, "No such command"),
    ],
)
def test_wrong_input_is_one_line_and_an_exit_code(arguments, code, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == code
    err = capsys.readouterr().err
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    if code == 1:
        assert len(err.strip().splitlines()) == 1


def test_unknown_field_in_the_file_is_named(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("lerning_rate: 1.0\n")
    assert main(["train", str(path)]) == 1
    assert "unknown fields: lerning_rate" in capsys.readouterr().err


def test_a_file_starts_from_its_base(yaml_file, tmp_path, capsys):
    child = tmp_path / "child.yaml"
    child.write_text(f"base: {yaml_file.name}\nrow: SM+R\n")
    model, data, training = parse_arguments([str(child)])
    assert (model.row, data.vocab_size, training.learning_rate) == ("SM+R", 300, 1e-3)
    child.write_text("base: child.yaml\n")
    assert main(["train", str(child)]) == 1
    assert "child.yaml is its own base" in capsys.readouterr().err
    child.write_text("base: nowhere.yaml\n")
    assert main(["train", str(child)]) == 1
    assert "There is no configuration file" in capsys.readouterr().err


def test_traceback_on_request():
    for arguments in (["--traceback", "demo", "--seeds", "x"], ["demo", "--seeds", "x", "--traceback"]):
        with pytest.raises(ValueError, match="whole numbers"):
            main(arguments)


def test_a_defect_shows_its_traceback_and_a_wrong_input_does_not(monkeypatch, capsys):
    for error in (ValueError, RuntimeError, KeyError, TypeError):

        def broken(*arguments, error=error):
            raise error("inside")

        monkeypatch.setattr("hf_lnfree.cli.study.study_command", broken)
        with pytest.raises(error, match="inside"):
            main(["demo"])
    for error in (SettingsError, ConfigurationError, PermissionError):

        def refused(*arguments, error=error):
            raise error("outside\nof it")

        monkeypatch.setattr("hf_lnfree.cli.study.study_command", refused)
        assert main(["demo"]) == 1
        assert capsys.readouterr().err == "error: outside of it\n"


def test_versions_are_those_of_the_packages(capsys):
    assert main(["--version"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"hf_lnfree {hf_lnfree.__version__}",
        f"torch {torch.__version__}",
        f"transformers {transformers.__version__}",
    ]


def test_brackets_in_tables_are_text():
    table = Table(["row [/x]", "[bold]"], [["runs/[/x]", "[red] 1"]])
    console = Console(file=io.StringIO(), width=60)
    console.print(rich_table(table))
    assert all(text in console.file.getvalue() for text in ("row [/x]", "[bold]", "runs/[/x]", "[red] 1"))
