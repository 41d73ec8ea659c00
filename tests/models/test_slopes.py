"""A global slope is one parameter, in memory and on disk, whatever is done to the model; per layer there are L."""

import copy

import pytest
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

from hf_lnfree.models import named_slopes


def distinct(model):
    return len({id(p) for p in named_slopes(model).values()})


@pytest.fixture(params=[("global", 1), ("layer", 3)], ids=["global", "layer"])
def scope(request):
    return request.param


@pytest.fixture(params=["CausalLM", "SequenceClassification"])
def model(request, family, scope):
    return family.model(head=request.param, activation="learnable_leaky_relu", slope_scope=scope[0])


def test_one_parameter_through_save_load_deepcopy_resize_and_lora(family, model, scope, tmp_path):
    count = scope[1]
    assert distinct(model) == count
    for i, slope in enumerate(dict.fromkeys(named_slopes(model).values())):
        slope.data.fill_(0.1 * (i + 1))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert len([key for key in file.keys() if "slope" in key]) == count  # noqa: SIM118
    loaded = type(model).from_pretrained(tmp_path)
    assert distinct(loaded) == count
    values = [p.item() for p in named_slopes(loaded).values()]
    assert values == pytest.approx([p.item() for p in named_slopes(model).values()])
    assert distinct(copy.deepcopy(loaded)) == count
    loaded.resize_token_embeddings(120)
    assert distinct(loaded) == count
    wrapped = get_peft_model(loaded, LoraConfig(target_modules="all-linear", r=2))
    assert distinct(wrapped) == count
    assert distinct(wrapped.merge_and_unload()) == count


def test_base_model_saves_one_key_too(family, scope, tmp_path):
    family.model(activation="learnable_leaky_relu", slope_scope=scope[0]).base_model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert len([key for key in file.keys() if "slope" in key]) == scope[1]  # noqa: SIM118


def test_global_slope_receives_the_sum_of_the_layers_gradients(family, input_ids):
    shared = family.model(activation="learnable_leaky_relu", slope_scope="global")
    single = family.model(activation="learnable_leaky_relu", slope_scope="layer")
    for model in (shared, single):
        model(input_ids, labels=input_ids).loss.backward()
    total = sum(p.grad for p in named_slopes(single).values())
    assert next(iter(named_slopes(shared).values())).grad.item() == pytest.approx(total.item(), rel=1e-4)


def test_hybrid_shares_among_its_learnable_layers(family):
    activations = ["relu", "learnable_leaky_relu", "learnable_leaky_relu"]
    model = family.model(layer_activations=activations, slope_scope="global")
    assert len(named_slopes(model)) == 2
    assert distinct(model) == 1
    assert not named_slopes(family.model(activation="relu", slope_scope="global"))
