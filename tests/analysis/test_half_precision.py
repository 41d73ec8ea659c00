"""In bfloat16 recorded entropies lie as near to what the model computes as `record_attention_entropy` says."""

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch.overrides import TorchFunctionMode

from hf_lnfree.analysis.capture import record_attention_entropy
from hf_lnfree.attention import attention_calls

SIZES = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
SIDES = {**SIZES, "intermediate_size": 64}
MODELS = {
    "GPT-2": (tf.GPT2Model, tf.GPT2Config, {"n_embd": 256, "n_layer": 2, "n_head": 4, "vocab_size": 99}),
    "Llama": (tf.LlamaModel, tf.LlamaConfig, {**SIDES, "num_key_value_heads": 2}),
    "BERT": (tf.BertModel, tf.BertConfig, SIDES),
    "Bloom": (tf.BloomModel, tf.BloomConfig, {"hidden_size": 256, "n_layer": 2, "n_head": 4, "vocab_size": 99}),
    "DeBERTa": (tf.DebertaV2Model, tf.DebertaV2Config, SIDES),
}
IDS = torch.randint(3, 99, (2, 128), generator=torch.Generator().manual_seed(0))


class Logits(TorchFunctionMode):
    """What the model hands to its softmaxes, rounded as it is, and what they return."""

    def __init__(self):
        super().__init__()
        self.logits, self.maps = [], []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (F.softmax, torch.softmax, torch.Tensor.softmax) and args[0].dim() == 4:
            self.logits.append(args[0].double())
            self.maps.append(result)
        return result


def build(name, initializer_range):
    cls, config, sizes = MODELS[name]
    torch.manual_seed(0)
    config = config(**sizes, initializer_range=initializer_range)
    return cls._from_config(config, attn_implementation="eager", dtype=torch.bfloat16).eval()


def recorded(model, method="auto"):
    with torch.no_grad(), Logits() as eager, record_attention_entropy(model, method) as record:
        model(IDS)
    return list(record.entropies.values()), eager


def entropy(logits):
    logs = logits.log_softmax(-1).clamp_min(-1e4)
    return -(logs.exp() * logs).sum(-1)


def largest(found, expected):
    return max(float((ours.double() - theirs).abs().max()) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize(("initializer_range", "bound"), [(0.06, 0.02), (0.2, 0.1)])
@pytest.mark.parametrize("name", ["GPT-2", "Llama", "BERT"])
def test_eager_attention_rounds_its_logits(name, initializer_range, bound):
    model = build(name, initializer_range)
    found, eager = recorded(model)
    assert 1e-3 < largest(found, [entropy(logits) for logits in eager.logits]) < bound
    calls, exact = [], []
    with torch.no_grad(), attention_calls(calls.append):
        model(IDS)
    for call in calls:
        key = call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], 1)
        logits = (call.query.double() @ key.double().mT) * call.query.shape[-1] ** -0.5
        exact.append(entropy(logits if call.mask is None else logits + call.mask))
    assert largest(found, exact) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_maps_are_rounded(name):
    found, eager = recorded(build(name, 0.06), "attentions")
    assert largest(found, [entropy(logits) for logits in eager.logits]) < 0.005
    of_maps = [torch.special.entr(map_.to(torch.bfloat16).double()).sum(-1) for map_ in eager.maps]
    assert largest(found, of_maps) < 1e-5
