"""Checkpoints that are not there or not whole: one line and exit code 1 in every command that loads one."""

import html
import json
import math
import shutil
import subprocess
import sys
import weakref
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from hf_lnfree.cli.entropy import display_names
from hf_lnfree.cli.main import main
from hf_lnfree.data.tokenization import train_bpe
from hf_lnfree.errors import ModelError
from hf_lnfree.loading import load_config, load_model

from ..conftest import GPT2

COMMANDS = ["train", "remove-norms", "study", "entropy", "evaluate", "lm-eval", "attribute", "convert"]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "good"
    tokenizer = train_bpe(["def function(first): return first"], 300)
    GPT2.model(vocab_size=len(tokenizer), n_layer=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def changed(good, tmp_path, **fields):
    folder = tmp_path / "changed"
    shutil.copytree(good, folder)
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in {**config, **fields}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def run(corpus, cache_dir, tmp_path, capsys, monkeypatch):
    """Exit code and standard error of a command on a checkpoint."""
    monkeypatch.chdir(tmp_path)
    harness(monkeypatch)

    def command(name, checkpoint, *more):
        text = ["--data", str(corpus), "--context-length", "16"]
        device = ["--device", "cpu"]
        training = [*text, *device, "--cache-dir", cache_dir, "--tokenizer", checkpoint, "--max-steps", "1"]
        training += ["--disable-tqdm", "true", "--save-strategy", "no", "--out", str(tmp_path / "out")]
        study = tmp_path / "study.yaml"
        study.write_text(
            f"rows: {{a: {{model_name_or_path: {checkpoint!r}, tokenizer: {checkpoint!r}}}}}\n"
            f"data: {corpus}\ncontext_length: 16\nmax_steps: 1\ndisable_tqdm: true\n"
        )
        arguments = {
            "train": ["--model-name-or-path", checkpoint, *training],
            "remove-norms": [checkpoint, *training],
            "study": [
                str(study),
                *device,
                "--cache-dir",
                cache_dir,
                "--out",
                str(tmp_path / checkpoint.replace("/", "-")),
            ],
            "entropy": [checkpoint, *text, *device, "--max-windows", "2"],
            "evaluate": [checkpoint, *text, *device, "--max-documents", "1"],
            "lm-eval": [checkpoint, *device, "--limit", "1"],
            "attribute": [checkpoint, *device, "--prompt", "def function"],
            "convert": [checkpoint, str(tmp_path / "converted"), "--to", "folded"],
        }[name]
        code = main([name, *arguments, *more])
        return code, capsys.readouterr().err

    return command


def harness(monkeypatch):
    """What `lm-eval` needs of lm-evaluation-harness: a class that loads a model as its own does."""
    from transformers import AutoConfig, AutoModelForCausalLM

    class HFLM:
        AUTO_MODEL_CLASS = AutoModelForCausalLM

        def __init__(self, pretrained, tokenizer, revision, trust_remote_code, batch_size, device):
            self._device = torch.device(device)
            AutoConfig.from_pretrained(pretrained, revision=revision, trust_remote_code=trust_remote_code)
            self._create_model(pretrained=pretrained, revision=revision, trust_remote_code=trust_remote_code)

        def _create_model(self, pretrained, **options):
            self._model = self.AUTO_MODEL_CLASS.from_pretrained(pretrained, **options)

    def simple_evaluate(model, bootstrap_iters, **options):
        error = 0.25 if bootstrap_iters else "N/A"  # as the harness: none of any metric without bootstrap
        found = {"alias": "code", "sample_len": 4, "acc,none": 0.5, "acc_stderr,none": error, "acc,first": 0.25}
        return {"results": {"code_next_line": found, "other": {"sample_len": 4, "perplexity,none": math.nan}}}

    class TaskManager:
        all_tasks = ("code_next_line", "code_identifiers", "code_brackets")

        def __init__(self, include_path): ...

    root, tasks, models, huggingface = (
        ModuleType(name) for name in ("lm_eval", "lm_eval.tasks", "lm_eval.models", "lm_eval.models.huggingface")
    )
    root.simple_evaluate = simple_evaluate
    tasks.TaskManager, huggingface.HFLM = TaskManager, HFLM
    for module in (root, tasks, models, huggingface):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_the_harness_gives_standard_errors(good, tmp_path, monkeypatch, capsys):
    harness(monkeypatch)
    out = tmp_path / "scores.json"
    assert main(["lm-eval", str(good), "--device", "cpu", "--out", str(out)]) == 0
    (scores,) = json.loads(out.read_text())["scores"].values()
    assert scores["code_next_line"] == {"acc": 0.5, "acc_stderr": 0.25, "acc,first": 0.25}
    assert scores["other"] == {"perplexity": None}
    shown = capsys.readouterr().out
    assert "50.0 ± 25.0" in shown
    assert "perplexity not finite" in shown


def refused(found, *words):
    code, said = found
    assert code == 1, said
    lines = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "Traceback" not in said
    for word in words:
        assert str(word) in lines[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_good_one_is_loaded(command, run, good):
    """So what is refused below is refused for what is wrong with it."""
    code, said = run(command, str(good))
    assert code == 0, said


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_is_not_there(command, run):
    for name in ("./nowhere", "/no/where", "runs/demo/SM+R/seed-0"):
        refused(run(command, name), f"{name}: no such file or folder; a Hub name looks like owner/name")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_name_that_the_hub_does_not_have(command, run):
    refused(run(command, "nobody/nothing"), "nobody/nothing")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_folder_of_an_unfinished_run(command, run, tmp_path):
    folder = tmp_path / "unfinished"
    for step in (50, 100):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
    refused(run(command, str(folder)), "holds no model yet, but checkpoints", f"The latest: {folder}/checkpoint-100.")


def test_names_that_tell_paths_apart():
    assert display_names(["runs/a", "runs/b"]) == ["a", "b"]
    assert display_names(["/models/a", "b"]) == ["/models/a", "b"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_field(command, run, good, tmp_path):
    folder = changed(good, tmp_path, n_embd="wide")
    refused(run(command, str(folder)), folder, "n_embd", "wide")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_field_of_ours_with_a_wrong_value(command, run, good, tmp_path):
    folder = changed(good, tmp_path, norm="rms")
    refused(run(command, str(folder)), folder, "norm='rms' is not known")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("cut", [0, 1000, -100], ids=["empty", "header", "tail"])
def test_damaged_weights(command, cut, run, good, tmp_path):
    folder = changed(good, tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:cut])
    refused(run(command, str(folder)), weights, "damaged", "again")


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "lm-eval"])
def test_settings_that_are_no_mapping(command, file, run, good, tmp_path):
    folder = changed(good, tmp_path)
    for content in ("[]", "3", "null", '"x"', '{"model_type": "gpt', ""):
        (folder / file).write_text(content)
        refused(run(command, str(folder)), folder / file, "damaged")


