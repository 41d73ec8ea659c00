"""PEFT on every family and head without naming targets, beside slopes, merged, reloaded elsewhere, and damaged."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftModel,
    TaskType,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file

from hf_lnfree.conversion import fold, to_stock
from hf_lnfree.models.errors import ConfigurationError
from hf_lnfree.removal.procedure import removable
from hf_lnfree.training import LNFreeTrainer, LNFreeTrainingArguments

from ..conftest import EVERY, HEADS
from ..conversion.conftest import trained

METHODS = {
    "lora": (LoraConfig, {"init_lora_weights": False}),
    "ia3": (IA3Config, {"init_ia3_weights": False}),
    "vera": (VeraConfig, {"init_weights": False, "r": 4}),
}
TASKS = dict(zip(HEADS, ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"), strict=True))
pytestmark = pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning")


def last(path):
    return path.rpartition(".")[2]


def adapted(model, method="lora", **fields):
    config, defaults = METHODS[method]
    return get_peft_model(model, config(**defaults, **fields)).eval()


def outputs(model, input_ids):
    with torch.no_grad():
        return [value for value in model(input_ids).values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("method", METHODS)
def test_targets_are_known(family, head, method, input_ids):
    if head not in family.heads:
        pytest.skip("transformers has none")
    model = trained(family.model(head=head))
    before = outputs(model, input_ids)
    peft = adapted(model, method, task_type=TASKS[head])
    names = [name for name, parameter in peft.named_parameters() if parameter.requires_grad]
    assert any(name.rpartition(".")[2] in path for path in names for name in family.stack.attention.readers)
    assert not all(torch.equal(a, b) for a, b in zip(before, outputs(peft, input_ids), strict=True))
    assert len(names) < len(list(model.parameters())) + 3


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_merged_logits_are_equal(family, method, input_ids):
    peft = adapted(trained(family.model(norm="none")).double(), method)
    (expected,) = outputs(peft, input_ids)[:1]
    merged = peft.merge_and_unload()
    assert type(merged) is family.head("CausalLM")
    torch.testing.assert_close(outputs(merged, input_ids)[0], expected, rtol=1e-9, atol=1e-9)


def test_slopes_and_norms_are_trained_beside_adapters(family, input_ids, tmp_path):
    """By the names of their modules; a parameter's own name saves nothing, without a word."""
    model = trained(family.model(activation="learnable_leaky_relu", final_norm=family.norm))
    base = tmp_path / "base"
    model.save_pretrained(base)
    act, final = last(family.stack.mlp.activation), last(family.stack.final_norm)
    peft = adapted(model, task_type="CAUSAL_LM", modules_to_save=[act, final])
    slopes = [p for n, p in peft.named_parameters() if n.endswith("negative_slope") and p.requires_grad]
    assert len(slopes) == 3
    optimizer = torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=0.1)
    peft.train()(input_ids, labels=input_ids).loss.backward()
    optimizer.step()
    assert all(slope.item() != pytest.approx(0.01, abs=1e-9) for slope in slopes)
    (expected,) = outputs(peft.eval(), input_ids)[:1]
    peft.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(family.head("CausalLM").from_pretrained(base), tmp_path / "adapter").eval()
    assert torch.equal(outputs(reloaded, input_ids)[0], expected)
    torch.testing.assert_close(outputs(reloaded.merge_and_unload(), input_ids)[0], expected, rtol=1e-4, atol=1e-4)


def test_a_global_slope_is_not_quietly_many(family, tmp_path):
    act = last(family.stack.mlp.activation)
    model = adapted(family.model(activation="learnable_leaky_relu", slope_scope="global"), modules_to_save=[act])
    with pytest.raises(ValueError, match="one slope, and the model has 3 to train"):
        LNFreeTrainer(model, LNFreeTrainingArguments(output_dir=str(tmp_path), use_cpu=True))


ELSEWHERE = """
import sys
sys.modules["hf_lnfree"] = None
import torch
from peft import AutoPeftModelForCausalLM
ids = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    model = AutoPeftModelForCausalLM.from_pretrained(folder + "/adapter", trust_remote_code=True).eval()
    assert type(model.get_base_model()).__module__.startswith("transformers_modules")
    torch.save(model(ids).logits.detach(), folder + "/logits.pt")
"""


def save_both(family, folder, **fields):
    model = trained(family.model(**fields))
    model.save_pretrained(folder / "base")
    model.name_or_path = model.config.name_or_path = str(folder / "base")
    peft = adapted(model, task_type=TaskType.CAUSAL_LM)
    peft.save_pretrained(folder / "adapter")
    return peft


