"""Norms removed by fine-tuning: the schedule, its ends, interruption at every stage, LoRA, other families."""

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTForCausalLM,
)

from hf_lnfree.cli.main import main
from hf_lnfree.conversion import fold, to_stock
from hf_lnfree.data import DataArguments
from hf_lnfree.data.tokenization import tokenizer_for
from hf_lnfree.models import LNFreeMixin, LNFreeOPTConfig, LNFreeOPTModel
from hf_lnfree.models.removal import RemovalNorm
from hf_lnfree.pages import finish_run, write_removal_report
from hf_lnfree.removal.arguments import RemovalArguments
from hf_lnfree.removal.procedure import NormRemoval, removable
from hf_lnfree.removal.run import remove_norms
from hf_lnfree.removal.schedule import expand, read_schedule
from hf_lnfree.training import LNFreeTrainingArguments
from hf_lnfree.training.log import read_log
from hf_lnfree.training.rollback import GoodState
from hf_lnfree.training.run import train

from ..conftest import LLAMA, OPT, QWEN3, run_in_two
from ..conversion.conftest import logits, trained
from ..training.test_interruptions import KILLED, run_jobs

STAGES = [
    {"norms": "mlp", "start": 1},
    {"norms": "query_key", "start": 3},
    {"norms": "value", "start": 5},
    {"norms": "final", "start": 7},
    {"norms": "first", "start": 8},
]


