"""With norm="layernorm" a model is the stock model, bit for bit; without, it is the stock model less its norms."""

import copy

import pytest
import torch
from torch import nn
from transformers import StaticCache

from ..conftest import HEADS, cache_field


def activation(family):
    """That of the stock family; GPT-2's is named in the tests' sizes."""
    return {"activation": getattr(family.stock_config(), family.activation_field)}


def assert_same_weights(ours, stock):
    a, b = ours.state_dict(), stock.state_dict()
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


@pytest.mark.parametrize("parallel_residual", [True, False])
@pytest.mark.parametrize("head", HEADS)
def test_layernorm_mode_equals_stock_weights_and_outputs(family, head, parallel_residual, input_ids):
    if head not in family.heads:
        pytest.skip("transformers has none")
    fields = {"use_parallel_residual": parallel_residual} if family.name == "gpt_neox" else {}
    ours = family.model(head=head, norm=family.norm, **activation(family), initializer_range=0.02, **fields)
    stock = family.stock_model(head=head, initializer_range=0.02, **fields)
    assert_same_weights(ours, stock)
    with torch.no_grad():
        for key, value in stock(input_ids).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(ours(input_ids)[key], value), key


def test_causal_lm_loss_equals_the_mean_over_predictions(family, input_ids):
    model = family.model()
    logits = model(input_ids).logits[:, :-1].flatten(0, 1).double()
    expected = nn.functional.cross_entropy(logits, input_ids[:, 1:].flatten())
    torch.testing.assert_close(model(input_ids, labels=input_ids).loss.double(), expected, rtol=1e-6, atol=1e-6)
    assert model.loss_type == "ForCausalLM"


def test_no_norm_leaves_no_layernorm_module(family):
    fields = {"add_cross_attention": True} if family.name == "gpt2" else {}
    if family.name == "qwen3":
        fields["query_key_norm"] = False
    model = family.model(norm="none", final_norm="none", **fields)
    assert not [name for name, m in model.named_modules() if type(m).__name__.endswith("Norm")]
    assert not [key for key in model.state_dict() if "ln_" in key or "norm" in key]
    kept = family.model(norm="none", final_norm=family.norm)
    assert sum(family.is_norm(name, m) for name, m in kept.named_modules()) == 1


def test_norm_free_model_is_the_stock_graph_without_its_norms(family, input_ids):
    """The independent truth: stock modules in float64, with each LayerNorm replaced by hand."""
    ours = family.model(activation="relu", final_norm="none").double()
    stock = family.stock_model(**{family.activation_field: "relu"}).double()
    for name, module in list(stock.named_modules()):
        if family.is_norm(name, module):
            stock.set_submodule(name, nn.Identity())
    stock.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(input_ids).logits, stock(input_ids).logits, rtol=0, atol=0)


def test_layer_lists_make_hybrids(family, input_ids):
    model = family.model(
        layer_norms=["none", family.norm, "none"], layer_activations=["relu", "gelu", "learnable_leaky_relu"]
    )
    blocks = family.block_list(model)
    norms = [sum(family.is_norm(name, m) for name, m in block.named_modules()) for block in blocks]
    assert norms == [0, 2, 0]
    assert [family.activation(b).built[0] for b in blocks] == ["relu", "gelu", "learnable_leaky_relu"]
    assert model(input_ids).logits.isfinite().all()


def test_residual_init(family):
    """scaled: 0.02/sqrt(2L) at the projections into the residual stream; plain: 0.02 (arXiv 2410.09637's code)."""
    for scheme, expected in {"scaled": 0.02 / 6**0.5, "plain": 0.02}.items():
        model = family.model(residual_init=scheme, initializer_range=0.02, num_attention_heads=4, **_width(family, 256))
        for block in family.block_list(model):
            for path in family.projections:
                assert block.get_submodule(path).weight.std().item() == pytest.approx(expected, rel=0.03)


def _width(family, width):
    if family.name == "gpt2":
        return {"n_embd": width}
    inner = "ffn_dim" if family.name == "opt" else "intermediate_size"
    return {"hidden_size": width, inner: 4 * width} | ({"word_embed_proj_dim": width} if family.name == "opt" else {})


def test_flags_and_parallel_plans_are_those_of_the_stock_class(family):
    ours, stock = family.head("CausalLM"), family.stock_head("CausalLM")
    prefixes = ("_supports_", "_can_", "supports_")
    flags = [f for f in dir(stock) if f.startswith(prefixes) and not callable(getattr(stock, f))]
    assert "_supports_sdpa" in flags
    assert "_can_compile_fullgraph" in flags
    plans = ["_tp_plan", "_pp_plan", "_no_split_modules", "base_model_prefix"]
    assert {f: getattr(ours, f) for f in flags + plans} == {f: getattr(stock, f) for f in flags + plans}
    for plan in ("base_model_tp_plan", "base_model_pp_plan"):
        plan_of_instances = plan.removeprefix("base_model")
        assert getattr(family.model(), plan_of_instances) == getattr(family.stock_model(), plan_of_instances)
        assert getattr(family.config(), plan) == getattr(family.stock_config(), plan)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_implementations_agree(family, implementation, input_ids):
    model = family.model().double()
    model.set_attn_implementation(implementation)
    expected = copy.deepcopy(model)
    expected.set_attn_implementation("eager")
    # GPT-NeoX's eager attention takes its softmax in float32, whatever the dtype.
    torch.testing.assert_close(model(input_ids).logits, expected(input_ids).logits, rtol=1e-5, atol=1e-5)


def test_left_padding_gives_the_logits_of_the_plain_forward(family, input_ids):
    model = family.model().double()
    pad = torch.full((2, 5), 2)
    padded = torch.cat((pad, input_ids), dim=1)
    mask = (torch.arange(17) >= 5).long().expand(2, -1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    plain = model(input_ids).logits
    torch.testing.assert_close(
        model(padded, attention_mask=mask, position_ids=positions).logits[:, 5:], plain, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cached_decoding_gives_the_logits_of_the_plain_forward(family, cache, input_ids):
    model = family.model().double()
    past = StaticCache(config=model.config, max_cache_len=16) if cache == "static" else None
    plain = model(input_ids).logits
    name = cache_field(model)
    steps = []
    for t in range(input_ids.shape[1]):
        out = model(input_ids[:, t : t + 1], **{name: past}, use_cache=True, position_ids=torch.tensor([[t]]))
        past = out[name]
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_generate_equals_stock(family, options, input_ids):
    ours, stock = family.model(norm=family.norm, **activation(family)), family.stock_model()
    settings = {"max_new_tokens": 6, "do_sample": False, **options}
    mask = torch.ones_like(input_ids)
    tokens = [m.generate(input_ids, attention_mask=mask, **settings) for m in (ours, stock)]
    assert torch.equal(*tokens)


def test_gradient_checkpointing_gives_the_same_gradients(family, input_ids):
    model = family.model(activation="learnable_leaky_relu").train()
    model.config.use_cache = False
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            # renamed within transformers 5
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.zero_grad()
        model(input_ids, labels=input_ids).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=0, atol=0)


def test_compiles_as_one_graph(family, input_ids):
    model = family.model(activation="learnable_leaky_relu", linear_bias="query_key")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(input_ids, labels=input_ids, use_cache=False).loss
    loss.backward()
    slopes = [p.grad.clone() for n, p in model.named_parameters() if "slope" in n]
    model.zero_grad()
    expected = model(input_ids, labels=input_ids, use_cache=False).loss
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(slopes, [p.grad for n, p in model.named_parameters() if "slope" in n])
