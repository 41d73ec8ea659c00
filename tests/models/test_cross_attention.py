"""T5 and Whisper: encoder and decoder with their norms the stock model bit for bit, and every field without them."""

import copy
import math
import pickle
import re
import subprocess
import sys

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModel, Trainer, TrainingArguments

import hf_lnfree
from hf_lnfree import AttentionEntropyAnalyzer, named_slopes, record_attention_entropy
from hf_lnfree.models.errors import ConfigurationError
from hf_lnfree.models.stabilizers import HeadControl, ResidualGain

from ..conftest import GATED_T5, T5, WHISPER, cache_field
from .test_variants import moved

FAMILIES = (T5, GATED_T5, WHISPER)
GENERATION = "ConditionalGeneration"
AUTO = {"t5": "Seq2SeqLM", "gated_t5": "Seq2SeqLM", "whisper": "SpeechSeq2Seq"}
LAYERS = 5  # 2 of the encoder, 3 of the decoder
# Every norm and every option once.
COMBINATIONS = [
    {"norm": "rmsnorm", "final_norm": "rmspre", "weight_norm": "weight"},
    {"norm": "rmspre", "final_norm": "none", "weight_norm": "spectral", "weight_norm_scope": "block"},
    {"norm": "dyt", "final_norm": "derf", "residual_gain": "rezero", "ffn_scale": True, "norm_alpha_final": 0.2},
    {"norm": "derf", "final_norm": "dyt", "weight_norm": "weight", "weight_norm_scope": "block"},
    {"norm": "none", "final_norm": "none", "residual_gain": "skipinit", "attention_temperature": True},
    {"norm": "layernorm", "final_norm": "scale", "query_key_norm": True, "residual_gain": "fixed"},
    {"norm": "scale", "final_norm": "affine", "attention_softcap": 2.0, "activation": "gelu_relu"},
    {"norm": "affine", "final_norm": "layernorm", "activation": "prelu", "linear_bias": "query_key"},
    {"norm": "fixed_scale", "final_norm": "fixed_scale", "activation": "identity"},
    {"layer_activations": "identity_fused:0-2,relu:3-4", "ffn_scale": True, "weight_norm": "weight"},
    {"layer_activations": "relu:0-1,learnable_leaky_relu:2-4", "layer_norms": "dyt:0,none:1-3,scale:4"},
]


@pytest.fixture(params=FAMILIES, ids=lambda f: f.name)
def family(request):
    return request.param


one_of_each = pytest.mark.parametrize("family", [GATED_T5, WHISPER], ids=lambda f: f.name)


def inputs(family, seed=0):
    """What an encoder-decoder reads: tokens or 16 frames of 8 mel bands, and 5 tokens of the decoder."""
    generator = torch.Generator().manual_seed(seed)
    decoded = torch.randint(3, 99, (2, 5), generator=generator)
    if family is WHISPER:
        return {"input_features": torch.randn(2, 8, 16, generator=generator), "decoder_input_ids": decoded}
    return {"input_ids": torch.randint(3, 99, (2, 7), generator=generator), "decoder_input_ids": decoded}


def wide(batch):
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def model_of(family, **fields):
    return moved(family.model(head=GENERATION, initializer_range=1.0 if family is not WHISPER else 0.2, **fields))


@torch.no_grad()
def logits(model, batch):
    return model.eval()(**batch).logits


def fitting(family, fields):
    """The fields of a combination that a family can honour."""
    refused = set() if family is WHISPER else {"query_key_norm", "linear_bias"}
    fields = {name: value for name, value in fields.items() if name not in refused}
    if family.gated:  # a gated MLP is no matrix
        fields = {n: v.replace("identity_fused", "identity") if isinstance(v, str) else v for n, v in fields.items()}
    return fields


