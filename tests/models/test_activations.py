"""The learnable leaky ReLU against F.prelu, in value and in every derivative."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.activations import XIELUActivation

from hf_lnfree.models import LearnableLeakyReLU, leaky_relu


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slope", [-0.5, 0.0, 0.01, 1.5])
def test_equals_prelu_with_gradients(dtype, slope):
    torch.manual_seed(0)
    x = torch.randn(4, 7, 33, dtype=dtype)
    kept = torch.float64 if dtype == torch.float64 else torch.float32  # of the slope, as parameters are
    x[0, 0, :3] = torch.tensor([0.0, -0.0, 1e-30])
    grad = torch.randn_like(x)
    results = []
    for function in (leaky_relu, lambda x, a: F.prelu(x.double(), a.double()).to(dtype)):
        inputs = x.clone().requires_grad_(), torch.tensor([slope], dtype=kept, requires_grad=True)
        y = function(*inputs)
        results.append((y, *torch.autograd.grad(y, inputs, grad)))
    # float32 differs in the order of a sum over 924 products only
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), reference.double(), rtol=tolerance, atol=tolerance)


def test_gradcheck_to_second_order():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    slope = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(leaky_relu, (x, slope))
    assert torch.autograd.gradgradcheck(leaky_relu, (x, slope))


@given(slope=st.floats(-2, 2), x=st.floats(-1e6, 1e6, width=32))
@settings(max_examples=50, deadline=None)
def test_is_the_formula(slope, x):
    y = leaky_relu(torch.tensor([x], dtype=torch.float64), torch.tensor([slope], dtype=torch.float64))
    assert y.item() == max(x, 0.0) + slope * min(x, 0.0)


def test_nan_is_kept():
    assert leaky_relu(torch.tensor([float("nan"), 1.0]), torch.tensor([0.1])).isnan().tolist() == [True, False]
    assert leaky_relu(torch.tensor([-1.0, 1.0]), torch.tensor([float("nan")])).isnan().tolist() == [True, False]


def test_saves_its_input_once():
    x = torch.randn(1000, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        LearnableLeakyReLU()(x)
    assert sum(t.numel() for t in saved) == 1000 + 1


def test_compiles_and_runs_under_functional_transforms():
    module = LearnableLeakyReLU(0.2)
    x = torch.randn(6, 5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=0)
    tangent = torch.randn_like(x)
    _, jvp = torch.func.jvp(module, (x,), (tangent,))
    torch.testing.assert_close(jvp, torch.where(x > 0, tangent, 0.2 * tangent))
    torch.testing.assert_close(torch.vmap(module)(x), module(x), rtol=0, atol=0)


def test_frozen_slope_needs_no_gradient():
    module = LearnableLeakyReLU(0.2)
    module.negative_slope.requires_grad_(False)
    x = torch.randn(5, requires_grad=True)
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.where(x > 0, 1.0, 0.2))


def test_names_in_the_configuration(family):
    fixed = family.model(activation="leaky_relu", negative_slope=0.25)
    assert family.activation(family.block_list(fixed)[0]).negative_slope == 0.25
    learnable = family.model(activation="learnable_leaky_relu", negative_slope=0.25)
    act = family.activation(family.block_list(learnable)[2])
    assert isinstance(act, LearnableLeakyReLU)
    assert act.negative_slope.item() == 0.25
    assert "negative_slope=0.25" in repr(act)
    assert isinstance(family.activation(family.block_list(family.model(activation="xielu"))[0]), XIELUActivation)


def test_parameters_missing_from_a_checkpoint_are_initialised(family, tmp_path):
    """A stock checkpoint has no slope; left alone, its place would be uninitialised memory."""
    family.stock_model().save_pretrained(tmp_path)
    for name, expected in {"learnable_leaky_relu": 0.3, "prelu": 0.3, "gelu_relu": 0.0}.items():
        model = family.head("CausalLM").from_pretrained(
            tmp_path, norm=family.norm, negative_slope=0.3, **{family.activation_field: name}
        )
        values = [
            p.detach() for n, p in model.named_parameters() if ".act." in n or ".act_fn." in n or "activation_fn." in n
        ]
        assert len(values) == 3
        assert all(torch.equal(value, torch.full_like(value, expected)) for value in values)


def test_a_copy_beside_a_checkpoint_leaves_our_activations_alone(tmp_path):
    """A model of ours has our classes, and its activations are seen, after a copy of the code was loaded beside it."""
    done = subprocess.run([sys.executable, "-c", COPY, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


COPY = """
import importlib.util, math, sys
from pathlib import Path
import torch
from hf_lnfree import LNFreeGPT2Config, LNFreeGPT2ForCausalLM
from hf_lnfree.analysis.layers import record_layers
from hf_lnfree.models import activations
copy = Path(sys.argv[1], "copy_of_activations.py")
copy.write_text(Path(activations.__file__).read_text())
spec = importlib.util.spec_from_file_location(copy.stem, copy)
spec.loader.exec_module(importlib.util.module_from_spec(spec))
for name, kind in {"gelu_relu": activations.GELUReLU, "learnable_leaky_relu": activations.LearnableLeakyReLU}.items():
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 20}
    model = LNFreeGPT2ForCausalLM(LNFreeGPT2Config(**sizes, activation_function=name))
    assert type(model.transformer.h[0].mlp.act) is kind
    with record_layers(model) as layers:
        model(torch.tensor([[1, 2, 3]]))
    assert not math.isnan(layers.dead_units[0])
"""
