"""Attention functions that a user registered: recorded where they are the softmax of their arguments, else refused."""

import functools

import pytest
import torch
import transformers as tf
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from hf_lnfree.analysis.capture import record_attention_entropy
from hf_lnfree.analysis.layers import record_layers
from hf_lnfree.errors import AttentionError
from tests.attention import models
from tests.attention.softmaxes import Softmaxes

SDPA = tf.AttentionInterface._global_mapping["sdpa"]


def attend(query, key, value, mask, scaling, weigh):
    groups = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(groups, 1).mT * scaling
    mask = torch.ones(logits.shape[-2:], dtype=torch.bool).tril() if mask is None else mask
    return (weigh(logits, mask) @ value.repeat_interleave(groups, 1)).transpose(1, 2), None


def of_relu(module, query, key, value, attention_mask, scaling=None, **kwargs):
    return attend(query, key, value, attention_mask, scaling, lambda logits, mask: logits.relu() / 12 * mask)


def alibi(module, query, key, value, attention_mask, scaling=None, **kwargs):
    def weigh(logits, mask):
        rows, keys = (torch.arange(size) for size in logits.shape[-2:])
        return (logits - (rows[:, None] - keys) / 64).masked_fill(~mask, -1e30).softmax(-1)

    return attend(query, key, value, attention_mask, scaling, weigh)


@functools.wraps(SDPA)
def windowed(module, query, key, value, attention_mask, **kwargs):
    window = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril().triu(-3)
    return SDPA(module, query, key, value, window if attention_mask is None else window & attention_mask, **kwargs)


def half(module, query, key, value, attention_mask, **kwargs):
    output, _ = SDPA(module, query, key, value, attention_mask, **kwargs)
    return output[:, :6], None


def logged(module, query, key, value, attention_mask, **kwargs):
    return SDPA(module, query, key, value, attention_mask, **kwargs)


@pytest.fixture
def registered(monkeypatch, request):
    for interface, entry in ((tf.AttentionInterface, request.param), (AttentionMaskInterface, sdpa_mask)):
        monkeypatch.setattr(interface, "_global_mapping", interface._global_mapping | {"mine": entry})


def llama(implementation="mine", dtype=torch.float32):
    config = tf.LlamaConfig(**models.TEXT)
    torch.manual_seed(0)
    return tf.LlamaForCausalLM._from_config(config, attn_implementation=implementation).to(dtype).eval()


def inputs(padded):
    return models.texts() if padded else {"input_ids": models.texts()["input_ids"]}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("registered", [of_relu, alibi, windowed], indirect=True)
def test_what_is_no_softmax_of_its_arguments_is_an_error(registered, padded):
    for record in (record_attention_entropy, record_layers):
        model, message = llama(), "LlamaAttention runs .* returned something else than the softmax"
        with torch.no_grad(), pytest.raises(AttentionError, match=message), record(model):
            model(**inputs(padded))


@pytest.mark.parametrize("registered", [half], indirect=True)
def test_an_output_of_another_shape_is_an_error(registered):
    model = llama()
    with pytest.raises(AttentionError, match=r"returned \[2, 6, 4, 8\] where"), record_attention_entropy(model):
        model(**inputs(padded=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("registered", [logged], indirect=True)
def test_a_softmax_of_its_arguments_is_recorded(registered, padded, dtype):
    model = llama(dtype=dtype)
    with torch.no_grad(), record_attention_entropy(model) as record:
        model(**inputs(padded))
    with torch.no_grad(), Softmaxes() as eager:
        llama("eager", torch.float64)(**inputs(padded))
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    for found, expected in zip(record.entropies.values(), eager.entropies(), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("registered", [logged], indirect=True)
def test_under_dropout_nothing_can_be_checked(registered):
    model = llama().train()
    model.model.layers[0].self_attn.attention_dropout = 0.5
    with pytest.raises(AttentionError, match="cannot be checked under dropout"), record_attention_entropy(model):
        model(**inputs(padded=False))