@pytest.fixture(scope="module")
def start(corpus, cache_dir, tmp_path_factory):
    """A GPT-2 with LayerNorm and its tokenizer, as a stock checkpoint."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from hf_lnfree.data.splits import load_splits
    from hf_lnfree.data.windows import cache_folder

    folder = tmp_path_factory.mktemp("with-norms") / "stock"
    data = DataArguments(data=str(corpus), vocab_size=300, cache_dir=cache_dir)
    tokenizer = tokenizer_for(None, load_splits(data)[0], 300, cache_folder(data))
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": len(tokenizer)}
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    trained(GPT2LMHeadModel(GPT2Config(**sizes, **tokens, initializer_range=0.2))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def arguments(corpus, cache_dir, tmp_path):
    data = DataArguments(data=str(corpus), context_length=32, cache_dir=cache_dir, max_validation_windows=8)
    training = LNFreeTrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=10,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        logging_steps=1,
        probe_steps=4,
        attention_report_windows=0,
        save_steps=5,
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    return data, training


def test_ends_without_norms_and_folded(start, arguments, corpus, tmp_path, caplog):
    arguments[1].attention_report_windows = 4
    caplog.set_level("INFO", "hf_lnfree")
    summary = remove_norms(start, RemovalArguments(schedule=str(STAGES), removal_windows=4), *arguments)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    assert not [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert (model.config.norm, model.config.final_norm, summary.norms_left) == ("none", "none", "none")
    # the last evaluation before folding and the one after
    losses = [loss for step, loss in summary.curves["removal"] if step == 10]
    assert losses[-1] == pytest.approx(losses[0], abs=1e-5)
    assert summary.gap == summary.loss_after - summary.loss_plain
    assert summary.curves["plain"][0] == pytest.approx(summary.curves["removal"][0], abs=1e-5)
    assert [(e["step"], e["norm"], e["part"]) for e in summary.events] == [
        (1, "transformer.h.0.ln_2", "all"),
        (2, "transformer.h.1.ln_2", "all"),
        (3, "transformer.h.0.ln_1", "query_key"),
        (4, "transformer.h.1.ln_1", "query_key"),
        (5, "transformer.h.0.ln_1", "value"),
        (6, "transformer.h.1.ln_1", "value"),
        (7, "transformer.ln_f", "all"),
        (8, "*", "first"),
    ]
    assert all(math.isfinite(e["loss_before"]) and e["loss_after"] != e["loss_before"] for e in summary.events)
    said = [record.getMessage() for record in caplog.records if "norms left" in record.getMessage()]
    assert [line.partition("; ")[0] for line in said[:3]] == [
        "step 1: transformer.h.0.ln_2 is a fixed scale",
        "step 2: transformer.h.1.ln_2 is a fixed scale",
        "step 3: transformer.h.0.ln_1 is a fixed scale for queries and keys",
    ]
    assert [line.split("; ")[1][0] for line in said] == list("43332100")
    log = read_log(tmp_path / "run")
    assert [e["removal/norms"] for e in log if "removal/norms" in e] == [4, 3, 3, 3, 2, 1, 0, 0]
    assert sum("loss" in entry for entry in log) == 10
    write_removal_report(tmp_path / "run", summary)
    finish_run(tmp_path / "run", arguments[1])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "transformer.h.1.ln_2" in page
    assert "Loading" not in page
    assert "SM+R" not in (tmp_path / "run" / "entropy.svg").read_text()  # the row of no checkpoint
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "plain")
    assert (plain.config.model_type, plain.config.norm) == ("lnfree_gpt2", "layernorm")
    to_stock(model)


def pythia(start, folder, parallel=True):
    """A small Pythia with the same tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(start)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": 32, "use_parallel_residual": parallel}
    torch.manual_seed(0)
    model = trained(GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, initializer_range=0.2, eos_token_id=0, bos_token_id=0)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_llama_too(start, arguments, input_ids, tmp_path):
    """From the command line's defaults on, and loaded where this package cannot be imported."""
    tokenizer = AutoTokenizer.from_pretrained(start)
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    trained(LLAMA.stock_model(vocab_size=len(tokenizer), **tokens)).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    data, training = arguments
    shared = ["--data", data.data, "--cache_dir", data.cache_dir, "--context_length", "32", "--max_steps", "10"]
    shared += ["--per_device_train_batch_size", "4", "--removal_windows", "4", "--max_validation_windows", "8"]
    shared += ["--use_cpu", "--disable_tqdm", "true", "--probe_steps", "0", "--output_dir", training.output_dir]
    assert main(["remove-norms", str(tmp_path / "llama"), *shared]) == 0
    summary = json.loads((tmp_path / "run" / "removal.json").read_text())
    assert summary["norms_left"] == "none"
    assert [event["part"] for event in summary["events"]].count("query_key") == 3
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "plain")
    assert (plain.config.norm, plain.config.final_norm) == ("rmsnorm", "rmsnorm")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    assert not [name for name, module in model.named_modules() if "Norm" in type(module).__name__]
    alone = (
        "import sys; sys.modules['hf_lnfree'] = None; import torch; from transformers import AutoModelForCausalLM\n"
        "ids, folder = torch.load(sys.argv[1])\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()\n"
        "torch.save(model(ids).logits.detach(), sys.argv[2])"
    )
    torch.save((input_ids, str(tmp_path / "run")), tmp_path / "in.pt")
    command = [sys.executable, "-W", "ignore", "-c", alone, str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.equal(torch.load(tmp_path / "out.pt"), logits(model, input_ids))


@pytest.mark.parametrize("parallel", [True, False])
def test_pythia_too(start, arguments, parallel, tmp_path):
    pythia(start, tmp_path / "pythia", parallel)
    options = RemovalArguments(schedule="auto", removal_windows=4, baseline=False)
    summary = remove_norms(str(tmp_path / "pythia"), options, *arguments)
    assert summary.norms_left == "none"
    assert [event["part"] for event in summary.events].count("query_key") == 2
    removed = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert not [m for m in removed.modules() if isinstance(m, nn.LayerNorm)]


def test_before_the_first_removal_training_is_that_of_layernorm(start, arguments, tmp_path):
    """The same losses as plain fine-tuning, but for rounding, until a norm goes."""
    late = [{"norms": "transformer.h.*.ln_?", "start": 9, "every": 0}]
    remove_norms(start, RemovalArguments(schedule=str(late), removal_windows=4), *arguments)

    def losses(folder):
        return [entry["loss"] for entry in read_log(folder) if "loss" in entry]

    removal, plain = losses(tmp_path / "run"), losses(tmp_path / "run" / "plain")
    assert removal[:9] == pytest.approx(plain[:9], abs=1e-4)
    left = AutoModelForCausalLM.from_pretrained(tmp_path / "run")  # the final norm is not on the schedule
    assert left.config.norm == "removal"


@pytest.mark.parametrize("lora", [None, 2])
def test_gradual_gates_a_penalty_and_lora(start, arguments, lora, tmp_path):
    data, training = arguments
    options = {"gate_steps": 3, "residual_norm_weight": 0.1, "removal_windows": 4, "baseline": False}
    stages = [*STAGES[:3], {"norms": "final", "start": 6}, {"norms": "first", "start": 7}]
    summary = remove_norms(start, RemovalArguments(schedule=str(stages), lora_rank=lora, **options), data, training)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert model.config.final_norm == "none"
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    assert all(event["loss_after"] is not None for event in summary.events)
    assert summary.gap is None
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["trainable_parameters"] < 10_000) == (lora is not None)


