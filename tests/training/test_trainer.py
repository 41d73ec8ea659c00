"""Training: resume to the bit, slopes and decay, the probe, divergence, two processes, guarded folders."""

import json
import math
import os
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Adafactor, Trainer, TrainingArguments
from transformers.trainer_utils import HPSearchBackend

from hf_lnfree import LNFreeTrainingArguments
from hf_lnfree.data import DataArguments
from hf_lnfree.models import named_slopes
from hf_lnfree.training import LNFreeTrainer, ModelArguments, train
from hf_lnfree.training.beginning import Beginning
from hf_lnfree.training.log import read_log
from hf_lnfree.training.restoring import keep_dtypes, load_weights

from ..conftest import GPT2

TINY = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 32, "initializer_range": 0.1}
NEOX = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
SMALL = {"gpt2": TINY, "gpt_neox": {**NEOX, "max_position_embeddings": 32, "initializer_range": 0.1}}


@pytest.fixture
def arguments(corpus, cache_dir, tmp_path):
    def build(row="SM+LearnableR-layer", folder="run", overrides=TINY, family="gpt2", **training):
        settings = {
            "output_dir": str(tmp_path / folder),
            "max_steps": 12,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "logging_steps": 2,
            "probe_steps": 4,
            "save_steps": 6,
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 3,
        }
        data = DataArguments(data=str(corpus), cache_dir=cache_dir, vocab_size=300, context_length=32)
        model = ModelArguments(family=family, row=row, config_overrides=overrides)
        return model, data, LNFreeTrainingArguments(**{**settings, **training})

    return build


def test_a_run_leaves_everything_it_rests_on(arguments, tmp_path):
    results = train(*arguments())
    folder = tmp_path / "run"
    files = {"model.safetensors", "config.json", "tokenizer.json", "log.jsonl", "entropy.json", "results.json"}
    assert files <= set(os.listdir(folder))
    assert not {"entropy.svg", "README.md"} & set(os.listdir(folder))  # what shows a run is made by rooms above
    written = json.loads((folder / "results.json").read_text())
    assert written["eval_perplexity"] == results.eval_perplexity == pytest.approx(math.exp(results.eval_loss))
    assert written["tokens"] == 12 * 4 * 32
    assert len(written["data"]["train"]["sha256"]) == 64
    assert written["environment"]["transformers"]
    assert written["model"]["activation_function"] == "learnable_leaky_relu"
    assert json.loads((folder / "config.json").read_text())["use_cache"] is True
    assert str(os.path.expanduser("~")) not in (folder / "results.json").read_text()


def test_probe_reaches_log_history_and_jsonl_beside_the_losses(arguments, tmp_path):
    train(*arguments())
    log = read_log(tmp_path / "run")
    probes = [entry for entry in log if "entropy/mean" in entry]
    assert [entry["step"] for entry in probes] == [0, 4, 8, 12]
    assert {"entropy/layer_00", "entropy/layer_01", "slope/layer_00", "slope/layer_01"} <= set(probes[0])
    assert probes[0]["slope/layer_00"] == pytest.approx(0.01)
    assert probes[-1]["slope/layer_00"] != pytest.approx(0.01)
    assert probes[0]["nonfinite/parameters"] == probes[0]["nonfinite/attention_rows"] == 0
    assert [entry["step"] for entry in log if "loss" in entry] == [2, 4, 6, 8, 10, 12]


def test_no_step_materialises_attention_maps(arguments, monkeypatch, tmp_path):
    import transformers.models.gpt2.modeling_gpt2 as gpt2

    def eager(*args, **kwargs):
        raise AssertionError("neither training nor the probe nor the report looks at a map")

    monkeypatch.setattr(gpt2, "eager_attention_forward", eager)
    wide = {**TINY, "initializer_range": 0.3}  # heads that differ
    results = train(*arguments(row="SM+LN+G", overrides=wide))
    assert results.steps == 12
    report = json.loads((tmp_path / "run" / "entropy.json").read_text())
    shares = torch.tensor(report["entropy"]) / torch.tensor(report["bound"])
    assert results.overloaded_heads == (shares > 0.75).double().mean().item()
    assert results.collapsed_heads == (shares <= 0.25).double().mean().item()


