"""Norms, normed weights, stabilisers and activations: each formula in float64, and every way that a model goes."""

import copy
import itertools
import math
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.gemma2 import modeling_gemma2 as gemma2

from hf_lnfree import record_attention_entropy
from hf_lnfree.conversion import fold, to_stock
from hf_lnfree.models.activations import build_activation
from hf_lnfree.models.normalizations import NORMALIZATIONS
from hf_lnfree.models.softcap import eager_softcap_attention
from hf_lnfree.models.stabilizers import QueryKeyControl, ResidualGain
from hf_lnfree.models.weight_norms import NormedWeight
from hf_lnfree.training.efficiency import can_compile

from ..conftest import EVERY, cache_field

NORMS = ("rmsnorm", "rmspre", "dyt", "derf", "scale", "affine", "fixed_scale", "none", "layernorm")
OPTIONS = [
    {},
    {"weight_norm": "weight"},
    {"weight_norm": "spectral", "weight_norm_scope": "block"},
    {"weight_norm": "weight", "weight_norm_scope": "block", "linear_bias": "query_key"},
    {"residual_gain": "rezero", "ffn_scale": True},
    {"residual_gain": "skipinit", "attention_temperature": True},
    {"residual_gain": "fixed", "query_key_norm": True, "attention_temperature": True},
    {"attention_softcap": 2.0, "residual_gain": "rezero"},
    {"activation": "prelu"},
    {"activation": "gelu_relu", "ffn_scale": True},
    {"activation": "identity"},
    {"layer_activations": "identity_fused:0-1,relu:2", "ffn_scale": True, "linear_bias": "query_key"},
    {"activation": "identity_fused", "weight_norm": "weight"},
    {"layer_activations": "relu:0-1,gelu:2", "layer_norms": "dyt:0,none:1,scale:2"},
    {"embedding_scale": True, "final_norm": "derf", "norm_alpha_final": 0.2},
]
# Every norm once, every option once, and each option with another norm.
COMBINATIONS = [{"norm": norm, "final_norm": norm} for norm in NORMS] + [
    {"norm": norm, **options} for norm, options in zip(itertools.cycle(NORMS), OPTIONS[1:], strict=False)
]


def fitting(family, fields):
    """The fields of a combination that a family can honour: only the paper's two have a dropout behind embeddings."""
    if family.name not in ("gpt2", "gpt_neox"):
        fields = {name: value for name, value in fields.items() if name != "embedding_scale"}
    if family.gated:  # a gated MLP is no matrix
        fields = {
            name: value.replace("identity_fused", "identity") if isinstance(value, str) else value
            for name, value in fields.items()
        }
    return fields