def test_gates_rise_in_steps(start):
    removal = NormRemoval(STAGES, gate_steps=4)
    model = removal.prepare(AutoModelForCausalLM.from_pretrained(start))
    first = expand(STAGES, model, 20)[0]
    assert [removal.gate(first, step) for step in range(7)] == [0, 0.25, 0.5, 0.75, 1, 1, 1]


def test_a_loss_on_the_way_leaves_modes_as_they_were(start, monkeypatch):
    removal = NormRemoval(STAGES)
    model = removal.prepare(AutoModelForCausalLM.from_pretrained(start)).train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    args = SimpleNamespace(eval_batch_size=2)
    removal.trainer = SimpleNamespace(unwrapped=model, args=args, data_collator=None)
    batches = [dict.fromkeys(("input_ids", "labels"), torch.arange(16).view(1, 16))]
    monkeypatch.setattr("hf_lnfree.removal.procedure.batches_of", lambda *wanted: batches)
    assert math.isfinite(removal.run(None))
    assert [module.training for module in model.modules()] == modes
    batches.append(dict.fromkeys(("input_ids", "labels"), torch.full((1, 4), 10**6)))  # no such token
    with pytest.raises(IndexError):
        removal.run(None)
    assert [module.training for module in model.modules()] == modes


def test_a_rollback_takes_gates_and_averages_back(start):
    removal = NormRemoval(STAGES)
    model = removal.prepare(AutoModelForCausalLM.from_pretrained(start))
    good = GoodState(model, torch.optim.AdamW(model.parameters()))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for value in model.state_dict().values():
            value += 0.5
    good.restore(model, torch.optim.AdamW(model.parameters()))
    assert {name.rpartition(".")[2] for name in before} >= {"gate", "first_gate", "sigma", "batches"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_penalty_is_what_it_says(start):
    """The mean over norms and all tokens, in which the first token of a sequence counts as 0; in Python's floats."""
    removal = NormRemoval(STAGES, residual_norm_weight=0.5)
    model = removal.prepare(AutoModelForCausalLM.from_pretrained(start)).double()
    inputs = {}
    for name, norm in removal.norms.items():
        norm.sigma.copy_(torch.tensor([3.0, 0.7]))
        norm.gate.fill_(1e-9)  # so that the average stays
        norm.register_forward_pre_hook(lambda m, args, name=name: inputs.update({name: args[0]}))
    removal.observe(True)
    positions = torch.tensor([[*range(12)], [*range(7), *range(5)]])  # the second row holds two sequences
    model(torch.arange(24).view(2, 12), position_ids=positions)
    penalty = removal.penalty()
    first = {(0, 0), (1, 0), (1, 7)}
    terms = []
    for name, norm in removal.norms.items():
        for row, tokens in enumerate(inputs[name].tolist()):
            for place, token in enumerate(tokens):
                sigma = math.sqrt(statistics.pvariance(token) + norm.eps)
                terms.append(0.0 if (row, place) in first else (sigma / norm.sigma[1].item() - 1) ** 2)
    assert len(terms) == 24 * len(removal.norms)
    assert penalty.item() == pytest.approx(0.5 * statistics.fmean(terms), rel=1e-9)
    penalty.backward()
    assert model.transformer.wte.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("kind", "extra"), [("gpt2", []), ("gpt_neox", ["--lora_rank", "2"])], ids=["gpt2-weights", "gpt_neox-lora"]
)
def test_killed_at_every_stage_it_goes_on_to_the_bit(start, corpus, cache_dir, tmp_path, kind, extra):
    start = start if kind == "gpt2" else pythia(start, tmp_path / "pythia")
    shared = ["remove-norms", start, "--data", str(corpus), "--cache_dir", cache_dir, "--context_length", "32"]
    shared += ["--max_steps", "10", "--per_device_train_batch_size", "4", "--learning_rate", "1e-3", "--seed", "5"]
    shared += ["--gate_steps", "2", "--removal_windows", "4", "--residual_norm_weight", "0.1", "--baseline", "false"]
    shared += ["--logging_steps", "1", "--probe_steps", "0", "--attention_report_windows", "0", "--save_steps", "1"]
    shared += ["--save_total_limit", "1", "--use_cpu", "--disable_tqdm", "true", "--resume_from_checkpoint", "auto"]
    shared += ["--max_validation_windows", "8", "--schedule", yaml.safe_dump(STAGES, default_flow_style=True), *extra]

    def job(at, name):
        step, _, point = (at or "0 ").partition(" ")
        return {"at": point or None, "step": int(step), "arguments": [*shared, "--output_dir", str(tmp_path / name)]}

    points = ["2 step", "4 checkpoint", "6 step", "7 rotation", "9 step", "0 results"]
    jobs = [job(None, "straight")]
    for point in points:
        jobs += [job(point, point.replace(" ", "-")), job(None, point.replace(" ", "-"))]
    straight, *others = run_jobs(jobs)
    assert straight["code"] == 0, straight["output"]
    expected = json.loads((tmp_path / "straight" / "removal.json").read_text())
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "straight").state_dict()
    for point, killed, resumed in zip(points, others[::2], others[1::2], strict=True):
        assert killed["code"] == KILLED, killed["output"]
        assert resumed["code"] == 0, resumed["output"]
        folder = tmp_path / point.replace(" ", "-")
        found = json.loads((folder / "removal.json").read_text())
        assert {k: found[k] for k in ("events", "sigma", "loss_after")} == {
            k: expected[k] for k in ("events", "sigma", "loss_after")
        }
        for name, value in AutoModelForCausalLM.from_pretrained(folder).state_dict().items():
            assert torch.equal(value, weights[name]), (point, name)