@pytest.mark.parametrize("command", ["train", "entropy", "evaluate", "attribute"])
def test_a_tokenizer_whose_length_is_no_number(command, run, good, tmp_path):
    folder = changed(good, tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"model_max_length": "long"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    refused(run(command, str(folder)), folder)


@pytest.mark.parametrize("command", COMMANDS)
def test_shapes_that_do_not_fit(command, run, good, tmp_path):
    folder = changed(good, tmp_path, n_positions=128)
    refused(run(command, str(folder)), folder, "wpe.weight is [64, 32] in its weights and [128, 32] by")


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_model_type(command, run, good, tmp_path):
    folder = changed(good, tmp_path, model_type="banana", auto_map=None)
    refused(run(command, str(folder)), folder if command not in ("attribute", "convert") else "", "banana")


@pytest.mark.parametrize("command", COMMANDS)
def test_code_of_its_own_is_not_run_and_not_asked_for(command, run, good, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("transformers asks at a prompt"))
    folder = changed(good, tmp_path, model_type="banana")
    for file in folder.glob("*.py"):
        file.write_text("raise SystemExit('it was run')\n")
    hint = "--set trust_remote_code=" if command == "study" else "--trust-remote-code"
    refused(run(command, str(folder)), *([hint] if command not in ("attribute", "convert") else []))


def test_code_of_its_own_runs_when_asked_for(run, good, tmp_path, corpus, cache_dir):
    """In a process of its own: the code registers activations under our names."""
    folder = changed(good, tmp_path, model_type="lnfree_gpt2_copy")
    for file in folder.glob("*.py"):
        file.write_text(file.read_text().replace('model_type = "lnfree_gpt2"', 'model_type = "lnfree_gpt2_copy"'))
    text = ["--data", str(corpus), "--context-length", "16", "--device", "cpu"]
    evaluate = ["evaluate", str(folder), *text, "--max-documents", "1", "--trust-remote-code"]
    train = ["train", "--model-name-or-path", str(folder), "--tokenizer", str(folder), *text, "--cache-dir", cache_dir]
    train += ["--max-steps", "1", "--save-strategy", "no", "--out", str(tmp_path / "run"), "--trust-remote-code"]
    refused(run("evaluate", str(folder)), "--trust-remote-code")
    code = "import json, sys; from hf_lnfree.cli.main import main; print([main(a) for a in json.loads(sys.argv[1])])"
    command = [sys.executable, "-W", "ignore", "-c", code, json.dumps([evaluate, train])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[0, 0]", done.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model_type"] == "lnfree_gpt2_copy"


@pytest.mark.parametrize("command", ["evaluate", "train", "remove-norms", "lm-eval"])
def test_another_kind_of_model(command, run, good, tmp_path):
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 300}
    folder = tmp_path / "t5"
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(folder)
    for file in good.glob("tokenizer*"):
        shutil.copy(file, folder)
    refused(run(command, str(folder)))


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "convert"])
def test_a_damaged_tokenizer(command, run, good, tmp_path):
    folder = changed(good, tmp_path)
    for content in ("{", "{}"):
        (folder / "tokenizer.json").write_text(content)
        refused(run(command, str(folder)), folder)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("convert", "attribute")])