@pytest.mark.parametrize("row", ["SM+LearnableR-global", "SM+LN+G"])
def test_resume_is_bit_exact(arguments, tmp_path, family, row):
    built = {"row": row, "family": family.name, "overrides": SMALL[family.name]}
    train(*arguments(**built, folder="straight"))
    model, data, whole = arguments(**built, folder="halves")
    train(model, data, whole)
    (tmp_path / "halves" / "results.json").unlink()
    for name in ("checkpoint-12", "model.safetensors"):
        target = tmp_path / "halves" / name
        subprocess.run(["rm", "-r", target], check=True)
    train(*arguments(**built, folder="halves", resume_from_checkpoint="last"))
    straight, halves = (load_file(tmp_path / f / "model.safetensors") for f in ("straight", "halves"))
    assert all(torch.equal(straight[key], halves[key]) for key in straight)

    def measured(folder):
        keys = ("step", "loss", "entropy/mean", "slope/global")
        return [{k: entry[k] for k in keys if k in entry} for entry in read_log(tmp_path / folder) if "loss" in entry]

    assert measured("halves") == measured("straight")


@pytest.mark.parametrize("how", ["missing", "unexpected", "of another shape", "not finite"])
def test_a_checkpoint_that_does_not_fit_is_refused(family, tmp_path, how):
    model = family.model()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    name = next(iter(stored))
    if how == "missing":
        del stored[name]
    else:
        changed = {"unexpected": {"head": stored[name].clone()}, "of another shape": {name: stored[name][:1].clone()}}
        stored |= changed.get(how, {name: stored[name] * math.nan})
    save_file(stored, tmp_path / "model.safetensors")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"cannot be gone on with: 1 of its tensors"):
        load_weights(model, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("shards", ["1GB", "20KB"])
def test_what_is_saved_is_what_is_loaded(family, tmp_path, shards):
    source, target = family.model(seed=0), family.model(seed=1)
    source.save_pretrained(tmp_path, max_shard_size=shards)
    assert (tmp_path / "model.safetensors").exists() == (shards == "1GB")
    load_weights(target, tmp_path)
    wanted = source.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in target.state_dict().items())


def test_states_of_an_optimiser_keep_their_dtype(tmp_path):
    """Adafactor has float32 moments of bfloat16 weights; a step from a saved state is the step from the state."""
    torch.manual_seed(0)

    def made(values):
        weights = nn.Parameter(values.clone())
        optimizer = Adafactor([weights], lr=1e-2, relative_step=False, scale_parameter=False)
        keep_dtypes(optimizer)
        return weights, optimizer

    def step(weights, optimizer, gradient):
        weights.grad = gradient
        optimizer.step()

    gradients = torch.randn(4, 16, 16).bfloat16()
    straight = made(torch.randn(16, 16).bfloat16())
    for gradient in gradients[:3]:
        step(*straight, gradient)
    torch.save(straight[1].state_dict(), tmp_path / "optimizer.pt")
    again = made(straight[0].data)
    again[1].load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert again[1].state[again[0]]["exp_avg_sq_row"].dtype == torch.float32
    for weights, optimizer in (straight, again):
        step(weights, optimizer, gradients[3])
    assert torch.equal(again[0], straight[0])
    assert torch.equal(again[1].state[again[0]]["exp_avg_sq_col"], straight[1].state[straight[0]]["exp_avg_sq_col"])


SETTINGS = {"learning_rate": 5e-3, "seed": 4, "max_steps": 13, "row": "SM+G", "data": None, "validation_fraction": 0.1}


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_goes_on_as_it_was_begun_or_not_at_all(arguments, corpus, tmp_path, finished):
    train(*arguments(save_steps=12))
    folder = tmp_path / "run"
    if not finished:
        (folder / "results.json").unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    longer = shutil.copytree(corpus, tmp_path / "longer")
    (longer / "one_more.py").write_text("x = 1\n" * 200)
    for name, value in SETTINGS.items():
        here = {name: value} if name in ("learning_rate", "seed", "max_steps", "row") else {}
        model, data, args = arguments(resume_from_checkpoint="auto", **here)
        if not here:
            setattr(data, name, str(longer) if name == "data" else value)
        with pytest.raises(ValueError, match=rf"begun with other settings \({name} was .*, is .*\)\. Undo the change"):
            train(model, data, args)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_learning_rate_is_named_with_both_values(arguments):
    train(*arguments(max_steps=2))
    with pytest.raises(
        ValueError, match=r"learning_rate was 0.01, is 0.005\)\. Undo the change, or give another --out"
    ):
        train(*arguments(max_steps=2, resume_from_checkpoint="last", learning_rate=5e-3))