def test_adapters_load_in_a_process_without_the_package(input_ids, tmp_path):
    models = {tmp_path / family.name: save_both(family, tmp_path / family.name) for family in EVERY}
    torch.save(input_ids, tmp_path / "ids.pt")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    command = [sys.executable, "-W", "ignore", "-c", ELSEWHERE, str(tmp_path / "ids.pt"), *map(str, models)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder, model in models.items():
        assert torch.equal(torch.load(folder / "logits.pt"), outputs(model, input_ids)[0])


def test_adapters_that_do_not_fit_are_refused(family, tmp_path):
    save_both(family, tmp_path)
    wider = family.model(hidden_size=64)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(wider, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:200])
    with pytest.raises(Exception, match=r"(?i)header|deserializ|incomplete"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    path.write_bytes(whole)
    save_file({name: tensor[..., :1].contiguous() for name, tensor in load_file(path).items()}, path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"})[:-3])
    with pytest.raises((ValueError, OSError)):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("change", [fold, removable, to_stock])
def test_norms_are_not_changed_under_an_adapter(family, change):
    peft = adapted(trained(family.model(norm=family.norm)))
    for model in (peft, peft.get_base_model()):
        with pytest.raises(ValueError, match="merge them first"):
            change(model)
    change(peft.merge_and_unload())


def test_an_adapter_of_other_weights_is_not_put_on_silently(family, tmp_path):
    """Of the same shape it fits; AutoPeftModel takes its own base, which needs no warning."""
    save_both(family, tmp_path, norm="layernorm")
    family.model(norm="none").save_pretrained(tmp_path / "without-norms")
    without = family.head("CausalLM").from_pretrained(tmp_path / "without-norms")
    with pytest.warns(UserWarning, match=r"base is put on .*without-norms.* merge the adapter into the model it"):
        PeftModel.from_pretrained(without, tmp_path / "adapter")
    own = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert own.get_base_model().config.norm == "layernorm"


def trained_norms(peft):
    """The norms with a copy that is trained, by their names in the model without adapters."""
    names = [name for name, p in peft.named_parameters() if p.requires_grad and "ln_tuning_layers" in name]
    return {name.removeprefix("base_model.model.").split(".ln_tuning_layers")[0] for name in names}


def with_parameters(model):
    """The same by hand, from the names that the families have."""
    ends = ("ln_1", "ln_2", "ln_f", "input_layernorm", "post_attention_layernorm", "layer_norm", "model.norm")
    return {n for n, m in model.named_modules() if n.endswith(ends) and sum(p.numel() for p in m.parameters())}


SOME_NORMS = [
    {"norm": "none", "final_norm": "layernorm"},
    {"norm": "layernorm", "final_norm": "none"},
    {"layer_norms": ["none", "layernorm", "rmspre"], "final_norm": "dyt"},
    {"norm": "rmsnorm", "final_norm": "rmspre"},
]


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
@pytest.mark.parametrize("fields", SOME_NORMS, ids=lambda fields: "-".join(map(str, fields.values())))
def test_ln_tuning_trains_the_norms_that_are_there(family, fields, input_ids, tmp_path):
    model = trained(family.model(**fields))
    model.save_pretrained(tmp_path / "base")
    wanted = with_parameters(model)
    asked = LNTuningConfig(task_type="CAUSAL_LM")
    peft = get_peft_model(model, asked)
    assert trained_norms(peft) == wanted
    whole = family.model(norm="layernorm", final_norm="layernorm")
    full = with_parameters(whole)
    assert trained_norms(get_peft_model(whole, asked)) == full  # one request, two models
    optimizer = torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=0.1)
    peft.train()(input_ids, labels=input_ids).loss.backward()
    optimizer.step()
    (expected,) = outputs(peft.eval(), input_ids)[:1]
    peft.save_pretrained(tmp_path / "adapter")
    base = family.head("CausalLM").from_pretrained(tmp_path / "base").eval()
    assert not torch.equal(outputs(base, input_ids)[0], expected)
    reloaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(outputs(reloaded, input_ids)[0], expected)
    assert torch.equal(outputs(peft.merge_and_unload(), input_ids)[0], expected)


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
def test_ln_tuning_takes_the_names_that_it_is_given(family):
    final = family.stack.final_norm
    model = family.model(norm="layernorm", final_norm="layernorm")
    (found,) = trained_norms(get_peft_model(model, LNTuningConfig(target_modules=[final])))
    assert found.endswith(f".{final}")
    model = family.model(layer_norms=["none", "layernorm", "layernorm"], final_norm="layernorm")
    named = rf".*({family.stack.attention.norm}|{family.head('CausalLM').base_model_prefix}\.{final})"
    asked = LNTuningConfig(target_modules=named, exclude_modules=r".*\.1\..*")
    found = [name for name in trained_norms(get_peft_model(model, asked)) if not name.endswith(f".{final}")]
    assert [re.search(r"\.(\d+)\.", name)[1] for name in found] == ["2"]


@pytest.mark.parametrize(
    ("fields", "asked", "words"),
    [
        (
            {"norm": "none", "final_norm": "none"},
            {},
            r"none of .*(ln_f|final_layer_norm|model.norm).* has parameters .*LoRA",
        ),
        (
            {"norm": "none"},
            {"target_modules": ["ln_1", "input_layernorm", "self_attn_layer_norm"]},
            "none of .* has parameters",
        ),
        ({"norm": "removal"}, {}, "is being removed .*Finish the removal"),
    ],
)
def test_ln_tuning_without_a_norm_to_train_is_refused_by_name(family, fields, asked, words):
    with pytest.raises(ConfigurationError, match=words):
        get_peft_model(family.model(**fields), LNTuningConfig(**asked))