def test_two_processes_remove_what_one_does(start, corpus, cache_dir, tmp_path):
    shared = ["remove-norms", start, "--data", str(corpus), "--cache_dir", cache_dir, "--context_length", "32"]
    shared += ["--max_steps", "10", "--learning_rate", "1e-3", "--seed", "5", "--use_cpu", "--disable_tqdm", "true"]
    shared += ["--removal_windows", "4", "--max_validation_windows", "8", "--save_strategy", "no"]
    shared += ["--baseline", "false", "--probe_steps", "0", "--schedule", yaml.safe_dump(STAGES)]
    two = ["--output_dir", str(tmp_path / "two"), "--per_device_train_batch_size", "4"]
    done = run_in_two("-m", "hf_lnfree.cli.main", *shared, *two)
    assert done.returncode == 0, done.stderr[-3000:]
    one = ["--output_dir", str(tmp_path / "one"), "--per_device_train_batch_size", "8"]
    assert main([*shared, *one]) == 0
    two, one = (json.loads((tmp_path / name / "removal.json").read_text()) for name in ("two", "one"))
    assert two["norms_left"] == "none"
    assert [event["norm"] for event in two["events"]] == [event["norm"] for event in one["events"]]
    assert two["loss_after"] == pytest.approx(one["loss_after"], abs=0.05)  # averages over half a batch and a whole one


def test_a_finished_run_is_read_and_the_plain_one_gone_on_with(start, arguments, tmp_path):
    data, training = arguments
    options = RemovalArguments(schedule=str(STAGES), removal_windows=4, baseline=False)
    before = remove_norms(start, options, data, training)
    training.resume_from_checkpoint = "auto"
    options.baseline = True
    after = remove_norms(start, options, data, training)
    assert after.loss_after == before.loss_after
    assert after.gap is not None
    training.resume_from_checkpoint = None
    with pytest.raises(ValueError, match="holds an earlier run"):
        remove_norms(start, options, data, training)


def test_a_finished_removal_is_not_told_as_another(start, arguments, tmp_path):
    data, training = arguments
    options = {"schedule": str(STAGES), "removal_windows": 4, "baseline": False}
    remove_norms(start, RemovalArguments(**options), data, training)
    before = (tmp_path / "run" / "removal.json").read_bytes()
    training.resume_from_checkpoint = "auto"
    for change in ({"gate_steps": 2}, {"residual_norm_weight": 0.1}, {"lora_rank": 2}, {"removal_windows": 5}):
        with pytest.raises(ValueError, match=f"other settings .*{next(iter(change))} was"):
            remove_norms(start, RemovalArguments(**options | change), data, training)
    assert (tmp_path / "run" / "removal.json").read_bytes() == before