def moved(model, seed=1):
    """Every parameter and buffer away from where it starts, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("sigma"):
                buffer.fill_(1.7)
    return model.eval()


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


X = torch.linspace(-3, 3, 24, dtype=torch.float64).view(4, 6)
FORMULAS = {
    "rmsnorm": lambda x, p: x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p["weight"],
    "rmspre": lambda x, p: x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt(),
    "dyt": lambda x, p: p["weight"] * torch.tanh(p["alpha"] * x) + p["bias"],
    "derf": lambda x, p: p["weight"] * torch.erf(p["alpha"] * x + p["shift"]) + p["bias"],
    "scale": lambda x, p: p["scale"] * x,
    "affine": lambda x, p: p["weight"] * x + p["bias"],
    "fixed_scale": lambda x, p: p["weight"] * (x - x.mean(-1, keepdim=True)) / p["sigma"] + p["bias"],
}


@pytest.mark.parametrize("name", FORMULAS)
def test_norms_are_their_formulas(name, family):
    module = moved(NORMALIZATIONS[name](nn.LayerNorm(6), family.config(), "mlp").double())
    with torch.no_grad():
        torch.testing.assert_close(module(X), FORMULAS[name](X, module.state_dict()), rtol=0, atol=1e-14)


def test_alphas_have_starts_of_their_own(family):
    model = family.model(norm="dyt", final_norm="derf", norm_alpha=0.2, norm_alpha_attention=0.8)
    block = family.block_list(model)[0]
    (stack,) = model.base_model.stacks
    norms = [branch.norm_module(block) for branch in stack.branches(block).values()]
    assert [norm.alpha.item() for norm in norms] == pytest.approx([0.8, 0.2])
    assert model.base_model.get_submodule(stack.final_norm).alpha.item() == pytest.approx(0.2)
    plain = family.block_list(family.model(norm="dyt", norm_alpha=0.3))[0]
    assert stack.attention.norm_module(plain).alpha.item() == pytest.approx(0.3)
    llama = family.model(
        norm="dyt", final_norm="dyt", norm_alpha_attention=0.8, norm_alpha_mlp=0.2, norm_alpha_final=0.3
    )
    for block in family.block_list(llama):
        norms = [branch.norm_module(block) for branch in stack.branches(block).values()]
        assert [norm.alpha.item() for norm in norms] == pytest.approx([0.8, 0.2])
    assert llama.base_model.get_submodule(stack.final_norm).alpha.item() == pytest.approx(0.3)


def test_the_scale_of_embeddings_is_its_formula(family, input_ids, tmp_path):
    """In float64, for tokens and for embeddings that are given; it starts at the root of the width."""
    if family.name not in ("gpt2", "gpt_neox"):
        with pytest.raises(ValueError, match="embedding_scale=True cannot be honoured by LNFree"):
            family.model(embedding_scale=True)
        return
    model = family.model(norm="dyt", embedding_scale=True)
    (name,) = [name for name, _ in model.named_parameters() if name.endswith(("drop.scale", "emb_dropout.scale"))]
    assert model.get_parameter(name).item() == pytest.approx(math.sqrt(model.config.hidden_size))
    model = moved(model).double()
    tokens = model.get_input_embeddings().weight[input_ids]
    positions = model.base_model.wpe.weight[: input_ids.shape[1]] if family.name == "gpt2" else 0
    for given in ({"input_ids": input_ids}, {"inputs_embeds": tokens}):
        found = model(**given, output_hidden_states=True).hidden_states[0]
        torch.testing.assert_close(found, model.get_parameter(name) * (tokens + positions), rtol=0, atol=1e-14)


@pytest.mark.parametrize("tied", [True, False])
def test_the_scale_of_embeddings_goes_into_their_weights(family, tied, input_ids):
    """A head that shares the weights of the embedding keeps those that it had."""
    if family.name not in ("gpt2", "gpt_neox"):
        pytest.skip("refused")
    model = moved(family.model(norm="none", final_norm="none", embedding_scale=True, tie_word_embeddings=tied)).double()
    folded, told = fold(model)
    assert told.untied == tied
    for found in (folded, to_stock(model)):
        torch.testing.assert_close(logits(found, input_ids), logits(model, input_ids), rtol=1e-9, atol=1e-9)


ACTIVATIONS = {
    "prelu": lambda x, p: torch.where(x > 0, x, p["weight"] * x),
    "gelu_relu": lambda x, p: (
        (s := 1 / (1 + torch.exp(-p["weight"]))) * x * (1 + torch.erf(x / math.sqrt(2))) / 2 + (1 - s) * x.clamp(min=0)
    ),
    "relu2": lambda x, p: x.clamp(min=0) ** 2,
    "identity": lambda x, p: x,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_their_formulas(name):
    module = moved(build_activation(name, 6, 0.25).double())
    with torch.no_grad():
        torch.testing.assert_close(module(X), ACTIVATIONS[name](X, module.state_dict()), rtol=0, atol=1e-14)


def projections(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, NormedWeight)}


def test_normed_weights_are_their_formulas(family):
    plain = family.model(norm="none").double()
    (stack,) = plain.base_model.stacks
    block = family.block_list(plain)[0]
    mlp, attention = (len(branch.projections(block)) for branch in (stack.mlp, stack.attention))
    for kind, scope, count in (("weight", "mlp", mlp), ("spectral", "block", mlp + attention)):
        model = family.model(norm="none", weight_norm=kind, weight_norm_scope=scope).double()
        normed = projections(model)
        assert len(normed) == 3 * count
        for name, module in normed.items():
            start = plain.get_submodule(name).weight
            assert torch.equal(module.trained, start)  # the same random numbers as without
            if kind == "weight":
                torch.testing.assert_close(torch.Tensor(module.weight), start, rtol=1e-6, atol=0)
        for name, module in projections(moved(model)).items():
            rows = module.trained.T if type(plain.get_submodule(name)).__name__ == "Conv1D" else module.trained
            if kind == "weight":
                expected = module.weight_scale[:, None] * rows / rows.square().sum(1, keepdim=True).sqrt()
            else:
                expected = rows / torch.linalg.svdvals(rows)[0]
            weight = module.weight.T if rows is not module.trained else module.weight
            torch.testing.assert_close(torch.Tensor(weight), expected, rtol=0, atol=1e-6)


def test_power_iteration_finds_the_largest_singular_value(family, input_ids):
    model = moved(family.model(norm="layernorm", weight_norm="spectral")).train()
    module = next(iter(projections(model).values()))
    seen = []
    module.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    for _ in range(60):
        model(input_ids)
    largest = torch.linalg.svdvals(module.trained)[0]
    with torch.no_grad():
        for (x, output), tolerance in ((seen[0], None), (seen[-1], 1e-3)):  # one step is not there yet
            plain = module.plain.forward(SimpleNamespace(weight=module.trained, **sizes(module)), x)
            bias = 0 if module.bias is None else module.bias
            sigma = (plain - bias).norm() / (output - bias).norm()
            assert (sigma.item() == pytest.approx(largest.item(), rel=tolerance or 1e-3)) == (tolerance is not None)
        before = module.weight_u.clone()
        model.eval()(input_ids)
    assert torch.equal(module.weight_u, before)  # evaluation changes nothing


def sizes(module):
    """What else the forward of a plain projection reads."""
    return {name: getattr(module, name) for name in ("bias", "nf") if hasattr(module, name)}


def test_reading_a_weight_in_training_changes_nothing(family, input_ids):
    """Printed, compared or folded between two steps: the next one is what it would have been."""
    losses = []
    for reads in (False, True):
        model = moved(family.model(norm="layernorm", weight_norm="spectral", weight_norm_scope="block")).train()
        for _ in range(2):
            for module in projections(model).values() if reads else ():
                assert torch.linalg.matrix_norm(torch.Tensor(module.weight), 2).item() == pytest.approx(1, rel=1e-4)
                assert "nan" not in str(module.weight)
            losses.append(model(input_ids, labels=input_ids).loss.item())
        losses.append([buffer.tolist() for module in projections(model).values() for buffer in module.buffers()])
    assert losses[:3] == losses[3:]


def test_checkpointing_is_no_step_of_power_iteration(family, input_ids):
    gradients = []
    for checkpointing in (False, True):
        model = moved(family.model(norm="layernorm", weight_norm="spectral", weight_norm_scope="block")).train()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model(input_ids, labels=input_ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers()))
    for name, value in gradients[0].items():
        assert torch.equal(value, gradients[1][name]), name


def test_residual_gains_are_their_formula(family, input_ids):
    for kind, expected in (("rezero", 0.0), ("skipinit", 0.0), ("fixed", 1 / math.sqrt(6))):
        model = family.model(norm="layernorm", residual_gain=kind).eval()
        gains = [module for module in model.modules() if isinstance(module, ResidualGain)]
        assert [float(torch.as_tensor(gain.value).detach()) for gain in gains] == pytest.approx([expected] * 6)
        learned = sum("gain" in name for name, _ in model.named_parameters())
        assert learned == {"rezero": 3, "skipinit": 6, "fixed": 0}[kind]
    free = family.model(norm="layernorm", residual_gain="rezero").eval()
    embedded = free.get_input_embeddings()(input_ids)
    if family.name == "gpt2":
        embedded = embedded + free.transformer.wpe(torch.arange(input_ids.shape[1]))
    if family.name == "opt":  # whose table begins with two positions that no token has
        embedded = embedded + free.model.decoder.embed_positions.weight[2 : 2 + input_ids.shape[1]]
    with torch.no_grad():  # at the start the blocks are not there
        hidden = free(input_ids, output_hidden_states=True).hidden_states
        torch.testing.assert_close(hidden[-2], embedded)


def test_queries_and_keys_are_controlled(family, input_ids):
    """Where one projection makes both."""
    if family.name not in ("gpt2", "gpt_neox"):
        pytest.skip("has projections of their own")
    model = moved(family.model(norm="layernorm", query_key_norm=True, attention_temperature=True).double())
    block = family.block_list(model)[0]
    control = next(module for module in block.modules() if isinstance(module, QueryKeyControl))
    seen = {}
    fused = block.get_submodule(model.base_model.stacks[0].attention.query_key_value)
    fused.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    fused.register_forward_hook(lambda module, args, output: seen.update(out=output))
    logits(model, input_ids)
    with torch.no_grad():
        raw = fused.forward(seen["x"]).unflatten(-1, (control.groups, 3, 4 // control.groups, -1))
    got = seen["out"].view(raw.shape)
    query, key, value = raw.unbind(-3)
    factor = control.temperature.view(control.groups, -1, 1)
    for part, result, times in ((query, got[..., 0, :, :], factor), (key, got[..., 1, :, :], 1.0)):
        expected = part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt() * times
        torch.testing.assert_close(result, expected)
    assert torch.equal(got[..., 2, :, :], value)


def test_queries_and_keys_of_separate_projections_are_controlled(family, input_ids):
    """In float64, as the stock attention gets them: control of ours, or the norms with gains that Qwen3 has."""
    if family.name in ("gpt2", "gpt_neox"):
        pytest.skip("has one projection")
    model = moved(family.model(norm=family.norm, query_key_norm=True, attention_temperature=True).double())
    block = family.block_list(model)[0]
    attention = block.self_attn
    heads = {"q": 4, "k": 4 if family.name == "opt" else 2}
    seen = {}
    for name in heads:
        last = getattr(attention, f"{name}_norm", getattr(attention, f"{name}_proj"))
        last.register_forward_hook(lambda module, args, output, name=name: seen.update({name: output}))
        proj = getattr(attention, f"{name}_proj")
        proj.register_forward_pre_hook(lambda module, args, name=name: seen.update({f"{name} read": args[0]}))
    logits(model, input_ids)
    with torch.no_grad():
        for name, count in heads.items():
            projection = getattr(attention, f"{name}_proj")
            raw = nn.functional.linear(seen[f"{name} read"], projection.weight, projection.bias)
            raw = raw.unflatten(-1, (count, -1))
            expected = raw / (raw.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            if family.name == "qwen3":
                expected = expected * getattr(attention, f"{name}_norm").weight
            if name == "q":
                expected = expected * attention.q_control.temperature[:, None]
            # Qwen3's norm works in float32
            torch.testing.assert_close(seen[name].view_as(raw), expected, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what transformers asks of flex attention
def test_capped_attention_is_that_of_gemma_2(family, input_ids):
    """In every layer, with a mask and a cache; entropies are those of its maps."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (4 * torch.randn(2, 3, 5, 8, generator=generator).double() for _ in range(3))
    mask = torch.full((5, 5), -1e300, dtype=torch.float64).triu(1)
    module = SimpleNamespace(num_key_value_groups=1, training=False, head_dim=8)
    call = {"scaling": 0.3, "softcap": 2.0}
    output, map_ = eager_softcap_attention(module, query, key, value, mask, **call)
    expected = (2 * torch.tanh(query @ key.mT * 0.3 / 2) + mask).softmax(-1)
    torch.testing.assert_close(map_, expected, rtol=0, atol=1e-14)
    theirs, _ = gemma2.eager_attention_forward(module, query, key, value, mask, **call)  # softmax in float32
    torch.testing.assert_close(output, theirs, rtol=0, atol=5e-6)

    model = moved(family.model(norm="none", attention_softcap=0.5))
    assert model.config._attn_implementation == "eager"
    free = family.model(norm="none")
    free.load_state_dict(model.state_dict())
    wide = family.model(norm="none", attention_softcap=1e4)
    wide.load_state_dict(model.state_dict())
    expected = logits(model, input_ids)
    torch.testing.assert_close(logits(wide.eval(), input_ids), logits(free.eval(), input_ids), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, logits(free, input_ids), atol=1e-3)
    maps = model(input_ids, output_attentions=True).attentions
    with record_attention_entropy(model) as record:
        model(input_ids)
    for map_, entropy in zip(maps, record.entropies.values(), strict=True):
        torch.testing.assert_close(entropy, -torch.xlogy(map_, map_).sum(-1), rtol=0, atol=1e-5)
    first = model(input_ids[:, :4], use_cache=True)
    last = model(input_ids[:, 4:], **{cache_field(model): first[cache_field(model)]}).logits
    torch.testing.assert_close(last, expected[:, 4:])
    with pytest.raises(ValueError, match='attn_implementation="eager"'):
        model.set_attn_implementation("sdpa")
    if model._supports_flex_attn and can_compile(torch.device("cpu")):  # which takes the cap as an argument
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(logits(model, input_ids), expected)


