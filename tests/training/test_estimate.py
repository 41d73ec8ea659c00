"""An estimate against what autograd keeps, what torch counts of FLOPs, and peaks that were measured."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig

from hf_lnfree import paper_config
from hf_lnfree.errors import SettingsError
from hf_lnfree.training.estimate import OPTIMISERS, USABLE, estimate, fits, largest_batch, memory_parts
from hf_lnfree.training.flops import flops_a_token
from hf_lnfree.training.losses import use_loss
from hf_lnfree.training.memory import Step, saved_bytes
from hf_lnfree.training.plans import CHECKPOINTING, Devices, plan_of
from hf_lnfree.training.remedies import what_fits
from hf_lnfree.training.settings import read_settings
from hf_lnfree.training.shape import shape_of

from ..fences import ROOT

BATCH, LENGTH, VOCABULARY = 2, 64, 256
SIZES = {
    "gpt2": {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": VOCABULARY},
    "gpt_neox": {
        **{"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256},
        "vocab_size": VOCABULARY,
    },
    "llama": {
        **{"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"intermediate_size": 192, "vocab_size": VOCABULARY, "tie_word_embeddings": False},
    },
}
FLASH = torch.ops.aten._scaled_dot_product_flash_attention
ON_CPU = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward),
)
CASES = [
    # family, row, fields, bf16, attention, checkpointing, loss
    ("gpt2", "SM+R", {}, False, "sdpa", False, "plain"),
    ("gpt2", "SM+LN+G", {}, True, "sdpa", False, "chunked"),
    ("gpt2", "SM+G", {"attn_pdrop": 0.1, "resid_pdrop": 0.1}, False, "eager", False, "plain"),
    ("gpt2", "SM+R", {"resid_pdrop": 0.1}, False, "sdpa", True, "chunked"),
    ("gpt2", "SM+LearnableR-layer", {"layer_norms": "layernorm:0,none:1"}, True, "eager", False, "plain"),
    ("gpt_neox", "SM+LN+G", {}, False, "sdpa", False, "plain"),
    ("gpt_neox", "SM+R", {"final_norm": "none"}, True, "sdpa", False, "plain"),
    ("gpt_neox", "SM+R", {"use_parallel_residual": False}, False, "sdpa", False, "chunked"),
    ("gpt_neox", "SM+R", {"dtype": "bfloat16"}, False, "eager", False, "plain"),
    ("gpt_neox", "SM+LN+R", {}, True, "sdpa", True, "plain"),
    ("llama", "SM+R", {}, False, "eager", False, "plain"),
    ("llama", "SM+LN+G", {}, True, "sdpa", False, "plain"),
    ("llama", "SM+LN+G", {"dtype": "bfloat16"}, False, "sdpa", False, "chunked"),
    ("llama", "SM+LeakyR", {"layer_activations": "silu:0,relu:1"}, False, "sdpa", True, "chunked"),
]


def as_flash(target):
    """torch's formula of a flash kernel, for that of the CPU, which has none."""

    def formula(*args, **kwargs):
        return flop_registry[target](*args, **kwargs)

    formula._get_raw = True
    return formula


def counter():
    forward, backward = ON_CPU
    backward_flash = torch.ops.aten._scaled_dot_product_flash_attention_backward
    return FlopCounterMode(display=False, custom_mapping={forward: as_flash(FLASH), backward: as_flash(backward_flash)})


