"""The map of one head, against the maps that eager models of transformers return in float64."""

import pytest
import torch
import transformers as tf

from hf_lnfree.analysis.capture import record_attention_entropy
from hf_lnfree.analysis.head_map import record_head_map
from tests.attention import models
from tests.attention.softmaxes import Softmaxes

from .test_capture import ASKED, DECODERS, MLP, SIZES, batch, build, encoder_decoders


def modules_of(model, inputs):
    with torch.no_grad(), record_attention_entropy(model) as record:
        model(**inputs)
    return list(record.entropies)


def head_map(model, inputs, name, head):
    with record_head_map(model, name, head) as found:
        model(**inputs)
    return found.weights


def eager_maps(model, inputs, key="attentions", dtype=torch.float64):
    model = model.to(dtype)
    if model.config._attn_implementation != "eager":
        model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(**inputs, output_attentions=True)[key]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", DECODERS)
def test_equals_the_map_of_an_eager_model(name, implementation):
    inputs = batch("right")
    model = build(name, "eager" if name == "Falcon alibi" else implementation)  # whose implementations differ
    expected = eager_maps(build(name, "eager"), inputs)
    for layer, module in enumerate(modules_of(model, inputs)):
        for head in (0, 3):
            found = head_map(model, inputs, module, head)
            tokens = inputs["attention_mask"].bool()
            torch.testing.assert_close(
                found[tokens].double(), expected[layer][:, head][tokens].double(), rtol=0, atol=1e-5
            )


@pytest.mark.parametrize("name", ASKED)
def test_of_a_softmax_of_its_own(name):
    cls, config = ASKED[name]
    torch.manual_seed(0)
    model, inputs = cls._from_config(config, attn_implementation="eager").eval(), batch()
    names = modules_of(model, inputs)
    found = [head_map(model, inputs, module, 1) for module in names]
    expected = eager_maps(model, inputs, dtype=torch.float32)
    for one, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(one, reference[:, 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["BART", "T5"])
def test_of_a_cross_attention_and_under_a_relative_bias(name):
    cls, config = encoder_decoders()[name]
    torch.manual_seed(0)
    model = cls(config).eval()
    inputs = {**batch("right"), "decoder_input_ids": batch()["input_ids"][:, :7]}
    names = modules_of(model, inputs)
    cross = "encoder_attn" if name == "BART" else "EncDecAttention"
    mine = {
        "encoder_attentions": [n for n in names if n.startswith("encoder")],
        "cross_attentions": [n for n in names if cross in n],
        "decoder_attentions": [n for n in names if n.startswith("decoder") and cross not in n],
    }
    found = {key: [head_map(model, inputs, module, 2) for module in chosen] for key, chosen in mine.items()}
    for key, maps in found.items():
        expected = eager_maps(model, inputs, key)
        rows = slice(0, 8) if key == "encoder_attentions" else slice(None)
        for one, reference in zip(maps, expected, strict=True):
            torch.testing.assert_close(one[:, rows].double(), reference[:, 2, rows], rtol=0, atol=1e-5)


def test_a_module_that_is_called_for_every_layer():
    torch.manual_seed(0)
    config = tf.AlbertConfig(**{**SIZES, "num_hidden_layers": 3}, **MLP, embedding_size=16, pad_token_id=2)
    model, inputs = tf.AlbertModel(config).eval(), batch()
    (name,) = modules_of(model, inputs)
    found = [head_map(model, inputs, f"{name}#{call}", 1) for call in range(3)]
    for one, reference in zip(found, eager_maps(model, inputs), strict=True):
        torch.testing.assert_close(one.double(), reference[:, 1], rtol=0, atol=1e-5)
    assert not torch.equal(found[0], found[1])


def test_of_a_head_with_a_sink():
    """What a sink takes is missing in the row."""
    torch.manual_seed(0)
    model = tf.GptOssForCausalLM(tf.GptOssConfig(**models.TEXT, head_dim=8, sliding_window=5, num_local_experts=4))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.copy_(torch.tensor([-3.0, 0.0, 1.0, 3.0]))
    inputs = models.texts()
    with torch.no_grad(), Softmaxes() as eager:
        model.eval()(**inputs)
    for name, logits in zip(modules_of(model, inputs), eager.logits, strict=True):
        for head in (0, 3):
            expected = logits.softmax(-1)[:, head, :, :-1].float()
            torch.testing.assert_close(head_map(model, inputs, name, head), expected, rtol=0, atol=1e-5)


def test_only_one_map_is_made():
    """Of long sequences the memory of one map, and not of all heads."""
    model, made = build("Llama"), []
    inputs = {"input_ids": torch.randint(3, 99, (1, 200), generator=torch.Generator().manual_seed(0))}

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                made.append(result.numel())
            return result

    name = modules_of(model, inputs)[0]
    with Sizes():
        head_map(model, inputs, name, 0)
    assert 200 * 200 <= max(made) < 2 * 200 * 200


def test_what_is_not_there_is_an_error():
    model, inputs = build("GPT2"), batch()
    for name, head, words in (
        ("nothing", 0, "no module 'nothing'"),
        ("transformer.h.0.attn", 4, "no head 4: heads are 0 to 3"),
        ("transformer.h.0.attn", -1, "no head -1"),
        ("transformer.h.0.attn#1", 0, "no map that can be read"),
        ("transformer.h.0.mlp", 0, "no map that can be read"),
    ):
        with pytest.raises(ValueError, match=words), record_head_map(model, name, head):
            model(**inputs)
    torch.manual_seed(0)
    config = tf.LongformerConfig(**SIZES, **MLP, **{"pad_token_id": 2, "attention_window": 4})
    longformer = tf.LongformerModel(config).eval()
    with pytest.raises(ValueError, match="no map that can be read"):
        head_map(longformer, inputs, modules_of(longformer, inputs)[0], 0)