@pytest.mark.parametrize("fields", COMBINATIONS, ids=str)
def test_every_combination_goes_every_way(family, fields, input_ids, tmp_path):
    fields = fitting(family, fields)
    model = family.model(**fields)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moved(model)
    expected = logits(model, input_ids)
    assert expected.isfinite().all()

    model.save_pretrained(tmp_path / "saved")
    loaded, info = type(model).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(loaded.eval(), input_ids), expected)
    assert torch.equal(logits(copy.deepcopy(model), input_ids), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), input_ids), expected)

    if "identity_fused" not in model.config.block_activations:  # whose matrices no stock model has
        # What a stock checkpoint lacks begins as in a new model.
        family.stock_model().save_pretrained(tmp_path / "stock")
        partial = type(model).from_pretrained(tmp_path / "stock", config=copy.deepcopy(model.config))
        stock = family.stock_model().state_dict()
        for name, value in partial.state_dict().items():
            if name not in stock and "weight_scale" not in name:
                assert torch.equal(value, before[name]), name

    loaded.resize_token_embeddings(120)
    torch.testing.assert_close(logits(loaded, input_ids)[..., :99], expected)

    folded, _ = fold(copy.deepcopy(model).double())
    exact = 1e-5 if family.gated else 1e-7  # RMSNorms of these families work in float32
    wide = logits(copy.deepcopy(model).double(), input_ids)
    torch.testing.assert_close(logits(folded, input_ids), wide, rtol=exact, atol=exact)
    left = folded.config
    assert (left.weight_norm, left.residual_gain, left.ffn_scale) == ("none", "none", False)
    assert not left.embedding_scale
    assert not left.attention_temperature or left.query_key_norm
    kept = {"affine", "fixed_scale"} if family.name == "qwen3" else set()  # nothing there may have a bias
    assert not set(left.block_norms) & ({"scale", "affine", "fixed_scale", "rmsnorm"} - kept)

    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False))
    changed = logits(adapted.eval(), input_ids)
    assert not torch.equal(changed, expected)
    if fields.get("weight_norm_scope") == "block":
        with pytest.raises(ValueError, match=r"computed \(weight_norm\).*Fold first"):
            adapted.merge_and_unload()
    else:
        near = 1e-4 * changed.abs().max().clamp(min=1).item()  # streams without norms grow
        torch.testing.assert_close(logits(adapted.merge_and_unload(), input_ids), changed, rtol=1e-4, atol=near)


