"""Calls as attention functions were given them, by position or by name, nested, recomputed, direct, or unreadable."""

from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
import transformers as tf

from hf_lnfree.attention import AttentionCall, attention_calls
from hf_lnfree.attention.calls import FIRST
from hf_lnfree.attention.masks import logit_arguments, read_mask
from hf_lnfree.attention.visibility import Mask
from tests.attention import models
from tests.attention.softmaxes import Softmaxes

SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))


class Attention(torch.nn.Module):
    is_causal = True


def gpt2(implementation="sdpa"):
    torch.manual_seed(0)
    return tf.GPT2LMHeadModel._from_config(tf.GPT2Config(**SIZES), attn_implementation=implementation).eval()


def look_up(function):
    """As a modeling file does it."""
    return tf.AttentionInterface().get_interface("eager", function)


def fail(*args):
    raise RuntimeError("mine")


def calls_of(function, *args, **kwargs):
    calls = []
    with attention_calls(calls.append):
        look_up(function)(*args, **kwargs)
    return calls


def attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, softcap=None, **kwargs):
    return query, None


@pytest.mark.parametrize("positional", range(8))
def test_arguments_by_position_and_by_name_are_the_same_call(positional):
    given = dict.fromkeys(FIRST) | {name: torch.randn(1, 2, 3, 4) for name in FIRST[1:]}
    given |= {"module": Attention(), "scaling": 0.3, "dropout": 0.1, "softcap": 5.0}
    args = list(given.values())[:positional]
    kwargs = dict(list(given.items())[positional:])
    (call,) = calls_of(attend, *args, **kwargs, is_causal=False, sliding_window=7)
    found = (call.module, call.query, call.key, call.value, call.mask, call.scaling, call.softcap, call.is_causal)
    expected = (*(given[name] for name in FIRST), 0.3, 5.0, False)
    assert all(ours is theirs for ours, theirs in zip(found, expected, strict=True))
    assert call.options == {"dropout": 0.1, "sliding_window": 7}
    assert call.result == (given["query"], None)
    assert (call.function, call.implementation, call.recomputed) == (attend, "eager", False)


@pytest.mark.parametrize("name", ["sinks", "s_aux"])
def test_sinks_have_two_names(name):
    q, sinks = torch.randn(1, 2, 3, 4), torch.randn(2)
    (call,) = calls_of(attend, Attention(), q, q, q, None, **{name: sinks})
    assert call.sinks is sinks
    assert not call.options
    assert calls_of(attend, Attention(), q, q, q, None, **{name: None})[0].sinks is None


def test_one_context_inside_another_and_what_was_there_before():
    before = tf.AttentionInterface.get_interface
    seen, functions = [], set()
    model = gpt2()
    with attention_calls(lambda call: seen.append(("outer", call.module))), torch.no_grad():
        outer = tf.AttentionInterface.get_interface
        with attention_calls(lambda call: seen.append(("inner", call.module)) or functions.add(call.function)):
            model(IDS)
        assert tf.AttentionInterface.get_interface is outer
        with pytest.raises(RuntimeError, match="mine"), attention_calls(fail):
            model(IDS)
        assert tf.AttentionInterface.get_interface is outer
    assert tf.AttentionInterface.get_interface is before
    assert functions == {tf.AttentionInterface()["sdpa"]}
    first, second = (block.attn for block in model.transformer.h)
    assert seen == [("outer", first), ("inner", first), ("outer", second), ("inner", second), ("outer", first)]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_direct_calls_are_those_outside_attention_functions(implementation):
    model, q = gpt2(implementation), torch.randn(1, 2, 3, 4)
    outer, inner, without = [], [], []
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(attention_calls(outer.append, direct=True))
        stack.enter_context(attention_calls(without.append))
        stack.enter_context(attention_calls(inner.append, direct=True))
        model(IDS)
        output = F.scaled_dot_product_attention(q, q, value=q, is_causal=True, scale=0.3)
    for calls in (outer, inner):
        assert [type(call.module).__name__ for call in calls] == ["GPT2Attention", "GPT2Attention", "NoneType"]
        assert (calls[2].query, calls[2].value, calls[2].scaling) == (q, q, 0.3)
        assert read_mask(calls[2]) == (None, True)
        assert torch.equal(calls[2].result[0], output.transpose(1, 2))
    assert len(without) == 2
    with attention_calls(inner.append, direct=True):
        with pytest.raises(RuntimeError, match="mine"):
            look_up(fail)(None, q, q, q, None)
        F.scaled_dot_product_attention(q, q, q)
    assert len(inner) == 4


