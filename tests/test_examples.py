"""The examples and every command of the README, run as they stand (long ones cut to a few steps)."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from hf_lnfree import paper_config
from hf_lnfree.cli.study import DEMO
from hf_lnfree.cli.train import parse_arguments
from hf_lnfree.data import DataArguments
from hf_lnfree.removal.arguments import RemovalArguments
from hf_lnfree.removal.procedure import removable
from hf_lnfree.removal.schedule import expand, read_schedule
from hf_lnfree.studies.running import run_study
from hf_lnfree.studies.study import Study
from hf_lnfree.training import LNFreeTrainingArguments
from hf_lnfree.training.recipes import MAIN_ROWS
from hf_lnfree.training.settings import flag, parse_settings, read_settings

from .conftest import GPT2
from .fences import ROOT

PAGE = ROOT / "README.md"
README = PAGE.read_text()
SIZES = {
    "gpt2": {},
    "gpt2-18L": {"n_layer": 18},
    "pythia-70m": {},
    "pythia-160m": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}
PAPER = ROOT / "examples" / "reproduce_paper"
STUDIES = sorted(PAPER.glob("study-*.yaml"))
ROWS = [path for path in sorted(PAPER.glob("[!_]*.yaml")) if path not in STUDIES]
CUT = {"max_steps": 2, "max_validation_windows": 4, "attention_report_windows": 4, "probe_steps": 0}
SHORT = ["--device", "cpu", *(part for name, value in CUT.items() for part in (flag(name), str(value)))]
SHORT_STUDY = ["--device", "cpu", *(part for name, value in CUT.items() for part in ("--set", f"{name}={value}"))]


REMOVAL = ROOT / "examples" / "remove_norms"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, cache_dir):
    """A folder that looks like a clone in which the demo has run, though for two steps only."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("examples", "benchmarks", "hf_lnfree"):
        shutil.copytree(ROOT / name, folder / name)
    small = {"config_overrides": {"n_layer": 2, "n_embd": 32, "n_head": 2}, "vocab_size": 512, **CUT}
    study, rows = Study.load(DEMO, changes=small), ["SM+R", "SM+LN+R"]
    run_study(study, [0], folder / "runs" / "demo", rows, cache_dir=cache_dir, device="cpu")
    return folder