def test_damaged_pickled_weights(command, run, good, tmp_path):
    folder = changed(good, tmp_path)
    (folder / "model.safetensors").unlink()
    for content in (b"nothing", b"PK\x03\x04" + bytes(500)):
        (folder / "pytorch_model.bin").write_bytes(content)
        refused(run(command, str(folder)), folder)


def test_a_device_that_is_not_here(run, good):
    for command in COMMANDS:
        refused(run(command, str(good), "--device", "cuda:77"), "There is no device 'cuda:77' here. Allowed: cpu")
    assert not torch.accelerator.is_available() or run("entropy", str(good))[0] == 0


def missing(tensors, config):
    del tensors["transformer.h.0.mlp.c_fc.weight"]


def unknown(tensors, config):
    tensors["transformer.h.7.mlp.c_fc.weight"] = torch.ones(3)


def spoilt(tensors, config):
    tensors["transformer.h.0.mlp.c_fc.weight"][1, 2] = torch.nan


def more_layers(tensors, config):
    config["n_layer"] = 2


WRONG = {
    missing: ("has no", "h.0.mlp.c_fc.weight"),
    unknown: ("has unknown", "h.7.mlp.c_fc.weight"),
    spoilt: ("NaN or infinities in", "h.0.mlp.c_fc.weight"),
    more_layers: ("has no", "h.1."),
}