@pytest.mark.parametrize("how", [None, "auto"])
def test_the_models_own_folder_is_refused(start, arguments, how):
    data, training = arguments
    training.output_dir, training.resume_from_checkpoint = start, how
    before = {path: path.read_bytes() for path in Path(start).iterdir()}
    with pytest.raises(ValueError, match=r"is not empty and holds no run: config.json"):
        remove_norms(start, RemovalArguments(schedule=str(STAGES)), data, training)
    assert {path: path.read_bytes() for path in Path(start).iterdir()} == before


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("[{norms: transformer.h.7.ln_2, start: 1}]", r"no such norm.*mlp.*transformer.h.0.ln_1"),
        ("[{norms: mlp, start: 1}, {norms: '*ln_2', start: 4}]", r"removes transformer.h.0.ln_2 \(query_key\) twice"),
        ("[{norms: attention, start: 1}, {norms: value, start: 4}]", r"removes transformer.h.0.ln_1 \(value\) twice"),
        ("[{norms: mlp, start: 9}]", r"transformer.h.1.ln_2 at step 10, and training ends after 10"),
        ("[{norms: mlp}]", "start of a stage is a whole number"),
        ("[{norms: mlp, start: 1, every: -1}]", "every of a stage is a whole number"),
        ("[{norms: mlp, start: 1, after: 2}]", r"\['after'\] is not known"),
        ("[{start: 1}]", "A stage names its norms"),
        ("[]", "A schedule is a list of stages"),
        ("[{", "is not YAML"),
        ("slowly", "neither 'auto' nor a file"),
    ],
)
def test_schedules_that_make_no_sense(start, schedule, message):
    with pytest.raises(ValueError, match=message):
        expand(read_schedule(schedule), removable(AutoModelForCausalLM.from_pretrained(start)), 10)


def test_a_gradual_removal_must_end_before_the_training(start):
    model = removable(AutoModelForCausalLM.from_pretrained(start))
    assert expand([{"norms": "final", "start": 6}], model, 10, gate_steps=4)
    with pytest.raises(ValueError, match="at step 7 over 4 steps, and training ends after 10"):
        expand([{"norms": "final", "start": 7}], model, 10, gate_steps=4)


def test_another_schedule_does_not_go_on(start, arguments):
    data, training = arguments
    options = {"removal_windows": 4, "baseline": False}
    remove_norms(start, RemovalArguments(schedule=str(STAGES), **options), data, training)
    training.resume_from_checkpoint = "auto"
    other = RemovalArguments(schedule=str(STAGES[:3]), **options)
    for finished in (True, False):
        if not finished:
            (Path(training.output_dir) / "results.json").unlink()
        with pytest.raises(ValueError, match=r"other settings .*schedule was .*first.*, is "):
            remove_norms(start, other, data, training)
    (Path(training.output_dir) / "run.json").unlink()  # an earlier version wrote none
    with pytest.raises(ValueError, match="of a run with another schedule"):
        remove_norms(start, other, data, training)


def test_the_automatic_schedule_keeps_its_order(family):
    model = removable(family.stock_model())
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (family.name == "gpt2")
    removals = expand("auto", model, 300)
    steps = [removal.step for removal in removals]
    assert steps == sorted(steps)
    kinds = [removal.part if removal.norm != removals[-2].norm else "final" for removal in removals]
    assert kinds == ["all"] * 3 + ["query_key"] * 3 + ["value"] * 3 + ["final", "first"]
    assert (steps[0], steps[2], steps[3], steps[-2], steps[-1]) == (20, 42, 44, 104, 116)
    assert expand("auto", model, 30)[-1].step == 12


def test_a_schedule_may_be_a_file(tmp_path):
    (tmp_path / "stages.yaml").write_text(yaml.safe_dump({"stages": STAGES}))
    assert read_schedule(str(tmp_path / "stages.yaml")) == STAGES


def test_models_without_layernorm_are_refused(family):
    with pytest.raises(ValueError, match=r"no LayerNorm to remove: its norms are \['none'\]"):
        removable(family.model(norm="none", final_norm="none"))
    stock = family.stock_model(**{"layer_norm_epsilon" if family.name == "gpt2" else "layer_norm_eps": 1e12})
    with pytest.raises(ValueError, match="has a fixed scale already"):
        removable(stock)


@pytest.mark.parametrize(
    ("field", "value"), [("gate_steps", -1), ("removal_windows", 0), ("lora_rank", 0), ("residual_norm_weight", -0.1)]
)
def test_arguments_are_checked(field, value):
    with pytest.raises(ValueError, match=field):
        RemovalArguments(**{field: value})