def test_a_corpus_that_has_changed_is_told_by_its_hash(arguments, corpus, tmp_path):
    model, data, args = arguments(save_steps=12)
    data.data = str(shutil.copytree(corpus, tmp_path / "own"))
    train(model, data, args)
    (tmp_path / "run" / "results.json").unlink()
    (tmp_path / "own" / "one_more.py").write_text("x = 1\n" * 200)
    args.resume_from_checkpoint = "auto"
    with pytest.raises(ValueError, match=r"train_sha256 was \w{12}, is \w{12}; .*tokenizer_sha256 was"):
        train(model, data, args)


def test_what_no_result_depends_on_may_change_and_is_recorded(arguments, tmp_path):
    train(*arguments())
    (tmp_path / "run" / "results.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-12")
    results = train(*arguments(resume_from_checkpoint="auto", save_steps=5, logging_steps=3, probe_steps=0))
    assert results.resumed_at == 6
    begun = Beginning.load(tmp_path / "run")
    assert {(change["step"], change["name"], change["was"], change["is"]) for change in begun.changes} == {
        (6, "save_steps", 6, 5),
        (6, "logging_steps", 2, 3),
        (6, "probe_steps", 4, 0),
        (6, "resume_from_checkpoint", None, "auto"),
    }
    assert begun.settings["training"]["save_steps"] == 5


def test_the_windows_of_a_step_may_be_shared_out_otherwise(arguments, tmp_path, monkeypatch):
    def resumed(**changes):
        return train(*arguments(resume_from_checkpoint="auto", **changes)).resumed_at

    train(*arguments())
    (tmp_path / "run" / "results.json").unlink()
    with pytest.raises(ValueError, match="per_device_train_batch_size was 4, is 2"):
        resumed(per_device_train_batch_size=2)
    two = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    with monkeypatch.context() as patch:
        patch.setattr("hf_lnfree.training.beginning.environment", lambda device: {"processes": 2})
        with pytest.raises(ValueError, match=r"gradient_accumulation_steps was 1, is 2.*processes was 1, is 2"):
            resumed(**two)
    assert resumed(**two) == 12


@pytest.mark.parametrize("warmup", [0, 0.5])
def test_a_run_at_a_constant_rate_may_train_on_until_it_is_finished(arguments, tmp_path, warmup):
    settings = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": warmup, "save_steps": 2}
    train(*arguments(max_steps=2, **settings))
    longer = arguments(max_steps=4, **settings, resume_from_checkpoint="auto")
    with pytest.raises(ValueError, match="max_steps was 2, is 4"):
        train(*longer)
    (tmp_path / "run" / "results.json").unlink()
    if warmup:  # half of the steps, of which there would be more
        with pytest.raises(ValueError, match="max_steps was 2, is 4"):
            train(*longer)
    else:
        assert train(*longer).resumed_at == 2


def test_a_finished_run_is_left_alone(arguments, tmp_path):
    results = train(*arguments(max_steps=2))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != ".lock"}
    for wanted in ("auto", "last"):
        again = train(*arguments(max_steps=2, resume_from_checkpoint=wanted))
        assert (again.eval_loss, again.steps) == (results.eval_loss, 2)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != ".lock"}


def test_a_run_says_first_what_it_is_going_to_be(arguments, tmp_path, caplog, monkeypatch):
    """Size, data, steps, tokens, rate and folder, before the first step; then how long it is going to take."""
    seconds = iter(range(0, 10**6, 100))
    monkeypatch.setattr("hf_lnfree.training.progress.time", SimpleNamespace(perf_counter=lambda: float(next(seconds))))
    with caplog.at_level("INFO", logger="hf_lnfree"):
        results = train(*arguments(row="SM+R", max_steps=6))
    said = [record.getMessage() for record in caplog.records]
    model, data, training, folder = (next(x for x in said if x.startswith(f"{w}: ")) for w in WORDS)
    assert model == f"Model: a new gpt2, row SM+R, {results.parameters / 1e6:.2f} million parameters."
    windows = results.data["train"]["windows"]
    assert f"{windows:,} windows of 32 tokens; {results.data['validation']['used']:,} held out." in data
    assert f"6 steps of 4 windows, {results.tokens:,} tokens" in training
    assert training.endswith("learning rate 0.01, on cpu.")
    assert folder == f"Folder: {tmp_path / 'run'}"
    forecast = [x for x in said if x.startswith("About ")]
    assert len(forecast) == 1
    assert "2 steps of " in forecast[0]
    assert said.index(folder) < said.index(forecast[0])


