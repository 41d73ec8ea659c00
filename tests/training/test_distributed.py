"""Two processes: the losses, samples and files of one; no window read twice; checkpoints that move; sharded models."""

import json
import os
import shutil
import socket
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import AutoModelForCausalLM

from hf_lnfree.cli.main import main
from hf_lnfree.errors import ModelError, RunError
from hf_lnfree.removal.procedure import NormRemoval
from hf_lnfree.training import LNFreeTrainer, LNFreeTrainingArguments
from hf_lnfree.training.checkpoints import is_whole
from hf_lnfree.training.log import read_log
from hf_lnfree.training.procedure import Procedure
from hf_lnfree.training.shards import in_full_precision, require_deepspeed, shard_on_cpu

from ..conftest import launch, run_in_two

SIZES = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 32, "initializer_range": 0.1, "embd_pdrop": 0.0}


NEOX = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
NEOX |= {"max_position_embeddings": 32, "initializer_range": 0.1}
OTHER = ["--family", "gpt_neox", "--config_overrides", json.dumps(NEOX), "--row", "SM+LearnableR-layer"]
OTHER += ["--probe_geometry", "true", "--entropy_weight", "0.5", "--entropy_tolerance", "0.01"]
ON_THE_CPU = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def flags(corpus, cache_dir):
    flags = ["--row", "SM+R", "--config_overrides", json.dumps(SIZES), "--data", str(corpus)]
    flags += ["--cache_dir", cache_dir, "--vocab_size", "300", "--context_length", "32", "--max_steps", "6"]
    flags += ["--learning_rate", "1e-2", "--logging_steps", "1", "--probe_steps", "3", "--save_steps", "3"]
    return [*flags, "--per_device_train_batch_size", "2", "--resume_from_checkpoint", "auto", "--disable_tqdm", "true"]


