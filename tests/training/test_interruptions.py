"""Killed in the middle of anything, or out of room, a run goes on to the bit, and nothing half-written is taken."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_lnfree.training.checkpoints import checkpoints, find_checkpoint, rotate
from hf_lnfree.training.log import read_log

ROOT = Path(__file__).parents[2]
KILLED = -9
NEOX = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
NEOX |= {"max_position_embeddings": 32, "initializer_range": 0.1}


def run_jobs(jobs):
    command = [sys.executable, "-m", "tests.training.killed", json.dumps(jobs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def outcomes(corpus, cache_dir, tmp_path_factory):
    """Every point of interruption, then the same command again; a run that nothing happened to; one that cannot be."""
    folder = tmp_path_factory.mktemp("interrupted")
    overrides = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 32, "initializer_range": 0.1}
    shared = ["train", "--row", "SM+LearnableR-layer", "--config_overrides", json.dumps(overrides)]
    shared += ["--data", str(corpus), "--vocab_size", "300", "--context_length", "32", "--max_steps", "9"]
    shared += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--learning_rate", "1e-2"]
    shared += ["--logging_steps", "1", "--probe_steps", "3", "--save_steps", "2", "--save_total_limit", "2"]
    shared += ["--use_cpu", "--disable_tqdm", "true", "--resume_from_checkpoint", "auto", "--seed", "5"]

    neox = ["--family", "gpt_neox", "--config_overrides", json.dumps(NEOX)]

    def job(at, name):
        family = neox if name.endswith("neox") else []
        cache = folder / f"cache-{name}" if "tokenis" in name else cache_dir
        return {
            "at": at,
            "arguments": [*shared, *family, "--output_dir", str(folder / name), "--cache_dir", str(cache)],
        }

    points = ["step", "checkpoint", "rotation", "tokenisation", "results", "disk full", "disk full, tokenising"]
    jobs = [job(None, "straight"), job(None, "read-only")]
    jobs[1]["arguments"] += ["--output_dir", "/sys/hf_lnfree-run"]  # read-only, for root too
    for point in points:
        jobs += [job(point, point), job(None, point)]
    jobs += [job(None, "straight-neox"), job("checkpoint", "checkpoint-neox"), job(None, "checkpoint-neox")]
    straight, refused, *others, neox_straight, neox_killed, neox_again = run_jobs(jobs)
    assert straight["code"] == neox_straight["code"] == 0, straight["output"] + neox_straight["output"]
    codes = dict(zip(points, zip(others[::2], others[1::2], strict=True), strict=True))
    return folder, codes | {"checkpoint-neox": (neox_killed, neox_again)}, refused


def measured(folder):
    keys = ("step", "loss", "grad_norm", "entropy/mean", "head_entropies", "slope/layer_01", "residual_rms/layer_01")
    return [{k: e[k] for k in keys if k in e} for e in read_log(folder) if "loss" in e or "entropy/mean" in e]


@pytest.mark.parametrize("point", ["step", "checkpoint", "rotation", "tokenisation", "results", "checkpoint-neox"])
def test_a_killed_run_goes_on_to_the_bit(outcomes, point):
    folder, codes, _ = outcomes
    killed, again = codes[point]
    assert killed["code"] == KILLED
    assert again["code"] == 0, again["output"]
    whole = "straight-neox" if point.endswith("neox") else "straight"
    assert measured(folder / point) == measured(folder / whole)
    one, other = (load_file(folder / name / "model.safetensors") for name in (point, whole))
    assert all(torch.equal(one[key], other[key]) for key in other)
    results = json.loads((folder / point / "results.json").read_text())
    assert results["eval_loss"] == json.loads((folder / whole / "results.json").read_text())["eval_loss"]
    assert not list((folder / point).glob(".partial*"))


def test_it_went_on_and_did_not_start_over(outcomes):
    folder, codes, _ = outcomes
    resumed = {p: json.loads((folder / p / "results.json").read_text())["resumed_at"] for p in codes}
    assert resumed == {
        **{"step": 4, "checkpoint": 4, "rotation": 2, "tokenisation": 0, "results": 9},
        **{"disk full": 4, "disk full, tokenising": 0, "checkpoint-neox": 4},
    }


def test_a_killed_tokenisation_leaves_no_cache_that_counts(outcomes):
    folder, *_ = outcomes
    found = {path.name[:8] for path in (folder / "cache-tokenisation" / "windows").iterdir()}
    assert len([name for name in found if not name.startswith(".partial")]) == 2


def test_a_full_disk_is_told_and_costs_no_checkpoint(outcomes):
    folder, codes, _ = outcomes
    failed, again = codes["disk full"]
    assert failed["code"] == 1
    message = " ".join(failed["output"].split())
    assert "error: The checkpoint of step 6 could not be written to" in message
    assert "checkpoint-4 is whole: go on from it with --resume-from-checkpoint auto." in message
    assert again["code"] == 0, again["output"]
    assert measured(folder / "disk full") == measured(folder / "straight")


def test_a_full_disk_while_tokenising_is_told_and_leaves_nothing(outcomes):
    folder, codes, _ = outcomes
    failed, again = codes["disk full, tokenising"]
    assert failed["code"] == 1
    assert "error: " in failed["output"]
    assert "File too large" in failed["output"]
    assert again["code"] == 0, again["output"]
    assert measured(folder / "disk full, tokenising") == measured(folder / "straight")


def test_a_folder_that_cannot_be_written_is_told_before_training(outcomes):
    *_, refused = outcomes
    assert refused["code"] == 1
    assert "error: " in refused["output"]
    assert "/sys/hf_lnfree-run" in refused["output"]


def test_too_little_room_for_a_checkpoint_is_told_before_training(corpus, cache_dir, tmp_path, monkeypatch):
    from hf_lnfree.data import DataArguments
    from hf_lnfree.training import LNFreeTrainingArguments, ModelArguments, train

    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    data = DataArguments(data=str(corpus), cache_dir=cache_dir, vocab_size=300, context_length=32)
    model = ModelArguments(config_overrides="{n_layer: 1, n_embd: 32, n_head: 2}")
    with pytest.raises(OSError, match=r"A checkpoint takes 0.00 GB and .* has room for 0.00 GB"):
        train(model, data, LNFreeTrainingArguments(str(tmp_path / "run"), use_cpu=True))


def write_checkpoint(folder, step):
    """The least that counts as a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({}, folder / name)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))