WORDS = ("Model", "Data", "Training", "Folder")


def test_a_run_of_an_earlier_version_goes_on_with_a_warning(arguments, tmp_path, caplog):
    train(*arguments())
    for name in ("results.json", "run.json"):
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-12")
    assert train(*arguments(resume_from_checkpoint="auto")).resumed_at == 6
    assert "has no run.json, so its settings cannot be compared" in caplog.text


def test_a_finished_run_of_an_earlier_version_is_compared_with_its_results(arguments, tmp_path):
    train(*arguments(max_steps=2))
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(ValueError, match=r"learning_rate was 0.01, is 0.005"):
        train(*arguments(max_steps=2, resume_from_checkpoint="auto", learning_rate=5e-3))
    assert train(*arguments(max_steps=2, resume_from_checkpoint="auto")).steps == 2


@pytest.mark.parametrize("how", [None, "auto"])
def test_a_folder_of_somebody_else_is_refused_before_anything_is_read(arguments, family, tmp_path, how):
    folder = tmp_path / "run"
    family.model().save_pretrained(folder)
    model, data, args = arguments(resume_from_checkpoint=how)
    data.data = str(tmp_path / "nowhere")
    before = sorted(folder.iterdir())
    with pytest.raises(ValueError, match=r"is not empty and holds no run: .*config.json, .*Give another --out"):
        train(model, data, args)
    assert sorted(folder.iterdir()) == before


def test_a_run_that_was_killed_before_its_first_checkpoint_may_begin_anew(arguments, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (".lock", "choices.json", "flight_recorder.json", "log.jsonl", ".partial-1"):
        (folder / name).write_text("{}")
    assert train(*arguments(max_steps=1)).steps == 1


def test_slopes_get_no_decay_unless_asked(family, input_ids, tmp_path):
    model = family.model(activation="learnable_leaky_relu")
    slopes = {id(p) for p in named_slopes(model).values()}
    for wanted, expected in ((None, 0.0), (0.1, 0.1), (0.02, 0.02)):
        args = LNFreeTrainingArguments(tmp_path, weight_decay=0.1, slope_weight_decay=wanted, use_cpu=True)
        trainer = LNFreeTrainer(model, args, train_dataset=[{"input_ids": input_ids[0]}])
        groups = trainer.create_optimizer().param_groups
        found = [(g["weight_decay"], id(p)) for g in groups for p in g["params"] if id(p) in slopes]
        assert sorted(found) == sorted((expected, s) for s in slopes)
        assert sum(p.numel() for g in groups for p in g["params"]) == model.num_parameters()
    relu = family.model(activation="relu")
    trainer = LNFreeTrainer(relu, args, train_dataset=[{"input_ids": input_ids[0]}])
    assert len(trainer.create_optimizer().param_groups) == 2


def test_the_card_of_a_finished_run_stays(family, tmp_path):
    """Before that, and where there is none, the host's draft stands there."""
    trainer = LNFreeTrainer(family.model(), LNFreeTrainingArguments(str(tmp_path), use_cpu=True))
    trainer.create_model_card(model_name="mine")
    assert "# mine" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("what the run recorded")
    (tmp_path / "results.json").write_text("{}")
    trainer.create_model_card(model_name="mine")
    assert (tmp_path / "README.md").read_text() == "what the run recorded"


def test_layernorm_mode_trains_like_stock_under_the_hosts_trainer(family, tmp_path):
    """Same seed, same data, transformers' own Trainer: the same losses and the same weights."""
    windows = torch.randint(3, 99, (32, 16), generator=torch.Generator().manual_seed(0))
    examples = [{"input_ids": ids, "labels": ids} for ids in windows]
    outcomes = []
    for model in (family.model(norm="layernorm"), family.stock_model()):
        model.loss_type = "ForCausalLM"  # stock GPT2LMHeadModel has none, and is divided by S instead of S-1
        settings = {"max_steps": 5, "learning_rate": 1e-2, "logging_steps": 1, "seed": 0, "save_strategy": "no"}
        args = TrainingArguments(
            tmp_path, **settings, use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, weight_decay=0.1
        )
        trainer = Trainer(model, args, train_dataset=examples)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        outcomes.append((losses, model.state_dict()))
    (ours, our_weights), (stock, stock_weights) = outcomes
    assert ours == stock
    assert [key for key in our_weights if not torch.equal(our_weights[key], stock_weights[key])] == []


def losses(folder):
    return [entry["loss"] for entry in read_log(folder) if "loss" in entry]


# transformers 5.24 renamed it.
RENAMED = "activation_checkpointing"
CHECKPOINTING = RENAMED if hasattr(TrainingArguments, RENAMED) else "gradient_checkpointing"
STEADY = {"row": "SM+R", "overrides": TINY | {"embd_pdrop": 0.0}, "logging_steps": 1, "save_strategy": "no"}


def test_accumulated_gradients_equal_those_of_the_large_batch(arguments, tmp_path):
    train(*arguments(folder="large", **STEADY))
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    train(*arguments(folder="halves", **{**STEADY, **halves}))
    assert losses(tmp_path / "halves") == pytest.approx(losses(tmp_path / "large"), abs=2e-6)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({CHECKPOINTING: True}, 0.0),
        ({"loss": "chunked"}, 1e-5),
        ({"torch_compile": True, "torch_compile_backend": "aot_eager"}, 1e-5),
        ({"torch_compile": True, "torch_compile_backend": "aot_eager", "loss": "chunked"}, 1e-5),
        ({"bf16": True}, 3e-2),
    ],
    ids=["checkpointing", "chunked", "compiled", "compiled, chunked", "bf16"],
)
@pytest.mark.filterwarnings("ignore:.*script_method. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo looks
def test_what_makes_a_run_faster_or_smaller_keeps_its_losses(arguments, tmp_path, options, tolerance):
    train(*arguments(folder="plain", **STEADY))
    results = train(*arguments(folder="other", **STEADY, **options))
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "plain"), abs=tolerance)
    assert results.choices["loss"] == options.get("loss", "plain")
    assert results.choices["attn_implementation"] == ("eager" if "bf16" in options else "sdpa")
    sampled = [entry for entry in read_log(tmp_path / "other") if "sparsity/layer_01" in entry]
    assert [entry["step"] for entry in sampled] == [0, 4, 8, 12]
    assert 0 < sampled[-1]["sparsity/layer_01"] < 1


