"""What only a GPU shows: kernels against float64, half precision with a scaler, compiled steps, resumed runs, shards.

`benchmarks/run.py --only gpu_tests --device cuda` runs this file and keeps what came of each test.
"""

import itertools
import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_lnfree.analysis.analyzer import AttentionEntropyAnalyzer
from hf_lnfree.analysis.capture import record_attention_entropy
from hf_lnfree.attention.fused import fused_attention_entropy, largest_logit
from hf_lnfree.cli.main import main
from hf_lnfree.conversion.folding import fold
from hf_lnfree.training.log import curve, read_log
from hf_lnfree.training.losses import use_loss
from hf_lnfree.training.results import RunResults
from hf_lnfree.training.run import train
from hf_lnfree.training.settings import parse_settings

from .conftest import GPT_NEOX, launch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")  # of compilers and drivers, which no test of ours is about
LENGTH = 256
DTYPES = {torch.float32: 1e-4, torch.bfloat16: 1e-4, torch.float16: 1e-4}  # of equal, rounded inputs
MASKS = ("causal", "none", "padding", "bias")


def attention_inputs(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(2, 4, LENGTH, 64, generator=generator) for _ in range(3))
    return [t.to("cuda", dtype) for t in (query * 3, key, value)]


def masked(kind):
    """Keywords of the fused function, and the same as an additive mask in float64."""
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    if kind == "causal":
        return {"is_causal": True}, torch.zeros(1).double().where(causal, -math.inf)
    if kind == "none":
        return {}, torch.zeros(LENGTH, LENGTH).double()
    if kind == "padding":
        mask = causal.expand(2, 1, -1, -1).clone()
        mask[1, ..., 200:] = False
        return {"attention_mask": mask.cuda()}, torch.zeros(1).double().where(mask, -math.inf)
    bias = torch.randn(1, 4, LENGTH, LENGTH, generator=torch.Generator().manual_seed(9))
    return {"attention_mask": bias.cuda()}, bias.double()


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["auto", "cuda_efficient", "chunked", "flex"])
def test_entropies_of_every_kernel(backend, dtype, kind):
    if backend == "flex" and kind == "bias":
        pytest.skip("flex takes no bias")
    query, key, value = attention_inputs(dtype)
    given, mask = masked(kind)
    if backend == "cuda_efficient" and kind == "bias":
        pytest.skip("the efficient kernel takes no bias")
    rows = fused_attention_entropy(query, key, value, **given, backend=backend)
    logits = query.double().cpu() @ key.double().cpu().mT / 8 + mask
    weights = logits.softmax(-1)
    entropy, output = torch.special.entr(weights).sum(-1), weights @ value.double().cpu()
    torch.testing.assert_close(rows.entropy.double().cpu(), entropy, atol=DTYPES[dtype], rtol=0)
    rounding = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    torch.testing.assert_close(rows.output.double().cpu(), output, atol=rounding * 3, rtol=rounding)
    torch.testing.assert_close(
        largest_logit(query, key, **given).double().cpu(), logits.amax((-2, -1)), atol=1e-4, rtol=1e-5
    )