def test_a_folder_that_only_looks_like_a_checkpoint_is_passed_over(tmp_path):
    for step, state in {2: '{"global_step": 2}', 4: '{"global_st', 6: None}.items():
        write_checkpoint(tmp_path / f"checkpoint-{step}", step)
        path = tmp_path / f"checkpoint-{step}" / "trainer_state.json"
        path.unlink() if state is None else path.write_text(state)
    (tmp_path / "checkpoint-best").mkdir()
    with pytest.warns(UserWarning, match=r"not whole and are passed over: \['checkpoint-4', 'checkpoint-6'\]"):
        assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-2"]
    with pytest.warns(UserWarning, match="passed over"):
        assert find_checkpoint(tmp_path, "auto") == str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="not a checkpoint of a run: it has no readable"):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoint-4"))
    assert find_checkpoint(tmp_path / "nothing", "auto") is None


@pytest.mark.parametrize(
    "part", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
@pytest.mark.parametrize("cut_off", [False, True])
def test_a_checkpoint_without_one_of_its_parts_is_none(tmp_path, part, cut_off):
    for step in (2, 4):
        write_checkpoint(tmp_path / f"checkpoint-{step}", step)
    path = tmp_path / "checkpoint-4" / part
    path.write_bytes(path.read_bytes()[:-9]) if cut_off else path.unlink()
    with pytest.warns(UserWarning, match=r"not whole and are passed over: \['checkpoint-4'\]"):
        assert find_checkpoint(tmp_path, "last") == str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="checkpoint-4 is not a checkpoint of a run: it has no readable"):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoint-4"))


def test_rotation_goes_by_step_and_spares_what_it_did_not_write(tmp_path):
    for step in (2, 4, 6, 10):
        write_checkpoint(tmp_path / f"checkpoint-{step}", step)
    (tmp_path / "checkpoint-6" / "optimizer.pt").unlink()
    write_checkpoint(tmp_path / "checkpoint-best", 3)
    write_checkpoint(tmp_path / "checkpoint-2-mine", 2)
    for age, name in enumerate(("checkpoint-10", "checkpoint-4", "checkpoint-2", "checkpoint-6")):
        os.utime(tmp_path / name, (age * 100, age * 100))  # the newest of all has the oldest date

    def left(limit, best=None):
        rotate(tmp_path / "checkpoint-10", limit, best)
        return sorted(path.name.removeprefix("checkpoint-") for path in tmp_path.iterdir())

    assert left(None) == left(0) == left(9) == ["10", "2", "2-mine", "4", "6", "best"]
    assert left(3) == ["10", "2", "2-mine", "4", "best"]  # first what is not whole
    assert left(1, str(tmp_path / "checkpoint-2")) == ["10", "2", "2-mine", "best"]
    assert left(1) == ["10", "2-mine", "best"]