@pytest.mark.parametrize("path", ROWS, ids=lambda p: p.stem)
def test_row_files_hold_the_published_setting(path):
    model, data, training = parse_arguments([str(path), "--fp16", "false", "--device", "cpu"])
    name, length, row, slope, decay = re.fullmatch(
        r"(gpt2|gpt2-18L|pythia-70m|pythia-160m)-T(\d+)-(.+?)(-0[.\d]+)?(-decay)?", path.stem
    ).groups()
    assert (model.family, model.row) == ("gpt2" if name.startswith("gpt2") else "gpt_neox", row)
    assert model.overrides == (SIZES[name] if slope is None else {"negative_slope": float(slope[1:])})
    assert training.slope_weight_decay == (0.1 if decay else None)
    assert training.output_dir == f"runs/reproduce/{path.stem}"
    assert data.context_length == int(length)
    assert (data.max_documents, data.max_validation_documents, data.packing) == (600_000, 2_000, "exact")
    windows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    assert windows == 512
    assert (training.learning_rate, training.weight_decay, training.max_grad_norm) == (1e-3, 0.1, 1.0)
    assert (training.adam_beta1, training.adam_beta2, training.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert (training.warmup_steps, training.num_train_epochs, training.seed) == (0.05, 1, 1337)
    expected = paper_config(model.family, row, int(length), **model.overrides)
    assert model.config(data.context_length).to_dict() == expected.to_dict()
    assert "fp16: true" in path.with_name("_setting.yaml").read_text()


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
@pytest.mark.parametrize("scale", ["paper", "gpu", "small"])
def test_study_files_hold_rows_at_every_scale(path, scale):
    study = Study.load(path, scale, {"fp16": False, "device": "cpu"})  # half precision may need a GPU
    for name, file in yaml.safe_load(path.read_text())["rows"].items():
        model, data, training = study.arguments(name, 3, Path("cell"))
        paper, paper_data, paper_training = parse_arguments([str(PAPER / file), "--fp16", "false"])
        assert (model.family, model.row, training.seed) == (paper.family, paper.row, 3)
        assert data.context_length == paper_data.context_length
        assert training.slope_weight_decay == paper_training.slope_weight_decay
        config, published = model.config(data.context_length), paper.config(data.context_length)
        assert config.negative_slope == published.negative_slope
        windows = training.per_device_train_batch_size * training.gradient_accumulation_steps
        if scale == "small":
            assert (config.hidden_size, data.data, training.max_steps) == (96, "stdlib", 2000)
            assert windows * data.context_length == 2048
        else:
            assert config.to_dict() == published.to_dict()
            assert (data.data, windows) == ("codeparrot-ds-train", 512)
            tokens = training.max_steps * windows * data.context_length
            assert tokens == pytest.approx(1e8, rel=1e-3) if scale == "gpu" else training.max_steps == -1


def test_removal_files_hold_one_pace():
    def settings(name):
        dataclasses = (RemovalArguments, DataArguments, LNFreeTrainingArguments)
        return parse_settings(read_settings(REMOVAL / name), name, ["--bf16", "false", "--device", "cpu"], dataclasses)

    removal, data, training = settings("gpt2-small.yaml")
    windows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    assert (training.max_steps, windows * data.context_length) == (300, 2**19)
    model = removable(GPT2.stock_model(n_layer=12))
    written = expand(read_schedule(removal.schedule), model, 300)
    assert len(written) == 12 * 3 + 2
    assert written == expand("auto", model, 300)
    removal, _, training = settings("removal.yaml")
    assert (removal.schedule, training.max_steps) == ("auto", 600)


def test_every_study_row_belongs_to_a_study():
    in_studies = {file for path in STUDIES for file in yaml.safe_load(path.read_text())["rows"].values()}
    assert in_studies == {path.name for path in ROWS}


def test_every_row_of_the_paper_has_a_file():
    names = {path.stem for path in ROWS}
    learnable = {f"SM+LearnableR-{scope}{decay}" for scope in ("layer", "global") for decay in ("", "-decay")}
    leaky = {f"SM+LeakyR-{slope}" for slope in ("0.01", "0.05", "0.1")}
    models = ("gpt2-T128", "gpt2-18L-T128", "pythia-70m-T128", "pythia-70m-T256", "pythia-160m-T128")
    assert names == {f"{m}-{row}" for m in models for row in MAIN_ROWS} | {f"gpt2-T128-{r}" for r in learnable | leaky}


def test_sizes_of_the_larger_models():
    """124M parameters without LayerNorm, half as many layers again, and Pythia-160M with the tokenizer of the paper."""
    with torch.device("meta"):
        count = {
            name: AutoModelForCausalLM.from_config(paper_config(family, "SM+R", **SIZES[name])).num_parameters()
            for name, family in {"gpt2": "gpt2", "gpt2-18L": "gpt2", "pythia-160m": "gpt_neox"}.items()
        }
    layer = 12 * 768**2 + 9 * 768  # matrices; biases of attention (3 + 1 widths) and MLP (4 + 1)
    assert count["gpt2-18L"] - count["gpt2"] == 6 * layer
    assert count["pythia-160m"] == 2 * 50_000 * 768 + 12 * layer + 2 * 768


def test_unknown_rows_and_families_name_the_known_ones():
    with pytest.raises(ValueError, match=r"'gpt2', 'gpt_neox', 'llama'"):
        paper_config("mistral", "SM+G")
    with pytest.raises(ValueError, match=r"'SM\+LN\+G'.*'SM\+LearnableR-global'"):
        paper_config("gpt2", "SM")
    with pytest.raises(ValueError, match="not a field"):
        paper_config("gpt2", "SM+G", activations="relu")
    assert paper_config("gpt2", "SM+R", num_hidden_layers=18).n_layer == 18


def test_quickstart_script(workplace):
    command = [sys.executable, "examples/quickstart.py", "runs/demo/SM+R/seed-0"]
    result = subprocess.run(command, cwd=workplace, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "def read(self, " in result.stdout
    assert "mean attention entropy in nats (measured)" in result.stdout


@pytest.mark.parametrize("script", ["finetune_lora", "finetune_classification"])
def test_finetuning_scripts(script, workplace):
    models = ["runs/demo/SM+R/seed-0", "runs/demo/SM+LN+R/seed-0"]
    command = [
        sys.executable,
        f"examples/{script}.py",
        *models,
        "--steps",
        "2",
        "--seeds",
        "0",
        "1",
        "--examples",
        "200",
    ]
    result = subprocess.run([*command, "--out", "scores.json"], cwd=workplace, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "majority baseline: accuracy" in result.stdout
    record = json.loads((workplace / "scores.json").read_text())
    for model in models:
        assert len(record["results"][model]) == 2
        assert 0 <= record["results"][model][0]["f1"] <= record["results"][model][0]["accuracy"] <= 1


def test_readme_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for target in re.findall(r"`(hf_lnfree/[\w/.]+)`", README):
        assert (ROOT / target).exists(), target