def test_identity_mlps_become_one_matrix(family, input_ids, tmp_path):
    if family.gated:
        with pytest.raises(ValueError, match="is gated"):
            family.model(activation="identity_fused")
        return
    model = moved(family.model(norm="layernorm", layer_activations="identity:0,relu:1,identity:2", ffn_scale=True))
    fused, _ = fold(model.double(), fuse_identity=True)
    torch.testing.assert_close(logits(fused, input_ids), logits(model, input_ids))
    assert fused.config.block_activations == ["identity_fused", "relu", "identity_fused"]
    width, wide = model.config.hidden_size, 4 * model.config.hidden_size
    saved = 2 * (2 * width * wide + wide - width * width)
    norms = sum(p.numel() for n, p in model.named_parameters() if "ln_" in n or "layernorm" in n or "layer_norm" in n)
    untied = model.get_input_embeddings().weight.numel() if family.name != "gpt_neox" else 0
    bias = model.config.vocab_size  # of the head, where that of the final norm went
    assert fused.num_parameters() == model.num_parameters() - saved - norms - 2 * 3 + untied + bias
    fused.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path), input_ids), logits(fused, input_ids))
    with pytest.raises(ValueError, match="an MLP of it is one matrix"):
        to_stock(fused)
    plain, _ = fold(model)
    assert plain.config.block_activations == ["identity", "relu", "identity"]