def test_sixteen_thousand_keys_in_little_memory():
    query, key, value = (torch.randn(1, 12, 16384, 64, device="cuda") for _ in range(3))
    fused_attention_entropy(query[..., :64, :], key[..., :64, :], value[..., :64, :], is_causal=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused_attention_entropy(query, key, value, is_causal=True)
    assert (torch.cuda.max_memory_allocated() - before) / 2**20 < 400  # one map alone takes 12 GiB


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recorded_entropies_are_those_of_the_eager_maps(family, input_ids, attention, dtype):
    if attention == "flex_attention" and family.name == "gpt2":
        pytest.skip("transformers' GPT-2 has no flex attention")
    model = family.model().to("cuda", dtype)
    ids = torch.cat([input_ids] * 4, 1).cuda()  # B 48
    model.set_attn_implementation("eager")
    maps = model(ids, output_attentions=True).attentions
    model.set_attn_implementation(attention)
    with torch.no_grad(), record_attention_entropy(model) as record:
        model(ids)
    for entropy, map_ in zip(record.entropies.values(), maps, strict=True):
        expected = torch.special.entr(map_.double()).sum(-1)
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2  # eager rounds its maps to bfloat16
        torch.testing.assert_close(entropy.double(), expected, atol=tolerance, rtol=0)


def test_analysis_generation_and_folding_as_on_the_cpu(family, input_ids):
    model = family.model(norm="none")
    on_cpu = AttentionEntropyAnalyzer(model).run([{"input_ids": input_ids}])
    generated = model.generate(input_ids, max_new_tokens=12, do_sample=False)
    moved = model.cuda()
    on_gpu = AttentionEntropyAnalyzer(moved).run([{"input_ids": input_ids}])
    torch.testing.assert_close(on_gpu.entropy.cpu(), on_cpu.entropy, atol=1e-5, rtol=0)
    assert moved.generate(input_ids.cuda(), max_new_tokens=12, do_sample=False).tolist() == generated.tolist()
    normed = family.model(norm="layernorm").cuda().double()
    folded, _ = fold(normed)
    torch.testing.assert_close(folded(input_ids.cuda()).logits, normed(input_ids.cuda()).logits)


@pytest.mark.parametrize("form", ["compiled", "chunked"])
def test_losses_are_the_plain_one(family, input_ids, form):
    model = family.model().cuda()
    ids = input_ids.cuda()
    plain = model(ids, labels=ids).loss
    plain.backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    use_loss(model, form)
    loss = model(ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss, plain)
    for p, gradient in zip((p for p in model.parameters() if p.grad is not None), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=1e-5, rtol=1e-4)


def test_a_softcap_under_flex_attention_is_that_of_eager(input_ids):
    wide = {"hidden_size": 64, "attention_softcap": 2.0}  # the compiled kernel takes heads of 16 and more
    model = GPT_NEOX.model(**wide, attn_implementation="eager").cuda()
    expected = model(input_ids.cuda()).logits
    model.set_attn_implementation("flex_attention")
    torch.testing.assert_close(model(input_ids.cuda()).logits, expected, atol=1e-4, rtol=1e-4)


def settings(corpus, cache_dir, **changes):
    return {
        "family": "gpt2",
        "row": "SM+R",
        "data": str(corpus),
        "cache_dir": str(cache_dir),
        "config_overrides": {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 32},
        "vocab_size": 300,
        "context_length": 32,
        "max_steps": 40,
        "save_steps": 20,
        "probe_steps": 10,
        "logging_steps": 5,
        "learning_rate": 3e-3,
        "device": "cuda",
        "disable_tqdm": True,
        **changes,
    }


def run(folder, values) -> RunResults:
    return train(*parse_settings(values, "test", ["--out", str(folder)]))


@pytest.mark.parametrize(
    "how", [{}, {"bf16": True}, {"fp16": True}, {"bf16": True, "torch_compile": True}, {"entropy_weight": 0.1}], ids=str
)
def test_runs_train_and_are_read_back(corpus, cache_dir, tmp_path, how):
    results = run(tmp_path / "run", settings(corpus, cache_dir, **how))
    assert not results.diverged
    assert results.steps == 40
    assert results.eval_loss < math.log(300) - 0.5
    assert torch.isfinite(AutoModelForCausalLM.from_pretrained(tmp_path / "run").lm_head.weight).all()


@pytest.mark.parametrize("how", [{}, {"fp16": True}], ids=str)
def test_a_resumed_run_ends_to_the_bit_like_one_in_one_go(corpus, cache_dir, tmp_path, how):
    values = settings(corpus, cache_dir, save_total_limit=5, **how)
    straight = run(tmp_path / "straight", values)
    run(tmp_path / "again", values)
    for name in ("results.json", "checkpoint-40"):
        path = tmp_path / "again" / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    resumed = run(tmp_path / "again", {**values, "resume_from_checkpoint": "auto"})
    assert (straight.resumed_at, resumed.resumed_at) == (0, 20)
    ends = [AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("straight", "again")]
    assert all(torch.equal(one, other) for one, other in zip(*(end.values() for end in ends), strict=True))


@pytest.mark.parametrize("how", [[], ["--lora-rank", "4"], ["--bf16", "true"]], ids=str)
def test_norms_are_removed(corpus, cache_dir, tmp_path, how):
    values = settings(corpus, cache_dir, row="SM+LN+G", max_steps=60)
    before = run(tmp_path / "normed", values)
    removed = tmp_path / "removed"
    same = ["--data", values["data"], "--cache-dir", values["cache_dir"], "--context-length", "32"]
    steps = ["--max-steps", "60", "--learning-rate", "1e-3", "--no-baseline", "--disable-tqdm", "true"]
    steps += ["--device", "cuda"]
    assert main(["remove-norms", str(tmp_path / "normed"), "--out", str(removed), *same, *steps, *how]) == 0
    model = AutoModelForCausalLM.from_pretrained(removed)
    assert not [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    assert json.loads((removed / "results.json").read_text())["eval_loss"] < before.eval_loss + 0.5


def test_a_study_trains_its_rows_side_by_side(corpus, cache_dir, tmp_path):
    """In processes that are forked from one that has imported what they need, and must not have asked for GPUs."""
    values = {name: value for name, value in settings(corpus, cache_dir).items() if name not in ("row", "device")}
    study = tmp_path / "study.yaml"
    study.write_text(json.dumps({**values, "rows": {"SM+G": {"row": "SM+G"}, "SM+R": {"row": "SM+R"}}}))
    command = [sys.executable, "-m", "hf_lnfree.cli.main", "study", str(study), "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, "--device", "cuda", "--jobs", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads((tmp_path / "out" / row / "seed-0" / "results.json").read_text()) for row in ("SM+G", "SM+R")]
    assert all(torch.cuda.get_device_name() == result["environment"]["device"] for result in results)


SHARDED = {
    "plain": ([], {}),
    "activation checkpointing": (["--fsdp_activation_checkpointing", "true"], {}),
    "offload": (["--fsdp_offload_params", "true"], {}),
    "compiled": ([], {"torch_compile": True}),
    "bf16": (["--mixed_precision", "bf16"], {"bf16": True}),
}


@pytest.mark.parametrize("way", SHARDED)
def test_a_run_in_shards_has_the_losses_of_a_plain_one(corpus, cache_dir, tmp_path, way):
    """FSDP2 over NCCL, in the one process that one GPU can take."""
    more_flags, more = SHARDED[way]
    values = settings(corpus, cache_dir, logging_steps=1, max_steps=6, save_steps=3, probe_steps=3, **more)
    values["config_overrides"]["embd_pdrop"] = 0.0  # compiled code draws other numbers
    run(tmp_path / "plain", values)
    del values["device"]
    (tmp_path / "settings.yaml").write_text(json.dumps(values))
    flags = ["--num_processes", "1", "--main_process_port", "0", *more_flags, "-m", "hf_lnfree.cli.main", "train"]
    files = [str(tmp_path / "settings.yaml"), "--out", str(tmp_path / "run")]
    process = launch("two_processes_fsdp2.yaml", *flags, *files)
    said = process.communicate()[1]
    assert process.returncode == 0, said[-3000:]
    assert "in shards on 1 process" in said
    plain, sharded = (dict(curve(read_log(tmp_path / name), "loss")) for name in ("plain", "run"))
    assert list(sharded) == [1, 2, 3, 4, 5, 6]
    assert sharded == pytest.approx(plain, abs=2e-2 if way == "bf16" else 1e-4)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.norm == "none"


def test_norms_of_every_kind_under_compile_and_autocast(family, input_ids):
    for norm, activation in itertools.product(("none", "layernorm", "rmsnorm", "dyt"), ("relu", "gelu")):
        model = family.model(norm=norm, activation=activation).cuda()
        expected = model(input_ids.cuda()).logits
        compiled = torch.compile(model, dynamic=False)
        tolerance = 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(compiled(input_ids.cuda()).logits, expected, atol=tolerance, rtol=0)
        with torch.autocast("cuda", torch.bfloat16):
            half = model(input_ids.cuda()).logits
        torch.testing.assert_close(half.float(), expected, atol=500 * tolerance, rtol=0)
