"""ViT: the stock model bit for bit with its norms, every field of the study without them, and what has no place."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, AutoModelForImageClassification, Trainer, TrainingArguments

from hf_lnfree import LNFreeViTForImageClassification, LNFreeViTModel, record_attention_entropy
from hf_lnfree.models.errors import ConfigurationError

from ..conftest import VIT
from .test_variants import COMBINATIONS, moved

CLASSES = {LNFreeViTForImageClassification: "ForImageClassification", LNFreeViTModel: "Model"}


@pytest.fixture
def images():
    return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def scores(model, images):
    with torch.no_grad():
        return model.eval()(images)[0]


@pytest.mark.parametrize("own", CLASSES, ids=lambda c: c.__name__)
def test_with_layernorm_it_is_the_stock_model(own, images, tmp_path):
    import transformers

    stock_class = getattr(transformers, f"ViT{CLASSES[own]}")
    torch.manual_seed(0)
    ours = own(VIT.config(norm="layernorm"))
    torch.manual_seed(0)
    stock = stock_class(VIT.stock_config())
    ours_state, state = ours.state_dict(), stock.state_dict()
    assert ours_state.keys() == state.keys()
    assert all(torch.equal(ours_state[name], value) for name, value in state.items())
    moved(stock).save_pretrained(tmp_path / "stock")
    loaded, info = own.from_pretrained(tmp_path / "stock", norm="layernorm", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(scores(loaded, images), scores(stock, images))


@pytest.mark.parametrize("fields", COMBINATIONS, ids=str)
def test_every_field_holds_saves_and_learns(fields, images, tmp_path):
    model = moved(LNFreeViTForImageClassification(VIT.config(**fields)))
    expected = scores(model, images)
    assert expected.isfinite().all()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(scores(loaded, images), expected)
    assert type(AutoModel.from_pretrained(tmp_path)) is LNFreeViTModel
    model.train()(images, labels=torch.tensor([0, 1, 0])).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_norm_free_it_is_the_stock_graph_without_its_norms(images):
    ours = moved(
        LNFreeViTForImageClassification(VIT.config(norm="none", final_norm="none", activation="relu"))
    ).double()
    stock = VIT.stock_class("ForImageClassification")(VIT.stock_config(activation="relu")).double().eval()
    for name, module in list(stock.named_modules()):
        if isinstance(module, torch.nn.LayerNorm):
            stock.set_submodule(name, torch.nn.Identity())
    stock.load_state_dict(ours.state_dict())
    assert torch.equal(scores(ours, images.double()), scores(stock, images.double()))


def test_entropies_are_those_of_the_maps_and_of_all_patches(images):
    """Nothing is masked: the bound of each of the 17 queries, class token and patches, is ln 17."""
    model = moved(LNFreeViTForImageClassification(VIT.config(attn_implementation="eager"))).double()
    maps = model(images.double(), output_attentions=True).attentions
    with record_attention_entropy(model) as record:
        model(images.double())
    for map_, entropy in zip(maps, record.entropies.values(), strict=True):
        torch.testing.assert_close(entropy, -torch.xlogy(map_, map_).sum(-1), rtol=0, atol=1e-6)  # softmax in float32
        assert entropy.shape == (3, 4, 17)
        assert entropy.max() <= math.log(17)


ALONE = """
import sys
sys.modules["hf_lnfree"] = None
import torch
from transformers import AutoModelForImageClassification
images, folder = torch.load(sys.argv[1])
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules")
torch.save(model(images).logits.detach(), sys.argv[2])
"""


def test_it_loads_where_the_package_cannot_be_imported(images, tmp_path):
    fields = {"norm": "dyt", "residual_gain": "skipinit", "query_key_norm": True, "activation": "prelu"}
    model = moved(LNFreeViTForImageClassification(VIT.config(**fields)))
    model.save_pretrained(tmp_path / "model")
    torch.save((images, str(tmp_path / "model")), tmp_path / "in.pt")
    command = [sys.executable, "-W", "ignore", "-c", ALONE, str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.equal(torch.load(tmp_path / "out.pt"), scores(model, images))


def test_a_plain_trainer_trains_it(images, tmp_path):
    """Bright left halves against bright right ones: learned without norms."""
    sides = torch.arange(32) % 2
    lit = torch.zeros(32, 1, 8, 8)
    lit[sides == 0, ..., :4], lit[sides == 1, ..., 4:] = 1.0, 1.0
    noise = 0.1 * torch.randn(lit.shape, generator=torch.Generator().manual_seed(1))
    data = [{"pixel_values": image, "labels": side} for image, side in zip(lit + noise, sides, strict=True)]
    torch.manual_seed(0)
    model = LNFreeViTForImageClassification(VIT.config(norm="none", activation="relu", initializer_range=0.2))
    args = TrainingArguments(
        str(tmp_path), max_steps=60, learning_rate=1e-2, use_cpu=True, save_strategy="no", report_to=[]
    )
    Trainer(model, args, train_dataset=data).train()
    assert torch.equal(scores(model, lit + noise).argmax(-1), sides)


def test_checkpointing_and_copies_change_nothing(images):
    model = moved(LNFreeViTForImageClassification(VIT.config(residual_gain="rezero", attention_temperature=True)))
    assert torch.equal(scores(copy.deepcopy(model), images), scores(model, images))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.zero_grad()
        model.train()(images, labels=torch.tensor([0, 1, 0])).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lm_head_bias": True}, "a ViT has no language-model head"),
        ({"linear_bias": "query_key", "qkv_bias": False}, "qkv_bias=False leaves none"),
    ],
)
def test_what_has_no_place_is_refused(fields, message):
    with pytest.raises(ConfigurationError, match=message):
        LNFreeViTForImageClassification(VIT.config(**fields))
