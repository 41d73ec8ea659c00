"""Norms and activations of models that nobody declared: replaced, saved, loaded anywhere, trained."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_lnfree import LNFreeGPT2Model, load_norm_free, replace_norms, save_norm_free
from hf_lnfree.conversion.replaceable import refuse
from hf_lnfree.errors import ModelError, SettingsError
from hf_lnfree.models.errors import ConfigurationError
from hf_lnfree.models.normalizations import DynamicTanh

from ..conftest import BERT, GPT2
from .architectures import ARCHITECTURES, GROUPED

BY_NAME = {architecture.head: architecture for architecture in ARCHITECTURES}
MISTRAL, GEMMA = (BY_NAME[f"{name}ForCausalLM"] for name in ("Mistral", "Gemma3"))
BART = BY_NAME["BartForConditionalGeneration"]
DINO = BY_NAME["Dinov2ForImageClassification"]


def first_output(model, given):
    return model(**given)[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.head)
def test_nothing_stands_where_norms_stood(architecture, tmp_path):
    """As a stock model with identities put there by hand, in float64; trained, saved and loaded."""
    model = architecture.model().double()
    by_hand, given = copy.deepcopy(model), architecture.given(model)
    for path in architecture.norms | architecture.finals:
        by_hand.set_submodule(path, nn.Identity())
    for path in architecture.activations:
        by_hand.set_submodule(path, nn.ReLU())
    activation = "relu" if architecture.activations else None
    report = replace_norms(model, "none", final_norm="none" if architecture.finals else None, activation=activation)
    gone = dict.fromkeys(architecture.norms | architecture.finals, "none")
    assert report.replaced == gone | dict.fromkeys(architecture.activations, "relu")
    assert set(report.left) == architecture.others
    out = first_output(model, given)
    assert torch.equal(out, first_output(by_hand, given))
    out.square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
    model.float().save_pretrained(tmp_path)
    loaded, info = load_norm_free(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert type(loaded) is type(model)
    given = architecture.given(model)
    assert torch.equal(first_output(loaded, given), first_output(model, given))


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.head)
def test_the_norm_that_is_there_stays(architecture):
    model = architecture.model()
    given, stock = architecture.given(model), type(model)
    before = first_output(model, given)
    report = replace_norms(model, architecture.kind, final_norm=architecture.kind)
    assert report.replaced == {}
    assert type(model) is stock
    assert torch.equal(first_output(model, given), before)
    assert {report.left[path] for path in architecture.norms} == {f"it is a {architecture.kind} already"}


@pytest.mark.parametrize("name", ["Mistral", "Gemma3", "Bloom", "Olmo", "Mpt", "Cohere"])
def test_gains_and_biases_go_over(name):
    """The tanh of alpha x with the gain that multiplied the norm, which Gemma keeps less 1, and Olmo does not have."""
    architecture = BY_NAME[f"{name}ForCausalLM"]
    model = architecture.model()
    old = {path: copy.deepcopy(model.get_submodule(path)) for path in architecture.norms}
    replace_norms(model, "dyt", norm_alpha=0.3)
    x = torch.randn(5, 32)
    for path, norm in old.items():
        weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        gain = torch.ones(32) if weight is None else weight + (name == "Gemma3")
        wanted = gain * torch.tanh(0.3 * x) + (0 if bias is None else bias)
        torch.testing.assert_close(model.get_submodule(path)(x), wanted, rtol=1e-5, atol=1e-6)


def test_alphas_follow_what_reads_a_norm():
    model = GEMMA.model()
    replace_norms(model, "dyt", final_norm="derf", norm_alpha_attention=0.8, norm_alpha_mlp=0.2, norm_alpha_final=0.3)
    block = model.model.layers[0]
    alphas = {name: getattr(block, name).alpha.item() for name, _ in block.named_children() if "layernorm" in name}
    assert alphas == pytest.approx(
        {
            "input_layernorm": 0.8,
            "post_attention_layernorm": 0.2,
            "pre_feedforward_layernorm": 0.2,
            "post_feedforward_layernorm": 0.8,
        }
    )
    assert model.model.norm.alpha.item() == pytest.approx(0.3)


def test_layers_are_chosen(capsys):
    model = MISTRAL.model()
    report = replace_norms(model, "none", layers=range(1, 2), activation="relu")
    print(report)
    assert set(report.replaced) == {path for path in MISTRAL.norms | MISTRAL.activations if ".1." in path}
    assert report.left["model.layers.0.input_layernorm"] == "its layer was not chosen"
    assert report.left["model.norm"] == "final_norm was not given"
    words = capsys.readouterr().out
    assert "MistralForCausalLM: 3 modules replaced, 4 left" in words
    assert "2 gains and biases went with their norms" in words


def test_layers_can_be_replaced_one_after_the_other(tmp_path):
    model = MISTRAL.model()
    replace_norms(model, "none", layers=[0])
    replace_norms(model, "dyt", layers=[1], final_norm="layernorm")
    given = MISTRAL.given(model)
    model.save_pretrained(tmp_path)
    loaded = load_norm_free(tmp_path)
    kinds = [type(block.input_layernorm) for block in loaded.model.layers]
    assert [*kinds, type(loaded.model.norm)] == [nn.Identity, DynamicTanh, nn.LayerNorm]
    assert torch.equal(first_output(loaded, given), first_output(model, given))


def test_norms_of_queries_and_keys_go_when_asked():
    model = GEMMA.model()
    report = replace_norms(model, None, query_key_norm=False)
    assert set(report.replaced) == GEMMA.others
    assert isinstance(model.model.layers[1].self_attn.q_norm, nn.Identity)


def test_what_happens_to_a_stream_without_bounds_is_said():
    notes = replace_norms(BART.model(), "none").notes
    assert any("behind the sum" in note and "grows with depth" in note for note in notes)
    assert any("behind branches" in note for note in replace_norms(GEMMA.model(), "none").notes)
    assert replace_norms(BART.model(), "dyt").notes == ()


@pytest.mark.parametrize("tied", [True, False])
def test_a_global_slope_is_one_parameter_everywhere(tied, tmp_path):
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**GROUPED, tie_word_embeddings=tied))
    replace_norms(model, "none", activation="learnable_leaky_relu", slope_scope="global", negative_slope=0.2)
    with torch.no_grad():
        model.model.layers[0].mlp.act_fn.negative_slope.fill_(0.3)
    save_norm_free(model, tmp_path)
    loaded = load_norm_free(tmp_path)
    for one in (model, loaded, copy.deepcopy(loaded), AutoModelForCausalLM.from_pretrained(tmp_path)):
        slopes = [block.mlp.act_fn.negative_slope for block in one.model.layers]
        assert slopes[0] is slopes[1]
        assert slopes[0].item() == pytest.approx(0.3)
        assert (one.lm_head.weight is one.model.embed_tokens.weight) == tied
    fresh = type(model)(loaded.config)
    assert fresh.model.layers[1].mlp.act_fn.negative_slope.item() == pytest.approx(0.2)


def test_the_configuration_of_another_model_stays_stock():
    config = transformers.MistralConfig(**GROUPED)
    one, other = (transformers.MistralForCausalLM(config) for _ in range(2))
    replace_norms(one, "none")
    assert other.config is config
    assert not hasattr(config, "replacements")
    assert one.model.config is one.config
    assert one.config.model_type == "mistral"
    assert json.loads(one.config.to_json_string())["model_type"] == "lnfree_replaced"


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification"])
def test_other_heads_load_what_was_saved(head, tmp_path):
    model = MISTRAL.model()
    replace_norms(model, "dyt")
    model.save_pretrained(tmp_path)
    ids = MISTRAL.given(model)["input_ids"]
    loaded = getattr(transformers, f"AutoModelFor{head}").from_pretrained(tmp_path)
    backbone = transformers.AutoModel.from_pretrained(tmp_path)
    states = model.model(ids).last_hidden_state
    assert torch.equal(loaded.model(ids).last_hidden_state, states)
    assert torch.equal(backbone(ids).last_hidden_state, states)
    backbone.save_pretrained(tmp_path / "backbone")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone")
    assert torch.equal(again.model(ids).last_hidden_state, states)


def test_modules_that_a_checkpoint_lacks_begin_as_they_should(tmp_path):
    """A stock checkpoint in the class of a model that was replaced."""
    stock = MISTRAL.model()
    stock.save_pretrained(tmp_path)
    model = MISTRAL.model()
    replace_norms(model, "dyt", norm_alpha=0.25, activation="prelu", negative_slope=0.1)
    loaded = type(model).from_pretrained(tmp_path, config=model.config)
    assert loaded.model.layers[0].input_layernorm.alpha.item() == pytest.approx(0.25)
    assert torch.equal(loaded.model.layers[1].mlp.act_fn.weight, torch.full((64,), 0.1))
    weight = stock.model.layers[0].input_layernorm.weight
    assert torch.equal(loaded.model.layers[0].input_layernorm.weight, weight)


@pytest.mark.parametrize("name", ["MixtralModel", "MixtralForCausalLM"])
def test_weights_are_called_as_those_of_the_stock_model(name, tmp_path):
    """On disk Mixtral has a matrix an expert, and in memory one of all experts: transformers converts by type."""
    stock = getattr(transformers, name)(transformers.MixtralConfig(**BY_NAME["MixtralForCausalLM"].fields))
    model = copy.deepcopy(stock)
    report = replace_norms(model, "none")
    for folder, one in (("stock", stock), ("ours", model)):
        one.save_pretrained(tmp_path / folder)
    keys = {folder: set(load_file(tmp_path / folder / "model.safetensors")) for folder in ("stock", "ours")}
    assert any("experts.1." in key for key in keys["stock"])
    assert keys["ours"] == keys["stock"] - {f"{path}.weight" for path in report.replaced}


DETACHED = """
import sys, warnings
warnings.simplefilter("ignore")
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_lnfree":
            raise ModuleNotFoundError("hf_lnfree is not here")
