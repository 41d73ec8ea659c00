"""Runs that stop being finite: named, judged, saved, stopped, skipped or rolled back, and seen from outside."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from hf_lnfree.cli.main import main
from hf_lnfree.data import DataArguments
from hf_lnfree.pages.finish import finish_run
from hf_lnfree.training import LNFreeTrainer, LNFreeTrainingArguments, ModelArguments, train
from hf_lnfree.training.divergence import MOST_ROLLBACKS, SCALER_PATIENCE, DivergenceGuard
from hf_lnfree.training.log import read_log
from hf_lnfree.training.results import RunResults
from hf_lnfree.training.steps import StepRecord

TINY = {"n_layer": 3, "n_embd": 32, "n_head": 2, "n_positions": 32, "initializer_range": 0.1, "embd_pdrop": 0.0}


@pytest.fixture
def run(corpus, cache_dir, tmp_path):
    def start(row="SM+G", overrides=TINY, **training):
        settings = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 8,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "probe_steps": 2,
            "save_steps": 2,
            "use_cpu": True,
            "disable_tqdm": True,
        }
        data = DataArguments(data=str(corpus), cache_dir=cache_dir, vocab_size=300, context_length=32)
        model = ModelArguments(row=row, config_overrides=overrides)
        return train(model, data, LNFreeTrainingArguments(**{**settings, **training}))

    return start


@pytest.fixture
def at_steps(monkeypatch):
    """Do something to the model before the given steps (counted from 1); what it returns is undone after the step."""

    def install(actions):
        def training_step(self, model, inputs, num_items_in_batch=None):
            action = actions.get(self.state.global_step + 1, lambda m: None)
            undo = action(model)
            try:
                return step(self, model, inputs, num_items_in_batch)
            finally:
                if undo is not None:
                    undo_later.append(undo)

        def on_step_begin(self, *args, **kwargs):
            while undo_later:
                undo_later.pop().remove()
            return begin(self, *args, **kwargs)

        undo_later: list = []
        step, begin = LNFreeTrainer.training_step, DivergenceGuard.on_step_begin
        monkeypatch.setattr(LNFreeTrainer, "training_step", training_step)
        monkeypatch.setattr(DivergenceGuard, "on_step_begin", on_step_begin)

    return install


@pytest.fixture
def after_step(monkeypatch):
    """Make one weight NaN after the given steps, as an optimiser does that overflows."""

    def install(*steps):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step + 1 in steps:
                with torch.no_grad():
                    model.transformer.h[1].attn.c_proj.weight[0, 0] = math.nan

        monkeypatch.setattr(DivergenceGuard, "on_optimizer_step", on_optimizer_step)

    return install


def spoil(layer, value=math.inf):
    """The MLP of a layer gives a value that is not finite, until the hook is removed."""

    def action(model):
        def hook(module, inputs, output):
            return output.index_fill(-1, torch.tensor([0]), value)

        return model.transformer.h[layer].mlp.register_forward_hook(hook)

    return action


def scale_attention(factor):
    def action(model):
        with torch.no_grad():
            for block in model.transformer.h:
                block.attn.c_attn.weight[:, :64] *= factor
                block.attn.c_attn.bias[:64] *= factor

    return action


def read(folder, name):
    return json.loads((folder / name).read_text())


def finite(path):
    return all(bool(x.isfinite().all()) for x in load_file(path).values())


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("layer", [0, 2])
def test_an_injected_value_is_named_and_the_state_before_it_saved(run, at_steps, tmp_path, layer, value):
    at_steps({5: spoil(layer, value)})
    results = run()
    folder = tmp_path / "run"
    assert results.diverged_at == 5
    assert math.isnan(results.eval_perplexity)
    event = results.nonfinite_events[0]
    assert event["tensor"] == {
        **{"kind": "output", "module": f"transformer.h.{layer}.mlp", "tensor": "output", "layer": layer},
        **{"count": 4 * 32, "size": 4 * 32 * 32},
    }
    assert event["last_good_state"] == "checkpoint-4"
    assert finite(folder / "checkpoint-4" / "model.safetensors")
    assert finite(folder / "model.safetensors")
    log = read_log(folder)
    assert math.isnan([entry["loss"] for entry in log if "loss" in entry][-1]) or math.isinf(log[-1]["loss"])
    assert [entry["nonfinite/events"] for entry in log if "nonfinite/events" in entry] == [1]
    record = read(folder, "flight_recorder.json")
    assert record["reason"] == "not finite at step 5"
    assert [step["step"] for step in record["steps"]] == [1, 2, 3, 4, 5]
    assert record["steps"][-1]["grad_norm"] is None  # strict JSON has no other word for what is not finite
    assert [sample["step"] for sample in record["samples"]] == [0, 2, 4]


def test_files_of_a_diverged_run_are_strict_json(run, at_steps, tmp_path):
    at_steps({5: spoil(1, math.nan)})
    results = run()
    texts = {path.name: path.read_text() for path in (tmp_path / "run").glob("*.json")}
    assert {"results.json", "flight_recorder.json", "choices.json", "entropy.json", "config.json"} <= set(texts)
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    for name, text in [*texts.items(), *(("log.jsonl", line) for line in log)]:
        json.loads(text, parse_constant=lambda word, name=name: pytest.fail(f"{name} holds {word}"))
    assert json.loads(texts["results.json"])["eval_loss"] is None
    assert any('"loss": null' in line for line in log)
    again = RunResults.load(tmp_path / "run")
    assert again.diverged
    assert all(math.isnan(loss) for loss in (again.eval_loss, again.eval_perplexity, results.eval_loss))
    assert math.isnan([entry["loss"] for entry in read_log(tmp_path / "run") if "loss" in entry][-1])


def test_spoilt_weights_point_to_the_newest_checkpoint(run, at_steps, tmp_path):
    def action(model):
        with torch.no_grad():
            model.transformer.h[1].attn.c_proj.weight[0, 0] = math.nan

    at_steps({4: action})
    event = run().nonfinite_events[0]
    assert event["first"] == "layer 1, weight of transformer.h.1.attn.c_proj: 1 of 1024 entries not finite"
    assert event["verdict"] == "sudden" or event["verdict"] == "entropic overload"
    assert event["last_good_state"] == "checkpoint-2"
    assert finite(tmp_path / "run" / "checkpoint-2" / "model.safetensors")


def saved(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_a_state_that_is_not_finite_drives_no_good_one_out(run, after_step, tmp_path):
    after_step(4)
    results = run(save_total_limit=1, probe_steps=0)
    assert results.diverged_at == 4
    event = results.nonfinite_events[0]
    assert event["last_good_state"] == "checkpoint-2"
    assert event["first"].startswith("layer 1, weight of transformer.h.1.attn.c_proj")
    assert saved(tmp_path / "run") == ["checkpoint-2"]
    model, good = (load_file(tmp_path / "run" / f / "model.safetensors") for f in ("", "checkpoint-2"))
    assert all(torch.equal(model[key], good[key]) for key in good)


def test_a_rate_that_overflows_leaves_no_checkpoint_and_no_model(run, tmp_path):
    results = run(learning_rate=1e38, save_steps=1, probe_steps=0, weight_decay=10.0, lr_scheduler_type="constant")
    assert results.diverged_at == 1
    assert results.nonfinite_events[0]["last_good_state"].startswith("none: ")
    assert not list((tmp_path / "run").glob("**/model.safetensors"))
    finish_run(tmp_path / "run", SimpleNamespace(process_index=0, hub_model_id=None, push_to_hub=False))
    card = (tmp_path / "run" / "README.md").read_text()
    assert "There is no model to load: the run left no state that was finite." in card
    assert "from_pretrained" not in card


def test_moments_that_are_not_finite_are_not_saved_either(run, monkeypatch, tmp_path):
    """Their weights would stand still for the rest of a resumed run."""

    def overflow(self, args, state, control, optimizer=None, model=None, **kwargs):
        if state.global_step + 1 == 4:
            optimizer.state[model.transformer.wte.weight]["exp_avg_sq"][0, 0] = math.inf

    monkeypatch.setattr(DivergenceGuard, "on_optimizer_step", overflow)
    results = run()
    assert (results.diverged_at, saved(tmp_path / "run")) == (4, ["checkpoint-2"])
    assert results.nonfinite_events[0]["first"] == "exp_avg_sq of transformer.wte.weight"


def test_rollback_remembers_only_what_is_finite(run, after_step, tmp_path):
    after_step(4)
    results = run(on_nonfinite="rollback")
    assert [(e["step"], e["action"]) for e in results.nonfinite_events] == [(4, "rollback")]
    assert (results.steps, results.diverged_at) == (8, None)
    assert math.isfinite(results.eval_loss)
    assert all(finite(path / "model.safetensors") for path in (tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_a_last_step_that_spoils_the_weights_is_no_end(run, after_step, tmp_path, action):
    after_step(8)
    results = run(probe_steps=0, save_steps=3, on_nonfinite=action)
    assert results.diverged_at == 8
    assert math.isnan(results.eval_loss)
    model, good = (load_file(tmp_path / "run" / f / "model.safetensors") for f in ("", "checkpoint-6"))
    assert all(torch.equal(model[key], good[key]) for key in good)


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_a_run_of_which_no_step_was_taken_is_not_finished(run, at_steps, action):
    at_steps(dict.fromkeys(range(1, 7), spoil(0)))
    results = run(on_nonfinite=action, max_steps=6)
    assert results.diverged_at == 6
    assert [e["action"] for e in results.nonfinite_events] == [action] * 6
    assert results.nonfinite_events[-1]["last_good_state"] == "none: no step was taken"


def test_a_deep_model_without_norms_at_a_large_rate_overflows(run, tmp_path):
    deep = {**TINY, "n_layer": 16}
    results = run(overrides=deep, learning_rate=30.0, max_grad_norm=0.0, max_steps=40, warmup_steps=0)
    assert results.diverged_at is not None
    event = results.nonfinite_events[0]
    assert event["verdict"] in ("overflow", "entropy collapse")
    assert "entries not finite" in event["first"]
    assert (tmp_path / "run" / event["last_good_state"]).is_dir()
    assert "diverged" not in results.choices


def test_collapse_and_overload_are_told_apart(run, at_steps, tmp_path):
    """Attention made sharp, or uniform, two steps before a value is injected."""
    at_steps({3: scale_attention(300.0), 5: spoil(2)})
    collapse = run(learning_rate=1e-6).nonfinite_events[0]
    assert collapse["verdict"] == "entropy collapse"
    at_steps({3: scale_attention(0.0), 5: spoil(2)})
    sharp = {**TINY, "initializer_range": 0.5}  # heads that are not near the maximum from the start
    overload = run(overrides=sharp, learning_rate=1e-6, output_dir=str(tmp_path / "other")).nonfinite_events[0]
    assert overload["verdict"] == "entropic overload"
    assert "overloaded 100%" in overload["figures"]


def test_a_young_model_is_not_judged_by_what_it_was_at_first(run, at_steps):
    at_steps({3: spoil(2)})
    event = run(learning_rate=1e-6).nonfinite_events[0]
    assert event["verdict"] == "sudden"
    assert "overloaded 100% (at first 100%)" in event["figures"]


def test_skip_leaves_the_weights_and_goes_on(run, at_steps, tmp_path):
    before = {}

    def look(model):
        before.update({n: p.detach().clone() for n, p in model.named_parameters()})
        return spoil(1)(model)

    def compare(model):
        after = dict(model.named_parameters())
        assert all(torch.equal(after[name], value) for name, value in before.items())
        before["seen"] = torch.ones(())

    at_steps({3: look, 4: lambda model: None if "seen" in before else compare(model)})
    results = run(on_nonfinite="skip")
    assert "seen" in before
    assert (results.steps, results.diverged_at) == (8, None)
    assert math.isfinite(results.eval_perplexity)
    assert [(e["step"], e["action"]) for e in results.nonfinite_events] == [(3, "skip")]


def test_a_resumed_run_remembers_what_was_skipped(run, at_steps, tmp_path):
    at_steps({3: spoil(1)})
    run(on_nonfinite="skip")
    for name in ("checkpoint-6", "checkpoint-8"):
        shutil.rmtree(tmp_path / "run" / name)
    (tmp_path / "run" / "results.json").unlink()
    results = run(on_nonfinite="skip", resume_from_checkpoint="last")
    assert results.resumed_at == 4
    assert [(e["step"], e["action"]) for e in results.nonfinite_events] == [(3, "skip")]


def test_what_was_skipped_is_told_where_only_the_results_were_missing(run, at_steps, tmp_path):
    at_steps({3: spoil(1)})
    run(on_nonfinite="skip")
    (tmp_path / "run" / "results.json").unlink()
    results = run(on_nonfinite="skip", resume_from_checkpoint="last")
    assert results.resumed_at == 8
    assert [(e["step"], e["action"]) for e in results.nonfinite_events] == [(3, "skip")]


def test_rollback_restores_the_last_sample_and_halves_the_rate(run, at_steps, tmp_path):
    kept = {}

    def remember(model):
        kept["good"] = {n: p.detach().clone() for n, p in model.named_parameters()}

    def compare(model):
        kept["same"] = all(torch.equal(p, kept["good"][n]) for n, p in model.named_parameters())

    at_steps({3: remember, 4: spoil(0), 5: compare})
    results = run(on_nonfinite="rollback", lr_scheduler_type="constant")
    assert kept["same"]
    assert (results.steps, results.diverged_at) == (8, None)
    log = read_log(tmp_path / "run")
    rates = [entry["learning_rate"] for entry in log if "learning_rate" in entry]
    assert rates == pytest.approx([1e-3] * 4 + [5e-4] * 4)  # the step that is not taken is logged with the old rate
    finite_losses = [math.isfinite(entry["loss"]) for entry in log if "loss" in entry]
    assert finite_losses == [True] * 3 + [False] + [True] * 4


def test_rollback_gives_up(run, at_steps):
    at_steps(dict.fromkeys(range(2, 40), spoil(0)))
    results = run(on_nonfinite="rollback", max_steps=30, save_strategy="no")
    assert results.diverged_at == 2 + MOST_ROLLBACKS
    assert [e["action"] for e in results.nonfinite_events] == ["rollback"] * MOST_ROLLBACKS + ["stop"]


def test_a_run_that_dies_otherwise_leaves_its_record(run, at_steps, tmp_path):
    def crash(model):
        raise MemoryError("no room")

    at_steps({6: crash})
    with pytest.raises(MemoryError):
        run(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    record = read(tmp_path / "run", "flight_recorder.json")
    assert record["reason"] == "MemoryError: no room"
    assert [sample["step"] for sample in record["samples"]] == [0, 2, 4]
    logged = [entry for entry in read_log(tmp_path / "run") if "loss" in entry]
    for key in ("step", "loss", "grad_norm", "learning_rate"):
        assert [step[key] for step in record["steps"]] == pytest.approx([entry[key] for entry in logged[:5]], rel=1e-5)
    assert len(record["steps"]) == 5
    assert {"residual_rms/layer_02", "attention_logit/layer_00", "grad_norm/layer_01", "sparsity/layer_00"} <= set(
        record["samples"][-1]
    )


def test_layer_gradient_norms_add_up_to_the_whole_before_clipping(run, tmp_path):
    run(max_grad_norm=0.01, max_steps=2)
    log = read_log(tmp_path / "run")
    layers = next(entry for entry in log if "grad_norm/layer_00" in entry)
    whole = next(entry["grad_norm"] for entry in log if entry["step"] == 2 and "loss" in entry)
    assert whole > 0.05
    parts = [value for key, value in layers.items() if key.startswith("grad_norm/")]
    assert math.sqrt(sum(x * x for x in parts)) == pytest.approx(whole, rel=1e-3)


def test_a_loss_scaler_may_search_for_a_while():
    """Infinite gradients with a finite loss are its business, until it has failed too often."""
    loss = torch.tensor(2.0)
    step = StepRecord([({}, loss)])

    def guard():
        around = dict.fromkeys(("loss", "folder", "save", "spoilt", "skipped", "drop_gradients"))
        return DivergenceGuard(SimpleNamespace(step=step), scaler=object, gather=lambda losses: losses, **around)

    patient = guard()
    assert [patient.is_divergence() for _ in range(SCALER_PATIENCE + 1)] == [False] * SCALER_PATIENCE + [True]
    step.batches = [({}, loss), ({}, loss * math.nan)]
    assert guard().is_divergence()


def test_steps_that_a_loss_scaler_skips_are_not_taken(run, monkeypatch):
    """Every step of a run that ends before the scaler's patience does."""
    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", property(lambda self: True))
    results = run(max_steps=3)
    assert (results.steps, results.diverged_at) == (3, 3)
    assert results.nonfinite_events[-1]["last_good_state"] == "none: no step was taken"
    assert results.nonfinite_events[-1]["first"] == "gradients, at every loss scale that was tried"


