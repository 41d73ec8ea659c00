"""Masks are read in blocks, whatever their form, and nothing as large as T x T is made on the way."""

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_lnfree.analysis.capture import row_entropies
from hf_lnfree.attention.calls import AttentionCall
from hf_lnfree.attention.visibility import EVERYTHING, Mask, seen
from tests.attention import models

LENGTH = 4096


class Attention(nn.Module):
    is_causal = True


class Largest(TorchDispatchMode):
    """How many bytes the largest tensor has that an operation makes inside; views are of what was there before."""

    def __init__(self, *given):
        super().__init__()
        self.given = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.given:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def later(b, h, i, j):
    return (i >= j) & (j >= 100)


def forms(length):
    """Causal masks that hide the first 100 keys, as the attentions of transformers are handed them."""
    padding = torch.ones(1, length, dtype=torch.long)
    padding[0, :100] = 0
    visible = torch.ones(length, length, dtype=torch.bool).tril_() & padding.bool()
    return {
        "flash_attention_2": padding,
        "sdpa": visible[None, None],
        "eager": torch.zeros(1, 1, length, length).masked_fill_(~visible, torch.finfo(torch.float32).min),
        "flex_attention": create_block_mask(later, None, None, length, length, device="cpu", _compile=False),
    }


@pytest.mark.parametrize("implementation", ["flash_attention_2", "sdpa", "eager"])
def test_padding_costs_no_map(implementation):
    mask = forms(LENGTH)[implementation]
    query, key = models.numbers(1, 1, LENGTH, 8), models.numbers(1, 1, LENGTH, 8, seed=1)
    call = AttentionCall(Attention(), query, key, key, mask, implementation=implementation)
    with Largest(mask) as largest:
        rows = row_entropies(call)
    assert largest.bytes < LENGTH**2 / 2  # half of a bool map
    assert rows.support.flatten().tolist() == [max(0, i - 99) for i in range(LENGTH)]
    assert rows.keys.flatten().tolist() == [False] * 100 + [True] * (LENGTH - 100)
    at = torch.tensor([100, 700, LENGTH - 1])
    logits = (query[:, :, at] @ key.mT / 8**0.5).double()
    logits = logits.masked_fill((torch.arange(LENGTH) > at[:, None]) | (torch.arange(LENGTH) < 100), -torch.inf)
    expected = torch.special.entr(logits.softmax(-1)).sum(-1)
    torch.testing.assert_close(rows.entropy[:, :, at].double(), expected, rtol=0, atol=1e-5)


def test_all_forms_of_a_mask_show_the_same():
    query = models.numbers(1, 2, 160, 8)
    found = [
        row_entropies(AttentionCall(Attention(), query, query, query, mask, implementation=implementation))
        for implementation, mask in forms(160).items()
    ]
    for rows in found[1:]:
        torch.testing.assert_close(rows.entropy, found[0].entropy, rtol=0, atol=1e-5)
        assert torch.equal(rows.support.expand(1, 1, 160), found[0].support.expand(1, 1, 160))
        assert torch.equal(rows.keys, found[0].keys)


def test_blocks_are_parts_of_the_whole(monkeypatch):
    monkeypatch.setattr("hf_lnfree.attention.visibility.BLOCK", 64)
    bias = models.numbers(1, 3, 20, 24)
    hidden = torch.zeros(2, 1, 1, 24).masked_fill_(models.numbers(2, 1, 1, 24) > 1, -100.0)  # as Swin hides
    shown = models.numbers(2, 1, 20, 24, seed=2) > -1
    padding = (models.numbers(2, 24, seed=3) > -1).long()
    mask = Mask((2, 3, 20, 24), (bias, hidden, shown), padding, is_causal=True, window=9)
    visible, added = mask.whole()
    distance = torch.arange(4, 24)[:, None] - torch.arange(24)
    expected = shown & (hidden == 0) & padding[:, None, None].bool() & (distance >= 0) & (distance < 9)
    assert torch.equal(visible, expected.expand(2, 3, 20, 24))
    torch.testing.assert_close(added.expand(2, 3, 20, 24), bias.expand(2, 3, 20, 24))
    part, of = mask.block(slice(1, 2), slice(5, 11), slice(3, 17))
    assert torch.equal(part.expand(1, 3, 6, 14), visible[1:, :, 5:11, 3:17])
    torch.testing.assert_close(of.expand(1, 3, 6, 14), bias[:, :, 5:11, 3:17])
    support, known = mask.counts()
    assert torch.equal(support, visible.sum(-1))
    assert torch.equal(known, visible.any(1).any(1))
    assert mask.adds
    assert not Mask.of(hidden, 20, 24).adds
    assert torch.equal(Mask.of(hidden, 20, 24).block(EVERYTHING, EVERYTHING, EVERYTHING)[0], seen(hidden))