@pytest.mark.parametrize("fields", COMBINATIONS, ids=str)
def test_every_combination_goes_every_way(family, fields, tmp_path):
    fields, batch = fitting(family, fields), inputs(family)
    new = family.model(head=GENERATION, initializer_range=1.0, **fields)
    before = {name: value.clone() for name, value in new.state_dict().items()}
    model = moved(new)
    expected = logits(model, batch)
    assert expected.isfinite().all()
    assert torch.equal(logits(copy.deepcopy(model), batch), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), batch), expected)

    model.save_pretrained(tmp_path / "saved")
    auto = getattr(transformers, f"AutoModelFor{AUTO[family.name]}")
    loaded, info = auto.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values())
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded, batch), expected)

    if "identity_fused" not in model.config.block_activations:  # whose matrices no stock model has
        # What a stock checkpoint lacks begins as in a new model.
        stock = family.stock_model(head=GENERATION, initializer_range=1.0)
        stock.save_pretrained(tmp_path / "stock")
        partial = type(model).from_pretrained(tmp_path / "stock", config=copy.deepcopy(model.config))
        for name, value in partial.state_dict().items():
            if name in stock.state_dict():
                assert torch.equal(value, stock.state_dict()[name]), name
            elif "weight_scale" not in name:
                assert torch.equal(value, before[name]), name

    gradients = []
    for checkpointing in (False, True):
        trained = copy.deepcopy(model).double().train()
        if checkpointing:
            getattr(trained, "activation_checkpointing_enable", trained.gradient_checkpointing_enable)()
        trained(**wide(batch), labels=batch["decoder_input_ids"], use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in trained.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        # Gradients of what both stacks use are summed in another order.
        largest = gradient.abs().max().item()
        torch.testing.assert_close(gradient, gradients[1][name], rtol=0, atol=1e-6 * largest, msg=name)

    targets = "q_proj v_proj fc1" if family is WHISPER else "q v wo"
    task = None if family is WHISPER else "SEQ_2_SEQ_LM"  # whose wrapper wants input_ids
    lora = LoraConfig(task_type=task, r=2, init_lora_weights=False, target_modules=targets.split())
    if "fused" in str(fields):
        lora.target_modules -= {"fc1"}  # which is not there
    adapted = get_peft_model(copy.deepcopy(model), lora)
    assert not torch.equal(logits(adapted, batch), expected)


ENDS = {
    "T5": (
        *("Model", "EncoderModel", "ForConditionalGeneration", "ForSequenceClassification", "ForTokenClassification"),
        "ForQuestionAnswering",
    ),
    "Whisper": ("Model", "ForConditionalGeneration", "ForAudioClassification"),
}
CLASSES = [(family, end) for family in FAMILIES for end in ENDS[family.stock_prefix]]


def fitting_inputs(family, end, seed=0):
    batch = inputs(family, seed)
    if end in ("EncoderModel", "ForTokenClassification", "ForAudioClassification", "ForSequenceClassification"):
        del batch["decoder_input_ids"]
    if end == "ForSequenceClassification":
        batch["input_ids"][:, -1] = 1  # one end of sequence each
    return batch


@pytest.mark.parametrize(("family", "end"), CLASSES, ids=lambda x: getattr(x, "name", x))
def test_with_its_norms_it_is_the_stock_model(family, end, tmp_path):
    own, stock_class = (
        getattr(module, prefix + end)
        for module, prefix in ((hf_lnfree, family.prefix), (transformers, family.stock_prefix))
    )
    torch.manual_seed(0)
    ours = own(family.config(norm=family.norm))
    torch.manual_seed(0)
    stock = stock_class(family.stock_config())
    ours_state, state = ours.state_dict(), stock.state_dict()
    assert ours_state.keys() == state.keys()
    assert all(torch.equal(ours_state[name], value) for name, value in state.items())
    moved(stock).save_pretrained(tmp_path / "stock")
    loaded, info = own.from_pretrained(tmp_path / "stock", norm=family.norm, output_loading_info=True)
    assert not any(info.values())
    batch = fitting_inputs(family, end)
    with torch.no_grad():
        found, wanted = loaded(**batch), stock(**batch)
    assert found.keys() == wanted.keys()
    assert torch.equal(found[0], wanted[0])
    with pytest.raises(ConfigurationError, match="they would be dropped"):
        own.from_pretrained(tmp_path / "stock")
    loaded.save_pretrained(tmp_path / "ours")
    ends = {"EncoderModel": "ForTextEncoding", f"For{GENERATION}": f"For{AUTO[family.name]}"}
    auto = AutoModel if end == "Model" else getattr(transformers, f"AutoModel{ends.get(end, end)}")
    assert type(auto.from_pretrained(tmp_path / "ours")) is own


@pytest.mark.parametrize(("family", "end"), CLASSES, ids=lambda x: getattr(x, "name", x))
def test_norm_free_it_is_the_stock_graph_without_its_norms(family, end):
    """In float64: identities in the places of all norms, or of those of the blocks."""
    for final in ("none", family.norm):
        config = family.config(norm="none", final_norm=final, activation="relu")
        ours = moved(getattr(hf_lnfree, family.prefix + end)(config)).double()
        stock = getattr(transformers, family.stock_prefix + end)(family.stock_config(activation="relu"))
        for name, module in list(stock.named_modules()):
            of_block = re.search(r"\.\d+\.", name)
            if type(module).__name__.endswith("LayerNorm") and (final == "none" or of_block):
                stock.set_submodule(name, nn.Identity())
            if name.rpartition(".")[2] in ("act", "activation_fn"):
                stock.set_submodule(name, nn.ReLU())
        stock.double().eval().load_state_dict(ours.state_dict())
        batch = wide(fitting_inputs(family, end))
        with torch.no_grad():
            assert torch.equal(ours(**batch)[0], stock(**batch)[0])


def test_layers_are_counted_through_encoder_and_decoder(family):
    norms = ["none", "dyt", "affine", "none", "scale"]
    activations = ["relu", "gelu", "silu", "prelu", "relu"]
    model = model_of(family, layer_norms=norms, layer_activations=activations)
    found = []
    for stack in model.base_model.stacks:
        for block in stack.block_list(model.base_model):
            kinds = {type(branch.norm_module(block)).__name__ for branch in stack.branches(block).values()}
            found.append((*kinds, block.get_submodule(stack.mlp.activation).built[0]))
    names = {"none": "Identity", "dyt": "DynamicTanh", "affine": "Affine", "scale": "Scale"}
    assert found == [(names[norm], activation) for norm, activation in zip(norms, activations, strict=True)]
    rule = family.config(layer_norms=f"none:0-1,{family.norm}:2-4")
    assert rule.block_norms == ["none"] * 2 + [family.norm] * 3
    with pytest.raises(ConfigurationError, match="5 layers, 4 entries"):
        family.config(layer_norms=norms[:4])


def test_a_global_slope_is_one_parameter_of_both_stacks(family, tmp_path):
    model = model_of(family, activation="learnable_leaky_relu", slope_scope="global")
    assert len(named_slopes(model)) == LAYERS
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for found in (model, loaded, copy.deepcopy(loaded)):
        assert len({id(slope) for slope in named_slopes(found).values()}) == 1
        assert next(iter(named_slopes(found).values())).item() == pytest.approx(0.01, abs=1)
    assert torch.equal(logits(loaded, inputs(family)), logits(model, inputs(family)))


def test_gains_count_the_layers_of_their_own_stack(family):
    model = model_of(family, residual_gain="fixed")
    base = model.base_model
    for stack, layers in zip(base.stacks, (2, 3), strict=True):
        gains = [m for block in stack.block_list(base) for m in block.modules() if isinstance(m, ResidualGain)]
        assert len(gains) == layers * len(stack.named_branches)
        assert {gain.value for gain in gains} == {1 / math.sqrt(2 * layers)}
    rezero = model_of(family, residual_gain="rezero")
    assert sum("gain" in name for name, _ in rezero.named_parameters()) == LAYERS


# Generation

FREE = [
    {"norm": "none", "final_norm": "none"},
    {"norm": "dyt", "attention_temperature": True, "residual_gain": "fixed"},
]

# `generate` of transformers 5.24 makes the decoder a cache with as many layers as the encoder has, for stock T5 too.
DEPTHS = {"t5": {"num_decoder_layers": 2}, "gated_t5": {"num_decoder_layers": 2}, "whisper": {}}


def source(family):
    batch = inputs(family)
    del batch["decoder_input_ids"]
    return batch


@pytest.mark.parametrize("fields", FREE, ids=str)
def test_greedy_decoding_with_caches_is_the_forward_pass_without(family, fields):
    model = model_of(family, **fields, **DEPTHS[family.name])
    encoded = source(family)
    rows = torch.full((2, 1), model.config.decoder_start_token_id)
    for _ in range(8):
        rows = torch.cat((rows, logits(model, {**encoded, "decoder_input_ids": rows})[:, -1:].argmax(-1)), dim=1)
    found = plain_generate(model, family, num_beams=1)
    assert torch.equal(found, rows)


def plain_generate(model, family, **options):
    """`generate` of transformers itself: Whisper's own cuts its start tokens off."""
    generate = transformers.GenerationMixin.generate
    return generate(
        model, **source(family), max_new_tokens=8, min_new_tokens=8, eos_token_id=None, do_sample=False, **options
    )


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_caches_of_self_and_cross_attention_change_nothing(family, cache):
    model = model_of(family, norm="none", final_norm="none", attention_temperature=True, **DEPTHS[family.name])
    beams = [plain_generate(model, family, num_beams=3, use_cache=use) for use in (True, False)]
    assert torch.equal(*beams)
    greedy = [
        plain_generate(model, family, num_beams=1, use_cache=use, cache_implementation=cache if use else None)
        for use in (True, False)
    ]
    assert torch.equal(*greedy)
    decoded = inputs(family)["decoder_input_ids"]
    model.double()  # nothing keeps the stream of a model without norms from growing, and rounding with it
    given = {name: x.double() if x.is_floating_point() else x for name, x in source(family).items()}
    whole = logits(model, {**given, "decoder_input_ids": decoded})
    with torch.no_grad():
        first = model(**given, decoder_input_ids=decoded[:, :3], use_cache=True)
        states = (first.encoder_last_hidden_state,)
        rest = {cache_field(model): first[cache_field(model)]}
        later = model(encoder_outputs=states, decoder_input_ids=decoded[:, 3:], **rest).logits
    torch.testing.assert_close(later, whole[:, 3:])


def test_with_its_norms_it_generates_what_the_stock_model_does(family):
    ours = family.model(head=GENERATION, norm=family.norm, **DEPTHS[family.name])
    stock = family.stock_model(head=GENERATION, **DEPTHS[family.name])
    stock.load_state_dict(ours.state_dict())
    options = {"max_new_tokens": 6, "num_beams": 2}
    if family is WHISPER:
        options["decoder_input_ids"] = torch.tensor([[7, 8, 2], [9, 5, 2]])  # a prompt before the start token
    found, wanted = (model.generate(**source(family), **options) for model in (ours, stock))
    assert torch.equal(found, wanted)
    if family is WHISPER:
        prompted = transformers.GenerationMixin.generate(ours, **source(family), **options)
        assert torch.equal(prompted[:, :3], options["decoder_input_ids"])


def test_decoder_inputs_losses_and_smoothed_losses_are_those_of_the_stock_model(family, tmp_path):
    ours = family.model(head=GENERATION, norm=family.norm)
    stock = family.stock_model(head=GENERATION)
    stock.load_state_dict(ours.state_dict())
    labels = inputs(family)["decoder_input_ids"].clone()
    labels[0, 3:] = -100
    batch = {**source(family), "labels": labels}
    with torch.no_grad():
        assert torch.equal(ours(**batch).loss, stock(**batch).loss)
        assert torch.equal(ours(**batch).logits, stock(**batch).logits)
    batch["decoder_input_ids"] = inputs(family)["decoder_input_ids"]  # as a collator makes them of the labels
    smoothed = []
    for model in (ours, stock):
        args = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to=[])
        smoothed.append(Trainer(model, args).compute_loss(model, copy.copy(batch)).item())
    assert smoothed[0] == smoothed[1]