@pytest.mark.parametrize(("family", "row", "fields", "bf16", "attention", "checkpointing", "loss"), CASES)
def test_activations_and_flops(family, row, fields, bf16, attention, checkpointing, loss):
    config = paper_config(family, row, LENGTH, **{**SIZES[family], **fields})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()
    model.config.use_cache = False
    use_loss(model, loss)
    if checkpointing:
        getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": False})
    weight = model.dtype.itemsize
    step = Step(BATCH, LENGTH, weight, 2 if bf16 else weight, attention != "eager", checkpointing, loss, mask=weight)
    shape = shape_of(config)
    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return model(input_ids=ids, labels=ids)[0]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    with counter() as counted:
        forward().backward()

    logits = BATCH * LENGTH * VOCABULARY
    of_loss = 4 * logits if loss == "plain" else step.product * BATCH * LENGTH * shape.width + 4 * shape.head
    copies = 0 if not bf16 else 2 * (0 if checkpointing else 2 * shape.matrices) + 2 * shape.head * (loss == "plain")
    estimated = saved_bytes(shape, step) + of_loss + copies
    assert estimated == pytest.approx(sum(count for count, _ in kept.values()), rel=0.02)
    flops = flops_a_token(shape, LENGTH, step.fused, checkpointing)
    assert flops.executed * BATCH * LENGTH == pytest.approx(counted.get_total_flops(), rel=0.001)
    assert (flops.recomputed > 0) == checkpointing


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_peaks_are_those_that_were_measured(monkeypatch, device):
    """The formulas as they are now, against what the benchmark measured in processes of their own."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from estimates import CASES as MEASURED
    from estimates import estimated, words

    found = json.loads((ROOT / "benchmarks" / "results" / f"estimates-{device}.json").read_text())["results"]
    assert set(found) == {words(*case) for case in MEASURED}
    for case in MEASURED:
        close = 0.1 if device == "cpu" else 0.03
        assert estimated(*case, device) == pytest.approx(found[words(*case)]["MiB"], rel=close), case


ADAFACTOR = """
import sys, torch
from training import peak
from transformers import Adafactor
torch.set_num_threads(1)
def step(size):
    weights = torch.nn.Parameter(torch.randn(size, dtype=getattr(torch, sys.argv[1])))
    weights.grad = torch.randn(size, dtype=weights.dtype)
    peak(reset=True)
    before = peak()
    Adafactor([weights], lr=1e-3, relative_step=False, scale_parameter=False, weight_decay=0.1).step()
    return (peak() - before) * 2**20
step((8, 8))
print(step((16384, 768)))
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adafactor_steps_in_float32_whatever_the_weights_are(dtype):
    name = str(dtype).partition(".")[2]
    done = subprocess.run(
        [sys.executable, "-c", ADAFACTOR, name], cwd=ROOT / "benchmarks", capture_output=True, text=True, check=True
    )
    size = 16384 * 768
    assert OPTIMISERS["adafactor"].stepping(dtype.itemsize, size, size) == pytest.approx(float(done.stdout), rel=0.03)


# The files of published sizes


MODELS = ROOT / "examples" / "models"
PUBLISHED = {
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "llama-1.1b": 1_100_048_384,
}
STOCK = {"gpt2": GPT2Config, "gpt_neox": GPTNeoXConfig, "llama": LlamaConfig}


def test_every_file_of_a_size_is_listed():
    assert {path.stem for path in MODELS.glob("[!_]*.yaml")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_files_have_the_published_numbers_of_parameters(name):
    path = MODELS / f"{name}.yaml"
    values = read_settings(path)
    family, fields = values["family"], values["config_overrides"]

    def count(config):
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config).num_parameters()

    with_norms = count(paper_config(family, "SM+LN+G", 128, **fields))
    assert with_norms == count(STOCK[family](**fields)) == PUBLISHED[name]
    without = count(paper_config(family, values["row"], 128, **fields))
    assert f"{with_norms:,} parameters, and {without:,} without" in path.read_text()
    plan = plan_of(path)
    assert plan.parameters == without
    windows = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"]
    assert (windows, plan.tokens) == (512, 512 * 128 * 32_000)
    assert estimate(plan).fits


# Plans, batches and refusals


@pytest.fixture
def plan():
    return plan_of(MODELS / "gpt2-xl.yaml", {"loss": "chunked"})


def test_a_batch_that_fits_is_the_largest(plan):
    most = largest_batch(plan)
    assert most > 1
    assert fits(plan.with_step(batch=most))
    assert not fits(plan.with_step(batch=most + 1))
    assert estimate(plan).largest_batch == most
    assert largest_batch(plan.with_devices(memory=1e9)) == 0


def test_what_devices_share(plan):
    one, copied, sharded = (
        memory_parts(plan.with_devices(count=count, fsdp=fsdp)) for count, fsdp in ((1, False), (8, False), (8, True))
    )
    assert one["weights"] == 4 * plan.parameters
    assert one["moments"] == 2 * one["weights"]
    assert (one["communication"], copied["communication"]) == (0, one["weights"])
    assert copied["peak"] == one["peak"] + one["weights"]
    assert 8 * sharded["moments"] == pytest.approx(one["moments"], rel=1e-6)
    assert sharded["peak"] < one["peak"] / 2