def test_divergence_is_nan_in_the_log_and_stops_the_run(arguments, tmp_path):
    results = train(*arguments(row="SM+G", learning_rate=1e4, max_grad_norm=0.0, max_steps=40))
    assert results.diverged_at is not None
    assert results.steps < 40
    assert math.isnan(results.eval_perplexity)
    losses = [entry["loss"] for entry in read_log(tmp_path / "run") if "loss" in entry]
    assert math.isnan(losses[-1])


def test_an_earlier_run_is_never_overwritten(arguments, tmp_path):
    train(*arguments())
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"holds an earlier run.*--resume-from-checkpoint last"):
        train(*arguments())
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match="no checkpoint to resume"):
        train(*arguments(folder="fresh", resume_from_checkpoint="last"))
    with pytest.raises(ValueError, match="not a checkpoint"):
        train(*arguments(folder="fresh", resume_from_checkpoint=str(tmp_path)))


def test_what_does_not_fit_is_refused_before_anything_is_written(arguments, tmp_path):
    with pytest.raises(ValueError, match=r"300 entries and the model's vocabulary 100"):
        train(*arguments(overrides={**TINY, "vocab_size": 100}))
    model, data, args = arguments()
    train(*arguments(folder="small"))
    model.model_name_or_path, model.config_overrides = str(tmp_path / "small"), "{}"
    data.context_length = 64
    with pytest.raises(ValueError, match=r"32 positions, fewer than --context-length 64"):
        train(model, data, args)
    assert not (tmp_path / "run").exists()


def test_continues_from_a_checkpoint_of_another_run(arguments, tmp_path):
    train(*arguments(folder="first"))
    model, data, args = arguments(folder="second", max_steps=2)
    model.model_name_or_path, model.config_overrides = str(tmp_path / "first"), "{}"
    data.vocab_size = 290  # of a tokenizer that would fit the model, but is not its own
    first = json.loads((tmp_path / "first" / "results.json").read_text())
    log_start = train(model, data, args)
    assert log_start.train_loss == pytest.approx(first["eval_loss"], rel=0.3)
    assert (tmp_path / "second" / "tokenizer.json").read_text() == (tmp_path / "first" / "tokenizer.json").read_text()