@one_of_each
def test_it_learns_to_copy_without_norms(family, tmp_path):
    """A plain Trainer: the decoder says what the encoder read, a token or the loudest band."""
    torch.manual_seed(0)
    names = torch.arange(8) + 3
    if family is WHISPER:
        sound = torch.zeros(8, 8, 16)
        sound[torch.arange(8), torch.arange(8)] = 3.0
        rows = [{"input_features": x, "labels": name.repeat(3)} for x, name in zip(sound, names, strict=True)]
    else:
        rows = [{"input_ids": name.repeat(4), "labels": name.repeat(3)} for name in names]
    model = family.model(
        head=GENERATION, norm="none", activation="relu", **({"initializer_range": 1.0} if family is not WHISPER else {})
    )
    args = TrainingArguments(
        str(tmp_path), max_steps=150, learning_rate=3e-3, use_cpu=True, save_strategy="no", report_to=[]
    )
    trainer = Trainer(model, args, train_dataset=rows)
    trainer.train()
    assert trainer.evaluate(rows)["eval_loss"] < 0.2


# Fields


@one_of_each
def test_compiles_as_one_graph(family):
    fields = {"norm": "derf", "weight_norm": "spectral", "attention_softcap": 2.0, "attention_temperature": True}
    model = model_of(family, **fields, query_key_norm=family is WHISPER)
    batch = inputs(family)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**batch, use_cache=False).logits, logits(model, batch))
    torch._dynamo.reset()