def test_calls_that_checkpointing_makes_again_say_so():
    model = gpt2().train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    calls = []
    with attention_calls(calls.append):
        model(IDS, labels=IDS, use_cache=False).loss.backward()
    assert [(call.module.layer_idx, call.recomputed) for call in calls] == [
        (0, False),
        (1, False),
        (1, True),
        (0, True),
    ]


def test_without_a_mask_only_some_implementations_are_causal():
    q = torch.randn(1, 2, 3, 4)
    causal = {"sdpa": True, "flash_attention_2": True, "eager": False, "flex_attention": False}
    for implementation, expected in causal.items():
        call = AttentionCall(Attention(), q, q, q, implementation=implementation)
        assert read_mask(call) == (None, expected)
        call.is_causal = False
        assert read_mask(call) == (None, False)


def sparse(module, query, key, value, attention_mask, scaling=None, block_indices=None, **kwargs):
    return query, None


def test_arguments_that_nobody_reads_are_errors_that_name_them():
    q, indices = torch.randn(1, 2, 3, 4), torch.zeros(1)
    (call,) = calls_of(sparse, Attention(), q, q, q, None, block_indices=indices)
    with pytest.raises(ValueError, match="Attention hands block_indices to its attention function"):
        logit_arguments(call)
    # What a function does not name it does not use: the mask of eager attention has been told the same.
    read_mask(calls_of(attend, Attention(), q, q, q, None, block_indices=indices, num_items_in_batch=3)[0])
    read_mask(calls_of(sparse, Attention(), q, q, q, None, 0.1, None)[0])
    with pytest.raises(ValueError, match="hands indices to"):
        read_mask(calls_of(attend, Attention(), q, q, q, None, indices=indices)[0])
    # Kernels of transformers read nothing else that may change what they compute.
    for name in ("sdpa", "flash_attention_2", "flex_attention"):
        function = tf.AttentionInterface._global_mapping[name]
        options = {"dropout": 0.1, "sliding_window": 5, "max_length_q": 3, "output_attentions": True, "indices": None}
        read_mask(AttentionCall(Attention(), q, q, q, function=function, implementation=name, options=options))


def test_positions_that_begin_anew_are_packed_sequences_to_flash_attention():
    q = torch.randn(1, 2, 4, 4)
    call = AttentionCall(Attention(), q, q, q, implementation="flash_attention_2")
    for positions, packed in (([0, 1, 2, 3], False), ([3, 4, 5, 6], False), ([0, 1, 0, 1], True)):
        call.options = {"position_ids": torch.tensor([positions])}
        if packed:
            with pytest.raises(ValueError, match="packed sequences"):
                read_mask(call)
        else:
            assert read_mask(call) == (None, True)
    call.implementation = "sdpa"
    assert read_mask(call) == (None, True)


def test_logits_are_those_of_the_eager_softmax():
    """The biases and masks of T5, which has both, and of a decoder."""
    t5 = tf.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    torch.manual_seed(0)
    t5 = tf.T5Model._from_config(t5, attn_implementation="eager").eval()
    inputs = models.texts()
    for model, more, count in ((t5, {"decoder_input_ids": IDS[:, :7]}, 6), (gpt2("eager"), {}, 2)):
        calls = []
        with Softmaxes() as eager, attention_calls(calls.append), torch.no_grad():
            model.double()(**inputs, **more)
        assert len(calls) == len(eager.logits) == count
        for call, logits in zip(calls, eager.logits, strict=True):
            found = logit_arguments(call)
            scores = call.query @ call.key.mT * (found["scale"] or call.query.shape[-1] ** -0.5)
            visible, added = Mask.of(found["attention_mask"], *scores.shape[2:]).whole()
            expected = (scores if added is None else scores + added).where(visible, torch.finfo(logits.dtype).min)
            torch.testing.assert_close(expected, logits)