def test_all_parameters_get_gradients(family, input_ids):
    for fields in COMBINATIONS:
        model = moved(family.model(**fitting(family, fields))).train()
        model(input_ids, labels=input_ids).loss.backward()
        without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not without, (fields, without)


def test_nothing_chosen_costs_nothing(family):
    """The same modules and hooks as a model that knows none of it."""
    model = family.model(norm=family.norm)
    stock = family.stock_model()
    ours = {type(module) for module in model.modules()} - {type(model), type(model.base_model)}
    theirs = {type(module) for module in stock.modules()}
    assert ours <= theirs
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


@pytest.mark.parametrize(
    "fields",
    [
        {**OPTIONS[2], **OPTIONS[6], **OPTIONS[7], "norm": "derf"},
        {**OPTIONS[3], "ffn_scale": True, "layer_activations": "identity_fused:0,gelu_relu:1", "norm": "fixed_scale"},
    ],
    ids=["spectral", "weight"],
)
def test_compiles_as_one_graph(family, fields, input_ids):
    model = moved(family.model(**fitting(family, fields), num_hidden_layers=2))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids, use_cache=False).logits, logits(model, input_ids))
    model.train()
    torch.compile(model, fullgraph=True, backend="aot_eager")(input_ids, labels=input_ids).loss.backward()
    torch._dynamo.reset()