def attention_inputs(model, batch):
    """[(module, query, key, position bias, map)] of every attention of one forward pass in eager attention."""
    seen = []
    interface = transformers.AttentionInterface
    look_up = interface.get_interface

    def get_interface(self, name, default):
        function = look_up(self, name, default)

        def spying(module, query, key, value, mask, **kwargs):
            out = function(module, query, key, value, mask, **kwargs)
            seen.append((module, query, key, kwargs.get("scaling"), kwargs.get("position_bias"), mask, out[1]))
            return out

        return spying

    interface.get_interface = get_interface
    try:
        model(**batch)
    finally:
        interface.get_interface = look_up
    return seen


@pytest.mark.parametrize("norm", [False, True], ids=["temperature", "query-key norm"])
def test_queries_and_keys_are_controlled_in_every_attention(family, norm):
    """In float64, also where keys are read from the encoder, and with fewer heads in the decoder."""
    if norm and family is not WHISPER:
        with pytest.raises(ConfigurationError, match="query_key_norm=True is not for LNFreeT5Config"):
            model_of(family, query_key_norm=True)
        return
    model = model_of(family, attention_temperature=True, query_key_norm=norm, attn_implementation="eager").double()
    plain = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("q", "k", "q_proj", "k_proj"):
            module.register_forward_pre_hook(lambda m, args, name=name: plain.update({name: m.forward(args[0])}))
    with torch.no_grad():
        seen = attention_inputs(model, wide(inputs(family)))
    assert len(seen) == 2 + 2 * 3
    names = {module: name for name, module in model.named_modules()}
    controls = 0
    for module, query, key, *_ in seen:
        ends = ("q_proj", "k_proj") if family is WHISPER else ("q", "k")
        for end, made in zip(ends, (query, key), strict=True):
            raw = plain[f"{names[module]}.{end}"].unflatten(-1, (made.shape[1], -1)).transpose(1, 2)
            if norm:
                raw = raw / (raw.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            if end.startswith("q"):
                raw = raw * module.q_control.temperature[:, None, None]
                raw = raw * (module.scaling if family is WHISPER else 1.0)
            torch.testing.assert_close(made, raw, rtol=0, atol=1e-12)
        controls += sum(isinstance(child, HeadControl) for child in module.children())
    assert controls == 8 * (1 + norm)


def test_logits_are_capped_before_the_position_bias(family):
    model = model_of(family, attention_softcap=0.7).double()
    assert model.config._attn_implementation == "eager"
    with torch.no_grad():
        seen = attention_inputs(model, wide(inputs(family)))
    assert len(seen) == 8
    for _, query, key, scaling, bias, mask, map_ in seen:
        capped = 0.7 * torch.tanh(query @ key.mT * scaling / 0.7)
        capped = capped if bias is None else capped + bias
        capped = capped if mask is None else capped + mask
        torch.testing.assert_close(map_, capped.softmax(-1), rtol=0, atol=1e-12)
    assert any(bias is not None and bias.any() for *_, bias, _, _ in seen) == (family is not WHISPER)
    with pytest.raises(ValueError, match='attn_implementation="eager"'):
        model.set_attn_implementation("sdpa")


# Where the package is not

ALONE = """
import sys
sys.modules["hf_lnfree"] = None
import torch, transformers
torch.set_grad_enabled(False)
batch, auto, folder = torch.load(sys.argv[1])
config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert type(config).__module__.startswith("transformers_modules")
model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules")
model.save_pretrained(sys.argv[2] + "-again")
torch.save((model(**batch).logits.detach(), model.generate(**{k: v for k, v in batch.items() if "decoder" not in k},
    max_new_tokens=4)), sys.argv[2])
"""


@one_of_each
def test_it_loads_where_the_package_cannot_be_imported(family, tmp_path):
    fields = {"norm": "dyt", "residual_gain": "skipinit", "attention_temperature": True, "activation": "prelu"}
    model = model_of(family, **fields, **DEPTHS[family.name])
    model.save_pretrained(tmp_path / "model")
    auto = f"AutoModelFor{AUTO[family.name]}"
    batch = inputs(family)
    torch.save((batch, auto, str(tmp_path / "model")), tmp_path / "in.pt")
    command = [sys.executable, "-W", "ignore", "-c", ALONE, str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found, generated = torch.load(tmp_path / "out.pt")
    assert torch.equal(found, logits(model, batch))
    assert torch.equal(generated, model.generate(**source(family), max_new_tokens=4))
    again = type(model).from_pretrained(tmp_path / "out.pt-again")
    assert torch.equal(logits(again, batch), found)


def test_the_auto_map_names_every_class(family):
    names = set(family.config().auto_map.values())
    own = {family.prefix + end for end in ENDS[family.stock_prefix]} | {f"{family.prefix}Config"}
    assert {name.rpartition(".")[2] for name in names} == own
    for auto, name in family.config().auto_map.items():
        if auto != "AutoConfig":
            mapping = getattr(transformers, auto)._model_mapping
            assert mapping[type(family.config())].__name__ == name.rpartition(".")[2]
    assert type(AutoConfig.for_model(family.config().model_type)) is type(family.config())


# Entropies


def test_entropies_are_those_of_the_maps_and_bounded_by_what_heads_may_see(family):
    model = model_of(family, attn_implementation="eager").double()
    batch = wide(inputs(family))
    if family is not WHISPER:
        batch["attention_mask"] = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    with torch.no_grad(), record_attention_entropy(model) as record:
        out = model(**batch, output_attentions=True)
    cross = "encoder_attn" if family is WHISPER else "EncDecAttention"
    names = list(record.entropies)
    parts = {
        "encoder_attentions": [name for name in names if "encoder." in name and "decoder." not in name],
        "decoder_attentions": [name for name in names if "decoder." in name and cross not in name],
        "cross_attentions": [name for name in names if cross in name],
    }
    assert [len(found) for found in parts.values()] == [2, 3, 3]
    keys = torch.tensor([8, 8] if family is WHISPER else [7, 4])
    for part, found in parts.items():
        maps = getattr(out, part)
        assert len(maps) == len(found)
        for name, map_ in zip(found, maps, strict=True):
            entropy, support = record.entropies[name], record.support[name]
            torch.testing.assert_close(entropy, torch.special.entr(map_).sum(-1), rtol=0, atol=1e-9)
            seen = torch.arange(1, 6).expand(2, 5) if part == "decoder_attentions" else keys[:, None]
            assert torch.equal(support.expand(entropy.shape), seen[:, None].expand(entropy.shape))
            assert (entropy <= seen[:, None].log() + 1e-9).all()


def test_an_analyzer_tells_encoder_decoder_and_cross_attention_apart(family):
    model = model_of(family)
    report = AttentionEntropyAnalyzer(model).run([inputs(family)])
    assert report.kinds == ["bidirectional"] * 2 + ["causal", "cross"] * 3
    assert report.entropy.shape[0] == 8