def test_time(plan):
    devices = Devices(count=4, mfu=0.5, peak_flops=1e14)
    found = estimate(dataclasses.replace(plan, devices=devices, tokens=10**9))
    assert found.days == pytest.approx(1e9 * found.flops.executed / (4 * 1e14 * 0.5) / 86_400)
    again = estimate(dataclasses.replace(plan, devices=devices, tokens=10**9).with_step(checkpointing=True))
    assert 1.2 < again.days / found.days < 4 / 3


@pytest.mark.parametrize(
    ("memory", "devices", "begins"),
    [
        (35e9, 1, "Any of these makes it fit: "),
        (33e9, 1, "This makes it fit: per_device"),
        (28e9, 1, "Any of these makes it fit: optim: adamw_torch_8bit and "),
        (16e9, 2, "This makes it fit: --fsdp and per_device"),
        (6e9, 1, "It fits 8 devices with "),
        (1e8, 1, "No number of devices"),
    ],
)
def test_what_is_named_makes_it_fit(memory, devices, begins):
    where, asked = Devices(devices, memory), {"per_device_train_batch_size": 32}
    plan = plan_of(MODELS / "gpt2-xl.yaml", asked, where)
    assert not fits(plan)
    words = what_fits(plan)
    assert words.startswith(begins), words
    if count := re.match(r"It fits (\d+) devices with ", words):
        where = dataclasses.replace(where, count=int(count[1]))
    named = re.split("fit: |with ", words.rstrip("."))[1:]
    for way in named[0].split("; ") if named else []:
        given = {name: yaml.safe_load(value) for name, value in re.findall(r"(\w+): (\w+)", way)}
        how = dataclasses.replace(where, fsdp="--fsdp" in way)
        assert fits(plan_of(MODELS / "gpt2-xl.yaml", asked | given, how)), way


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"family": "bert"}, "family 'lnfree_bert'|family 'bert'"),
        ({"family": "t5", "loss": "plain"}, "family 't5'"),
        ({"family": "whisper", "data": "folder", "loss": "plain"}, "family 'whisper'"),
        ({"family": "qwen3"}, "family 'qwen3'"),
        ({"config_overrides": {"norm": "dyt"}}, "norm 'dyt'"),
        ({"config_overrides": {"activation_function": "gelu_relu"}}, "activation 'gelu_relu'"),
        ({"config_overrides": {"attention_softcap": 5.0}}, "attention_softcap=5.0"),
        ({"config_overrides": {"ffn_scale": True}}, "ffn_scale=True"),
        ({"entropy_weight": 0.1}, "entropy_weight=0.1"),
        ({"optim": "galore_adamw", "optim_target_modules": "all"}, "optim"),
        ({"bf16": True, "fp16": True}, "bf16 and fp16"),
        ({"bf16": "perhaps"}, "bf16 must be true or false"),
        ({"row": "SM+LearnableR-global", "fsdp": True}, "slope_scope"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_what_has_no_estimate_is_refused_by_name(values, named, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(values))
    with pytest.raises(SettingsError, match=named):
        estimate(plan_of(file, devices=Devices(2)))


@pytest.mark.parametrize("wrong", [{"count": 0}, {"memory": 0}, {"mfu": 0}, {"mfu": 1.5}, {"peak_flops": float("nan")}])
def test_devices_that_cannot_be(wrong):
    with pytest.raises(SettingsError, match=r"must be (above 0|at most 1)"):
        Devices(**wrong)


def test_a_model_larger_than_this_machine_is_estimated(monkeypatch):
    from hf_lnfree.training import possible

    monkeypatch.setattr(possible.psutil, "virtual_memory", lambda: type("Memory", (), {"total": 10**6})())
    assert plan_of(MODELS / "pythia-2.8b.yaml").parameters > 2e9


def test_the_vocabulary_is_that_of_the_tokenizer_that_would_be_learned():
    plan = plan_of(Path(ROOT / "examples" / "accelerate" / "small.yaml"))
    assert plan.shape.vocabulary == 2048
    assert (plan.step.batch, plan.step.length, plan.tokens) == (8, 128, 600 * 8 * 128)
    assert USABLE < 1