def test_a_run_is_called_what_it_is(arguments, tmp_path):
    model, data, args = arguments(row="SM+R", overrides={**TINY, "norm": "dyt"}, max_steps=1)
    assert train(model, data, args).row == "SM+R (norm: dyt)"
    assert json.loads((tmp_path / "run" / "entropy.json").read_text())["name"] == "SM+R (norm: dyt)"
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    (tmp_path / "run" / "results.json").write_text(json.dumps(results | {"base_model": "owner/name"}))
    model, data, args = arguments(folder="second", max_steps=1)
    model.model_name_or_path, model.config_overrides = str(tmp_path / "run"), "{}"
    data.tokenizer = str(tmp_path / "run")
    assert train(model, data, args).base_model == "owner/name"


def test_every_trial_of_a_search_has_a_log_of_its_own(family, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)  # optuna is not here
    windows = torch.randint(3, 99, (8, 16), generator=torch.Generator().manual_seed(0))
    examples = [{"input_ids": ids, "labels": ids} for ids in windows]
    args = LNFreeTrainingArguments(str(tmp_path), max_steps=2, logging_steps=1, use_cpu=True, save_strategy="no")
    trainer = LNFreeTrainer(model_init=lambda: family.model(), args=args, train_dataset=examples)
    trainer.hp_search_backend, trainer.hp_name = HPSearchBackend.OPTUNA, None
    trainer.hp_space = lambda trial: trial.params
    for number, rate in enumerate((1e-2, 1e-3)):
        trainer.train(trial=SimpleNamespace(number=number, params={"learning_rate": rate}))
    for number, rate in enumerate((1e-2, 1e-3)):
        logged = [entry for entry in read_log(tmp_path / f"run-{number}") if "loss" in entry]
        assert [entry["step"] for entry in logged] == [1, 2]
        assert logged[0]["learning_rate"] == rate
    assert not (tmp_path / "log.jsonl").exists()


def test_every_trial_of_a_search_has_guard_and_recorder_of_its_own(tmp_path, monkeypatch):
    """One that diverges leaves its record and its last good state in its folder, and the next one begins anew."""
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    windows = torch.randint(3, 99, (8, 16), generator=torch.Generator().manual_seed(0))
    examples = [{"input_ids": ids, "labels": ids} for ids in windows]
    args = LNFreeTrainingArguments(str(tmp_path), max_steps=3, use_cpu=True, save_strategy="no", logging_steps=1)
    trainer = LNFreeTrainer(model_init=lambda: GPT2.model(), args=args, train_dataset=examples)
    trainer.hp_search_backend, trainer.hp_name = HPSearchBackend.OPTUNA, None
    trainer.hp_space = lambda trial: trial.params
    step = LNFreeTrainer.training_step

    def spoilt(self, model, inputs, count=None):
        loss = step(self, model, inputs, count)
        if self.trial.number == 0 and self.state.global_step == 1:
            model.transformer.wte.weight.grad.fill_(math.nan)
        return loss

    monkeypatch.setattr(LNFreeTrainer, "training_step", spoilt)
    for number in (0, 1):
        trainer.train(trial=SimpleNamespace(number=number, params={"learning_rate": 1e-3}))
        assert trainer.guard.diverged_at == (2 if number == 0 else None)
    assert sorted(path.name for path in (tmp_path / "run-0").iterdir()) == [
        "checkpoint-1",
        "flight_recorder.json",
        "log.jsonl",
    ]
    assert [entry["step"] for entry in read_log(tmp_path / "run-1") if "loss" in entry] == [1, 2, 3]
    assert not {"checkpoint-1", "flight_recorder.json"} & {path.name for path in tmp_path.iterdir()}


def test_two_independent_runs_into_one_folder_are_refused(arguments, tmp_path):
    (tmp_path / "run").mkdir()
    # Held by another file descriptor, as another process would hold it.
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(ValueError, match="Another process is training into"):
        train(*arguments())
    train(*arguments())
    with FileLock(tmp_path / "run" / ".lock").acquire(timeout=0) as released:
        assert released.is_locked


def test_a_folder_is_one_runs_until_its_results_are_written(arguments, tmp_path, monkeypatch):
    def last_thing_before(*args):
        with pytest.raises(Timeout):
            FileLock(tmp_path / "run" / ".lock").acquire(timeout=0)

    monkeypatch.setattr("hf_lnfree.training.run.final_report", last_thing_before)
    train(*arguments())