@pytest.mark.parametrize("spoil", WRONG, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("command", COMMANDS)
def test_tensors_that_do_not_fit(command, spoil, run, good, tmp_path):
    """transformers draws what is missing at random and leaves out what it does not know."""
    folder = tmp_path / "wrong"
    shutil.copytree(good, folder)
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    spoil(tensors, config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    refused(run(command, str(folder)), folder, *WRONG[spoil])


@pytest.mark.parametrize("command", ["evaluate", "entropy", "convert"])
def test_an_index_that_points_elsewhere(command, run, good, tmp_path):
    folder = tmp_path / "wrong"
    shutil.copytree(good, folder)
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../good/model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(run(command, str(folder)), "model.safetensors.index.json", "../good/model.safetensors")


def test_a_changed_configuration_may_begin_tensors_anew(good, caplog):
    """A warm start with another norm: what is new is told, the rest is that of the checkpoint."""
    config = load_config(good, norm="dyt")
    with pytest.raises(ModelError, match=r"has no transformer.h.0.ln_1.alpha"):
        load_model(good, config=config)
    with caplog.at_level("INFO", logger="hf_lnfree"):
        model = load_model(good, config=config, changed=True)
    assert "begin anew: transformer.h.0.ln_1.alpha" in caplog.text
    assert type(model.transformer.h[0].ln_1).__name__ == "DynamicTanh"


TEXT = ["--context-length", "16", "--device", "cpu"]
OUT = {
    "entropy": ["--max-windows", "2", *TEXT],
    "evaluate": ["--max-documents", "1", *TEXT],
    "attribute": ["--prompt", "def function", "--device", "cpu"],
    "lm-eval": ["--limit", "1", "--device", "cpu"],
}
FILES = ("evaluate", "lm-eval")


def measured(command, good, corpus, out):
    data = ["--data", str(corpus)] if command in ("entropy", "evaluate") else []
    return main([command, str(good), *OUT[command], *data, "--out", str(out)])


@pytest.fixture
def unworked(monkeypatch):
    """Fails where work begins."""
    harness(monkeypatch)
    for place in ("cli.entropy.find_device", "cli.attribute.find_device", "cli.evaluate.evaluate"):
        monkeypatch.setattr(f"hf_lnfree.{place}", lambda *args, **options: pytest.fail("it was begun"))
    monkeypatch.setattr("hf_lnfree.evaluation.harness.find_device", lambda name: pytest.fail("it was begun"))


@pytest.mark.parametrize("command", OUT)
def test_an_output_of_another_kind_is_left_as_it_is(command, good, corpus, tmp_path, unworked, capsys):
    run, results = tmp_path / "run", tmp_path / "run" / "results.json"
    shutil.copytree(good, run)
    results.write_text('{"row": "SM+R", "eval_loss": 1.0}')
    wrong = [results, run / "model.safetensors", run] if command in FILES else [run, results]
    before = {path: path.read_bytes() for path in run.iterdir()}
    for out in wrong:
        assert measured(command, good, corpus, out) == 1
        said = capsys.readouterr().err
        assert str(out) in said
        assert "holds no" in said or "is a" in said
    assert {path: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.parametrize("command", OUT)
def test_a_place_is_tried_before_the_work(command, good, corpus, tmp_path, unworked, capsys):
    (tmp_path / "file").write_text("")
    places = ["/proc/out", tmp_path / "file" / "out"]
    for out in places:
        assert measured(command, good, corpus, out) == 1
        assert str(out.parent if command in FILES and out != places[0] else "out") in capsys.readouterr().err


@pytest.mark.parametrize("command", OUT)
def test_an_output_of_its_own_kind_is_replaced(command, good, corpus, tmp_path, monkeypatch):
    harness(monkeypatch)
    assert measured(command, good, corpus, tmp_path / "out") == 0
    assert measured(command, good, corpus, tmp_path / "out") == 0
    assert not list(tmp_path.glob(".partial*"))


def test_several_models_are_measured_one_at_a_time(good, corpus, tmp_path, monkeypatch):
    """When a model is loaded, the one before is gone."""
    harness(monkeypatch)
    living = []

    def watched(*args, load_model=load_model, **options):
        assert not [model for model in living if model() is not None]
        model = load_model(*args, **options)
        living.append(weakref.ref(model))
        return model

    monkeypatch.setattr("hf_lnfree.cli.entropy.load_model", watched)
    monkeypatch.setattr("hf_lnfree.evaluation.harness.load_model", watched)
    models = [str(good), str(good), str(good)]
    assert main(["entropy", *models, "--data", str(corpus), *OUT["entropy"]]) == 0
    assert main(["lm-eval", *models, *OUT["lm-eval"]]) == 0
    assert len(living) == 4


def test_statistics_of_heads_are_printed_and_on_the_page(good, corpus, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["entropy", str(good), "--data", str(corpus), *OUT["entropy"], "--statistics", "--out", str(out)]) == 0
    assert "attention sinks in" in capsys.readouterr().out
    page = (out / "report.html").read_text()
    assert "Logits, sinks and outputs" in page
    assert "top 8 mass" in page


@pytest.mark.parametrize("command", ["entropy", "attribute"])
def test_no_page_says_where_its_author_lives(command, good, corpus, tmp_path, monkeypatch):
    """However HTML and SVG spell the folder."""
    home = tmp_path / "o'me & <co>"
    monkeypatch.setenv("HOME", str(home))
    models = [shutil.copytree(good, folder) for folder in (home / "my" / "model", tmp_path / "another")]
    out = tmp_path / "out"
    if command == "entropy":
        data = shutil.copytree(corpus, home / "text")
        assert main(["entropy", *map(str, models), "--data", str(data), *OUT["entropy"], "--out", str(out)]) == 0
    else:
        assert main(["attribute", str(models[0]), *OUT["attribute"], "--out", str(out)]) == 0
    told = 0
    for file in out.iterdir():
        if file.suffix in (".html", ".svg", ".json"):
            text = html.unescape(file.read_text())
            told += "~/my/model" in text
            assert "o'me" not in text, file
    assert told


OWN_TOKENIZER = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast

Path({mark!r}).touch()


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "convert"])
def test_code_of_a_tokenizer_runs_when_asked_for_and_only_then(command, run, good, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("transformers asks at a prompt"))
    folder, mark = changed(good, tmp_path), tmp_path / "it-was-run"
    (folder / "own_tokenization.py").write_text(OWN_TOKENIZER.format(mark=str(mark)))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": [None, "own_tokenization.OwnTokenizer"]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    refused(run(command, str(folder)), folder, "trust_remote_code" if command == "study" else "--trust-remote-code")
    assert not mark.exists()
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    flag = ["--set", "trust_remote_code=true"] if command == "study" else ["--trust-remote-code"]
    code, said = run(command, str(folder), *flag)
    assert code == 0, said
    assert mark.exists()