sys.meta_path.insert(0, Blocked())
import torch, transformers
for folder, auto in zip(sys.argv[1::2], sys.argv[2::2]):
    auto, given = getattr(transformers, auto), torch.load(folder + "/given.pt")
    try:
        auto.from_pretrained(folder, trust_remote_code=False)
        raise AssertionError("a stock class read what it would have filled up with norms")
    except ValueError as error:
        assert "lnfree_replaced" in str(error) or "trust_remote_code" in str(error), error
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    torch.save((model(**given).logits, model.state_dict()), folder + "/detached.pt")
    model.save_pretrained(folder + "/again", max_shard_size="20KB")
    again = auto.from_pretrained(folder + "/again", trust_remote_code=True).eval()
    assert torch.equal(again(**given).logits, model(**given).logits)
"""


def test_a_process_without_the_package_loads_what_was_saved(tmp_path):
    made = {}
    for architecture, auto in ((MISTRAL, "AutoModelForCausalLM"), (DINO, "AutoModelForImageClassification")):
        model = architecture.model()
        replace_norms(
            model, "dyt", final_norm="none", layers=[0], activation="learnable_leaky_relu", slope_scope="global"
        )
        folder = tmp_path / architecture.head
        save_norm_free(model, folder)
        torch.save(architecture.given(model), folder / "given.pt")
        made[folder] = (model, auto, architecture.given(model))
    arguments = [str(part) for folder, (_, auto, _) in made.items() for part in (folder, auto)]
    result = subprocess.run(
        [sys.executable, "-c", DETACHED, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for folder, (model, _, given) in made.items():
        logits, state = torch.load(folder / "detached.pt")
        assert torch.equal(logits, model(**given).logits)
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        again = load_norm_free(folder / "again")
        assert torch.equal(again(**given).logits, logits)


def test_peft_and_trainer_know_the_model(tmp_path):
    """Defaults of PEFT by the stock model type, labels shifted by the stock class name, checkpoints as any."""
    model = MISTRAL.model()
    replace_norms(model, "dyt", activation="learnable_leaky_relu", slope_scope="global")
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=2, save_steps=2, use_cpu=True, report_to=[], label_smoothing_factor=0.1
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 99, (8, 6))]
    trainer = Trainer(model, arguments, train_dataset=rows)
    ids = rows[0]["input_ids"][None]
    smoothed = trainer.compute_loss(model, {"input_ids": ids, "labels": ids})
    logs = model(ids).logits[:, :-1].log_softmax(-1)
    exact = 0.9 * -logs.gather(-1, ids[:, 1:, None]).mean() - 0.1 * logs.mean()
    torch.testing.assert_close(smoothed, exact, rtol=1e-5, atol=0)
    trainer.train()
    loaded = load_norm_free(tmp_path / "run" / "checkpoint-2")
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    wrapped = get_peft_model(loaded, LoraConfig(init_lora_weights=False))
    assert {name.split(".")[-4] for name, _ in wrapped.named_parameters() if "lora_A" in name} == {"q_proj", "v_proj"}
    wrapped.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"takes a model of transformers, got PeftModel"):
        replace_norms(wrapped, "none")
    merged = wrapped.merge_and_unload()
    assert not torch.equal(merged(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "batchnorm"}, r"norm='batchnorm' is not known.*'dyt'"),
        ({"norm": "removal"}, r"norm='removal' is not known to replace_norms"),
        ({"final_norm": "rms"}, r"final_norm='rms'"),
        ({"activation": "identity_fused"}, r"activation='identity_fused'"),
        ({"layers": [1, 2]}, r"layers=\[2\] are not among the 2 blocks, 0 to 1"),
        ({"layers": [-1]}, r"layers=\[-1\]"),
        ({"layers": ["0"]}, r"layers=\['0'\]"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments, message):
    model = MISTRAL.model()
    with pytest.raises(SettingsError, match=message):
        replace_norms(model, **arguments)
    assert type(model) is transformers.MistralForCausalLM


class OwnMistral(transformers.MistralForCausalLM):
    """A class of somebody's own."""