@pytest.fixture(scope="module")
def train(flags):
    """`hf-lnfree train` in this process, which accumulates two micro-batches, or in two; what it says when it fails."""

    def start(processes, folder, *more):
        share = ["--gradient_accumulation_steps", str(2 // processes)]
        call = ["train", *flags, *share, "--output_dir", str(folder), *more]
        if processes == 1:
            assert main(call) == 0
            return ""
        done = run_in_two("-m", "hf_lnfree.cli.main", *call)
        return done.stderr if done.returncode else ""

    return start


def go_on(run, folder):
    """A folder for what goes on with step 3 of a run."""
    shutil.copytree(run / "checkpoint-3", folder / "checkpoint-3")
    shutil.copy(run / "run.json", folder)


@pytest.fixture(scope="module")
def runs(train, tmp_path_factory):
    """With one process, with two, and each gone on by the other from step 3."""
    folder = tmp_path_factory.mktemp("runs")
    for name, processes in {"one": 1, "two": 2, "one to two": 2, "two to one": 1}.items():
        if " to " in name:
            go_on(folder / name.split()[0], folder / name)
        said = train(processes, folder / name, "--use_cpu")
        assert not said, said[-3000:]
    return folder


def losses(folder):
    """By step; what comes last counts for a step that was taken twice."""
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
    def ask(mode, jobs=()):
        folder = tmp_path_factory.mktemp(mode)
        (folder / "jobs.json").write_text(json.dumps(jobs))
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


# FSDP2. Sums over two processes have another order: losses agree to 1e-5, samples to a thousandth.


def samples(folder):
    """What the recorder logged, by step and key."""
    entries = [entry for entry in read_log(folder) if "entropy/mean" in entry]
    return {(e["step"], key): x for e in entries for key, x in e.items() if "/" in key and key != "epoch"}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@pytest.fixture(scope="module")
def killed(runs, flags):
    """The run with two processes and FSDP2, one of which is killed in step 5: its folder, and what is said."""
    arguments = [*flags, "--output_dir", str(runs / "sharded"), "--device", "cpu"]
    module = ["-m", "tests.training.distributed", "killed", "train"]
    process = launch("two_processes_fsdp2.yaml", "--main_process_port", "0", *module, *arguments, env=ON_THE_CPU)
    said = process.communicate()[1]
    return runs / "sharded", process.returncode, said


def test_a_killed_process_stops_the_other_and_leaves_a_checkpoint(killed):
    folder, code, said = killed
    assert code != 0
    assert "Signal 9" in said, said[-3000:]
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3"]
    assert "in shards on 2 processes" in said


@pytest.fixture(scope="module")
def sharded(killed, flags):
    """That run gone on with by two nodes of one process each."""
    folder = killed[0]
    ours = ["--num_processes", "2", "--mixed_precision", "no", "--main_process_ip", "127.0.0.1"]
    ours += ["--main_process_port", free_port()]
    run = ["-m", "hf_lnfree.cli.main", "train", *flags, "--output_dir", str(folder), "--device", "cpu"]
    nodes = [launch("two_nodes_fsdp2.yaml", *ours, "--machine_rank", rank, *run, env=ON_THE_CPU) for rank in "01"]
    for node in nodes:
        said = node.communicate()[1]
        assert node.returncode == 0, said[-3000:]
    return folder


def test_a_sharded_run_that_was_killed_is_that_of_one_process(runs, sharded):
    results = json.loads((sharded / "results.json").read_text())
    assert results["resumed_at"] == 3
    assert losses(sharded) == pytest.approx(losses(runs / "one"), abs=1e-5)
    assert samples(sharded) == pytest.approx(samples(runs / "one"), rel=1e-3, abs=1e-6)
    whole = json.loads((runs / "one" / "results.json").read_text())
    assert results["eval_loss"] == pytest.approx(whole["eval_loss"], abs=1e-5)
    assert results["parameters"] == whole["parameters"]


def test_shards_lie_in_checkpoints_and_a_whole_model_at_the_end(runs, sharded, tmp_path):
    checkpoint = sharded / "checkpoint-6"
    parts = {path.parent.name: path.name for path in checkpoint.glob("*/__1_0.distcp")}
    assert set(parts) == {"pytorch_model_fsdp_0", "optimizer_0"}
    assert not (checkpoint / "model.safetensors").exists()
    assert is_whole(checkpoint)
    shutil.copytree(checkpoint, cut_off := tmp_path / "checkpoint-6")
    os.truncate(cut_off / "optimizer_0" / "__1_0.distcp", 99)
    assert not is_whole(cut_off)
    written = {path.name for path in sharded.iterdir()} - {"flight_recorder.json"}  # of the process that was left
    assert written == {path.name for path in (runs / "one").iterdir()}
    assert json.loads((sharded / "config.json").read_text()) == json.loads((runs / "one" / "config.json").read_text())
    one, other = (load_file(path / "model.safetensors") for path in (runs / "one", sharded))
    assert set(one) == set(other)
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)
    AutoModelForCausalLM.from_pretrained(sharded)


def test_one_process_goes_on_with_shards(runs, sharded, train):
    go_on(sharded, folder := runs / "shards to one")
    train(1, folder, "--use_cpu")
    assert losses(folder) == pytest.approx(losses(runs / "one"), abs=1e-5)
    assert json.loads((folder / "results.json").read_text())["resumed_at"] == 3


@pytest.fixture(scope="module")
def in_shards(told, runs, train, flags):
    """Folders of runs in shards, and what is told of them and of sharded models."""
    folders = {name: runs / f"in shards, {name}" for name in ("resumed", "whole checkpoints", "not finite", "bf16")}
    go_on(runs / "one", folders["resumed"])
    train(1, runs / "other", "--use_cpu", *OTHER)
    jobs = [
        {
            "state_dict": "SHARDED_STATE_DICT",
            "more": ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"],
        },
        {"state_dict": "FULL_STATE_DICT", "more": OTHER},
        {"state_dict": "SHARDED_STATE_DICT", "more": ["--gradient_accumulation_steps", "3"], "nan": 2},
        {"state_dict": "SHARDED_STATE_DICT", "more": ["--bf16", "true", "--torch_compile_backend", "eager"]},
    ]
    for job, folder in zip(jobs, folders.values(), strict=True):
        job["arguments"] = ["train", *flags, "--device", "cpu", "--output_dir", str(folder), *job.pop("more")]
    return folders, told("fsdp2", jobs)


def test_shards_go_on_with_one_process(runs, in_shards):
    folders, told = in_shards
    assert [rank["commands"][0]["code"] for rank in told] == [0, 0]
    assert losses(folders["resumed"]) == pytest.approx(losses(runs / "one"), abs=1e-5)


def test_another_family_its_geometry_and_entropy_regularisation_in_shards(runs, in_shards, train):
    folder = in_shards[0]["whole checkpoints"]
    assert losses(folder) == pytest.approx(losses(runs / "other"), abs=1e-5)
    assert any(key.startswith("specialisation/") for _, key in samples(folder))
    assert samples(folder) == pytest.approx(samples(runs / "other"), rel=1e-3, abs=1e-3)
    found, wanted = (json.loads((path / "results.json").read_text()) for path in (folder, runs / "other"))
    assert found["entropy_regularization"] == wanted["entropy_regularization"]
    go_on(folder, again := runs / "whole checkpoints to one")
    assert train(1, again, "--use_cpu", *OTHER) == ""
    assert losses(again) == pytest.approx(losses(runs / "other"), abs=1e-5)


def test_bfloat16_and_compiled_blocks_leave_losses_in_float32(runs, in_shards):
    """Accelerate alone rounds what a sharded model returns, its loss too, and compiles it as one, out of its shards."""
    folders, told = in_shards
    assert [rank["commands"][3]["code"] for rank in told] == [0, 0]
    found = losses(folders["bf16"])
    assert found == pytest.approx(losses(runs / "one"), abs=3e-2)
    held_out = json.loads((folders["bf16"] / "results.json").read_text())["eval_loss"]
    assert all(torch.tensor(loss).bfloat16().item() != loss for loss in (*found.values(), held_out))


def test_what_is_not_finite_on_one_process_is_named_on_all(in_shards):
    folders, told = in_shards
    for rank in told:
        assert rank["commands"][2]["code"] == 3
        (first,) = rank["commands"][2]["not finite"]
        assert first.startswith("layer 1, output of transformer.h.1.mlp: 64 of 2048")
        assert first.endswith("on process 1 of 2")
    record = json.loads((folders["not finite"] / "flight_recorder.json").read_text())
    assert record["events"][0]["first"] == first
    assert record["events"][0]["last_good_state"] == "checkpoint-1"


def test_fsdp2_trains_and_is_sampled_like_a_whole_model(in_shards):
    for rank in in_shards[1]:
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


def test_a_policy_that_was_asked_for_is_kept():
    half = torch.bfloat16
    assert in_full_precision(None) is None
    of_accelerate = MixedPrecisionPolicy(half, half, half)
    assert in_full_precision(of_accelerate) == MixedPrecisionPolicy(half, torch.float32, None)
    for asked in (MixedPrecisionPolicy(half, half, None), MixedPrecisionPolicy(half, torch.float32, half)):
        assert in_full_precision(asked) is asked


def test_moving_weights_to_the_cpu_they_are_on_is_refused():
    args = SimpleNamespace(fsdp_plugin_args={"fsdp_version": 2, "cpu_offload": True})
    if not torch.accelerator.is_available():
        with pytest.raises(RunError, match="fsdp_offload_params moves weights from an accelerator to the CPU"):
            shard_on_cpu(SimpleNamespace(state=SimpleNamespace()), args)


def test_shards_that_are_asked_for_and_not_made_are_refused(family, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RunError, match=r"FSDP was asked for, and would not shard a run of 1 on cpu \(NO\)"):
        LNFreeTrainer(family.model(), LNFreeTrainingArguments(str(tmp_path), use_cpu=True))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(RunError, match="DeepSpeed was asked for, and is not used on cpu"):
        require_deepspeed(SimpleNamespace(state=SimpleNamespace(), device=torch.device("cpu")))


@pytest.mark.parametrize("procedure", [NormRemoval("auto"), Procedure(lora_rank=2)])
def test_what_needs_whole_weights_is_refused_in_shards(procedure):
    with pytest.raises(ModelError, match=r"whole weights.*DDP"):
        procedure.attach(SimpleNamespace(is_fsdp_enabled=True), 10)
