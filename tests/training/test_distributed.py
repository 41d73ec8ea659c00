"""Two processes: the losses, samples and files of one; no window read twice; checkpoints that move; sharded models."""

import json
import shutil

import pytest
import torch
from filelock import FileLock

from hf_lnfree.cli.main import main
from hf_lnfree.training import LNFreeTrainer, LNFreeTrainingArguments
from hf_lnfree.training.log import read_log

from ..conftest import run_in_two

SIZES = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 32, "initializer_range": 0.1, "embd_pdrop": 0.0}


@pytest.fixture(scope="module")
def train(corpus, cache_dir):
    """`hf-lnfree train` in this process, which accumulates two micro-batches, or in two; what it says when it fails."""
    flags = ["--row", "SM+R", "--config_overrides", json.dumps(SIZES), "--data", str(corpus)]
    flags += ["--cache_dir", cache_dir, "--vocab_size", "300", "--context_length", "32", "--max_steps", "6"]
    flags += ["--learning_rate", "1e-2", "--logging_steps", "1", "--probe_steps", "3", "--save_steps", "3"]
    flags += ["--per_device_train_batch_size", "2", "--resume_from_checkpoint", "auto", "--disable_tqdm", "true"]

    def start(processes, folder, *more):
        call = [
            "train",
            *flags,
            "--gradient_accumulation_steps",
            str(2 // processes),
            "--output_dir",
            str(folder),
            *more,
        ]
        if processes == 1:
            assert main(call) == 0
            return ""
        done = run_in_two("-m", "hf_lnfree.cli.main", *call)
        return done.stderr if done.returncode else ""

    return start


@pytest.fixture(scope="module")
def runs(train, tmp_path_factory):
    """With one process, with two, and each gone on by the other from step 3."""
    folder = tmp_path_factory.mktemp("runs")
    for name, processes in {"one": 1, "two": 2, "one to two": 2, "two to one": 1}.items():
        if " to " in name:
            shutil.copytree(folder / name.split()[0] / "checkpoint-3", folder / name / "checkpoint-3")
            shutil.copy(folder / name.split()[0] / "run.json", folder / name)
        said = train(processes, folder / name, "--use_cpu")
        assert not said, said[-3000:]
    return folder


def losses(folder):
    return {entry["step"]: entry["loss"] for entry in read_log(folder) if "loss" in entry}


def test_two_processes_give_the_losses_of_one_that_accumulates(runs):
    assert list(losses(runs / "two")) == [1, 2, 3, 4, 5, 6]
    assert losses(runs / "two") == pytest.approx(losses(runs / "one"), abs=2e-5)
    results = {name: json.loads((runs / name / "results.json").read_text()) for name in ("one", "two")}
    assert results["two"]["environment"]["processes"] == 2
    assert results["one"]["tokens"] == results["two"]["tokens"] == 6 * 4 * 32
    assert results["two"]["eval_loss"] == pytest.approx(results["one"]["eval_loss"], abs=2e-5)


def test_samples_and_files_are_written_once(runs):
    for name in ("one", "two"):
        steps = [entry["step"] for entry in read_log(runs / name) if "entropy/mean" in entry]
        assert steps == [0, 3, 6]
    assert {p.name for p in (runs / "two").iterdir()} == {p.name for p in (runs / "one").iterdir()}


@pytest.mark.parametrize("name", ["one to two", "two to one"])
def test_checkpoints_move_between_one_and_two_processes(runs, name):
    assert json.loads((runs / name / "results.json").read_text())["resumed_at"] == 3
    assert losses(runs / name) == pytest.approx(losses(runs / "one"), abs=2e-5)


@pytest.fixture(scope="module")
def told(corpus, cache_dir, tmp_path_factory):
    def ask(mode):
        folder = tmp_path_factory.mktemp(mode)
        done = run_in_two("-m", "tests.training.distributed", mode, str(folder), str(corpus), cache_dir)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads((folder / "told.json").read_text())

    return ask


def test_ddp_shards_the_windows_and_keeps_ranks_alike(told):
    first, second = told("ddp")
    # The last batch is filled up from the start of the epoch, as accelerate does it.
    assert len(set(first["read"]) & set(second["read"])) <= 2 * 4
    assert set(first["read"]) | set(second["read"]) == set(range(first["windows"]))
    assert len(first["read"]) == len(second["read"])
    assert first["samples"] == second["samples"]
    assert len(first["samples"]) > 5
    assert first["weights"] == second["weights"]


def test_fsdp2_trains_and_is_sampled_like_a_whole_model(told):
    for rank in told("fsdp2"):
        for family in ("gpt2", "gpt_neox"):
            sharded, whole = rank[family]["sharded"], rank[family]["whole"]
            assert sharded["losses"] == pytest.approx(whole["losses"], rel=1e-5)
            assert sharded["losses"][-1] < sharded["losses"][0] - 1
            assert set(sharded["sample"]) == set(whole["sample"])
            assert sharded["sample"] == pytest.approx(whole["sample"], rel=2e-3, abs=1e-6)


def test_a_study_in_two_processes_passes_over_a_busy_cell(corpus, cache_dir, tmp_path):
    study = tmp_path / "study.yaml"
    fields = f"data: {corpus}\ncache_dir: {cache_dir}\nvocab_size: 300\ncontext_length: 32\nmax_steps: 2\n"
    fields += f"per_device_train_batch_size: 2\nprobe_steps: 1\nconfig_overrides: {json.dumps(SIZES)}\n"
    study.write_text(fields + "rows: {busy: {row: SM+G}, free: {row: SM+R}}\n")
    out = tmp_path / "out"
    (out / "busy" / "seed-0").mkdir(parents=True)
    with FileLock(out / "busy" / "seed-0" / ".lock"):
        done = run_in_two("-m", "hf_lnfree.cli.main", "study", str(study), "--out", str(out), "--device", "cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout.splitlines()
    assert "[1/2] busy, seed 0: in another process" in said
    assert said.count("[2/2] free, seed 0: finished") == 1
    assert json.loads((out / "free" / "seed-0" / "results.json").read_text())["environment"]["processes"] == 2
    assert (out / "report.html").is_file()


def test_processes_that_would_train_alone_are_refused(train, tmp_path):
    if torch.accelerator.is_available():
        return  # they form one group on the accelerator
    assert "2 processes were launched, but each would train alone" in train(2, tmp_path / "lone")


def test_a_global_slope_under_fsdp_is_refused(family, tmp_path, monkeypatch):
    def with_fsdp(trainer):
        create(trainer)
        trainer.is_fsdp_enabled = True

    create = LNFreeTrainer.create_accelerator_and_postprocess
    monkeypatch.setattr(LNFreeTrainer, "create_accelerator_and_postprocess", with_fsdp)
    args = LNFreeTrainingArguments(str(tmp_path), use_cpu=True)
    model = family.model(activation="learnable_leaky_relu", slope_scope="global")
    with pytest.raises(ValueError, match=r"slope_scope='global' is one parameter of all blocks. Use DDP"):
        LNFreeTrainer(model, args)