class HeadWithoutBias(LNFreeMixin, OPTForCausalLM):
    config_class = LNFreeOPTConfig
    stacks = LNFreeOPTModel.stacks

    def __init__(self, config):
        OPTForCausalLM.__init__(self, config)
        self.model = LNFreeOPTModel(config)
        self.post_init()


def rewired(model):
    """Removed at once: every norm one linear map, with a scale of its own."""
    for index, norm in enumerate(module for module in model.modules() if isinstance(module, RemovalNorm)):
        norm.gate.fill_(1.0)
        norm.first_gate.fill_(1.0)
        norm.sigma.fill_(0.8 + 0.1 * index)
    return model


@pytest.mark.parametrize("family", [OPT, LLAMA, QWEN3], ids=lambda f: f.name)
def test_families_with_separate_queries_keys_and_values(family, input_ids):
    model = trained(family.model(norm=family.norm, final_norm=family.norm)).double()
    removal = NormRemoval([{"norms": "attention", "start": 0}, {"norms": "mlp", "start": 1}])
    changed = removal.prepare(model)
    exact = 1e-9 if family is OPT else 1e-4  # stock RMSNorms work in float32
    torch.testing.assert_close(logits(changed, input_ids), logits(model, input_ids), rtol=exact, atol=exact)
    assert [removal.part for removal in expand(removal.schedule, changed, 6)] == ["all"] * 6
    parts = ["all"] * 3 + ["query_key"] * 3 + ["value"] * 3 + ["all", "first"]
    assert [r.part for r in expand("auto", changed, 30)] == parts
    folded = removal.finish(rewired(changed))
    left = [name for name, module in folded.named_modules() if family.is_norm(name, module)]
    assert not left
    exact = 1e-5 if family is QWEN3 else 1e-9  # its norms of queries and keys stay, and work in float32
    assert hasattr(folded.base_model.get_submodule(family.blocks)[0].self_attn, "q_norm") == (family is QWEN3)
    torch.testing.assert_close(logits(folded, input_ids), logits(changed, input_ids), rtol=exact, atol=exact)


def test_a_finished_llama_is_a_stock_one_with_its_norms_exchanged_by_hand(input_ids):
    """Independent of RemovalNorm and of folding: the stock class in float64, each RMSNorm a product with g / sigma."""
    stock = trained(LLAMA.stock_model()).double()
    changed = rewired(removable(stock))
    sigmas = {name: m.sigma[1].item() for name, m in changed.named_modules() if isinstance(m, RemovalNorm)}
    assert len(sigmas) == 7

    class Product(nn.Module):
        def __init__(self, norm, sigma):
            super().__init__()
            self.factor = norm.weight / sigma

        def forward(self, x):
            return self.factor * x

    for name, sigma in sigmas.items():
        stock.set_submodule(name, Product(stock.get_submodule(name), sigma))
    folded, _ = fold(changed)
    torch.testing.assert_close(logits(folded, input_ids), logits(stock, input_ids), rtol=1e-9, atol=1e-9)
    assert (folded.config.norm, folded.config.final_norm) == ("none", "none")
    to_stock(folded)


def test_other_norms_than_those_of_the_family_are_not_removed(family):
    other = {"norm": "rmsnorm", "final_norm": "rmsnorm"}
    with pytest.raises(ValueError, match=r"no LayerNorm to remove: its norms are \['rmsnorm'\]"):
        removable(family.model(**other))
    with pytest.raises(ValueError, match=r"no RMSNorm to remove: its norms are \['layernorm'\]"):
        removable(LLAMA.model(norm="layernorm", final_norm="layernorm"))


def test_folding_makes_no_bias_that_a_head_has_no_place_for():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64, "vocab_size": 99}
    config = LNFreeOPTConfig(**sizes, word_embed_proj_dim=32, norm="layernorm", init_std=0.2, dropout=0.0)
    with pytest.raises(ValueError, match=r"HeadWithoutBias has no place for lm_head.bias"):
        fold(trained(HeadWithoutBias(config)))


def test_train_takes_any_procedure(start, arguments, tmp_path):
    """LoRA without removal, through the same door."""
    from hf_lnfree.training.arguments import ModelArguments
    from hf_lnfree.training.procedure import Procedure

    data, training = arguments
    data.tokenizer = start
    results = train(ModelArguments(model_name_or_path=start), data, training, Procedure(lora_rank=2))
    assert results.lora_rank == 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.model_type == "gpt2"