def test_models_that_cannot_be_replaced_say_why():
    with pytest.raises(ModelError, match=r"LNFreeGPT2ForCausalLM is a model of hf_lnfree.*LNFreeGPT2Config"):
        replace_norms(GPT2.model())
    with pytest.raises(ModelError, match=r"OwnMistral .* is no public class"):
        replace_norms(OwnMistral(transformers.MistralConfig(**GROUPED)))
    with pytest.raises(ModelError, match="got Linear"):
        replace_norms(nn.Linear(2, 2))
    with pytest.raises(ModelError, match=r"GptOss.*no module as activation"):
        replace_norms(BY_NAME["GptOssForCausalLM"].model(), activation="relu")
    quantised = MISTRAL.model()
    quantised.is_quantized = True
    with pytest.raises(ModelError, match="is quantised"):
        refuse(quantised)
    adapted = get_peft_model(MISTRAL.model(), LoraConfig()).base_model.model
    with pytest.raises(ModelError, match="has adapters"):
        replace_norms(adapted)
    shared = MISTRAL.model()
    shared.model.layers[1].input_layernorm = shared.model.layers[0].input_layernorm
    with pytest.raises(ModelError, match=r"One module stands at model\.layers\.0\.input_layernorm"):
        replace_norms(shared)


def test_folders_that_hold_something_else_are_refused(tmp_path):
    stock = MISTRAL.model()
    with pytest.raises(ModelError, match="Nothing was replaced in MistralForCausalLM"):
        save_norm_free(stock, tmp_path)
    stock.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is no model that replace_norms changed"):
        load_norm_free(tmp_path)
    with pytest.raises(OSError, match="nothing"):
        load_norm_free(tmp_path / "nothing")
    replace_norms(stock, "none")
    stock.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["replacements"]["version"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match=r"written in version 2.*reads up to 1"):
        load_norm_free(tmp_path)


def test_sites_can_be_said():
    """Those of the GPT-2 that this package declares, for stock GPT-2 with cross-attention that no trial reaches."""
    model = transformers.GPT2LMHeadModel(GPT2.stock_config(add_cross_attention=True))
    report = replace_norms(model, "none", final_norm="rmspre", activation="relu", sites=LNFreeGPT2Model.stacks)
    assert len(report.replaced) == 3 * 3 + 1 + 3
    assert isinstance(model.transformer.h[2].ln_cross_attn, nn.Identity)
    bert = transformers.BertForMaskedLM(BERT.stock_config())
    assert "transformer.h.0.ln_1" in report.replaced
    with pytest.raises(ModelError, match="sites= name a module that BertModel does not have"):
        replace_norms(bert, "none", sites=LNFreeGPT2Model.stacks)