def test_a_run_says_at_its_end_that_no_model_was_saved(corpus, cache_dir, tmp_path, capsys):
    flags = ["--data", str(corpus), "--cache-dir", cache_dir, "--vocab-size", "300", "--context-length", "32"]
    flags += [
        "--config-overrides",
        json.dumps(TINY),
        "--row",
        "SM+G",
        "--learning-rate",
        "1e38",
        "--weight-decay",
        "10",
    ]
    flags += ["--max-steps", "3", "--device", "cpu", "--out", str(tmp_path / "run"), "--probe-steps", "0"]
    assert main(["train", *flags, "--lr-scheduler-type", "constant"]) == 3
    printed = " ".join(capsys.readouterr().out.split())
    assert "No model was saved: no state of the run was finite." in printed


def test_divergence_is_seen_in_the_exit_code_and_in_print(corpus, cache_dir, tmp_path, capsys):
    flags = ["--data", str(corpus), "--cache_dir", cache_dir, "--vocab_size", "300", "--context_length", "32"]
    flags += ["--config_overrides", json.dumps(TINY), "--row", "SM+G", "--learning_rate", "1e6", "--max_grad_norm", "0"]
    flags += ["--max_steps", "30", "--use_cpu", "--output_dir", str(tmp_path / "run"), "--warmup_steps", "0"]
    assert main(["train", *flags]) == 3
    printed = " ".join(capsys.readouterr().out.split())
    assert "The run diverged at step" in printed
    assert "Last good state: " in printed
    assert "eval perplexity not finite" in printed