ALONE = """
import sys
sys.modules["hf_lnfree"] = None
import torch
from transformers import AutoModelForCausalLM
ids, folders = torch.load(sys.argv[1])
models = (AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval() for folder in folders)
torch.save([model(ids).logits for model in models], sys.argv[2])
"""


def test_variants_load_where_the_package_cannot_be_imported(input_ids, tmp_path):
    cases = [COMBINATIONS[2], COMBINATIONS[6], OPTIONS[3], OPTIONS[4], OPTIONS[6], OPTIONS[7], OPTIONS[9]]
    expected, folders = [], []
    for index, (family, fields) in enumerate(itertools.product(EVERY, cases)):
        model = moved(family.model(**fitting(family, fields)))
        model.save_pretrained(tmp_path / str(index))
        folders.append(str(tmp_path / str(index)))
        expected.append(logits(model, input_ids))
    torch.save((input_ids, folders), tmp_path / "in.pt")
    command = [sys.executable, "-W", "ignore", "-c", ALONE, str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for one, other in zip(torch.load(tmp_path / "out.pt"), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_activations": "relu:0-1"}, "gives layer 2 no name"),
        ({"layer_activations": "relu:0-1,gelu:1-2"}, "gives layer 1 two names"),
        ({"layer_activations": "relu:0-3"}, "not among 0-2"),
        ({"layer_activations": "relu:2-0"}, "not among 0-2"),
        ({"layer_activations": "relu:0-2,"}, r"''.*not known"),
        ({"layer_activations": "rellu:0-2"}, "'rellu' is not known"),
        ({"layer_norms": "none"}, "a rule like 'relu:0-5,gelu:6-11'"),
        ({"weight_norm": "batch"}, "'none', 'weight', 'spectral'"),
        ({"residual_gain": True}, "'rezero'"),
        ({"ffn_scale": 1}, "must be true or false"),
        ({"norm_alpha": float("nan")}, "must be a finite number"),
        ({"attention_softcap": 0}, "must be greater than 0"),
        ({"attention_softcap": "30"}, "must be a finite number"),
        ({"embedding_scale": "sqrt"}, "must be true or false"),
        ({"norm": "dyt", "norm_alpha_mlp": "0.2"}, "must be a finite number"),
        ({"norm": "layernorm", "norm_alpha_attention": 0.8}, r"norm_alpha_attention=0.8 .* 'layernorm'.*Leave it"),
        ({"norm": "affine", "norm_alpha_mlp": 0.2}, "no norm there has one: 'affine'"),
        ({"norm": "dyt", "norm_alpha_final": 0.2}, "no norm there has one: '(layer|rms)norm'"),
        ({"norm": "dyt", "alpha_mlp": 0.2, "norm_alpha_mpl": 0.2}, "Did you mean 'norm_alpha_mlp'"),
    ],
)
def test_what_makes_no_sense_is_refused(family, fields, message):
    with pytest.raises(ValueError, match=message):
        family.config(**fields)
