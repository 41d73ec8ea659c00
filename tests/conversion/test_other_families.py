"""Llama, Qwen3 and OPT, in and out: equal logits to the bit, or in float64 where norms are folded or disabled."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_lnfree.conversion import Checkpoint, convert, convert_checkpoint, fold, to_stock
from hf_lnfree.conversion.stock_to_ours import ours
from hf_lnfree.errors import ModelError

from ..conftest import LLAMA, OPT, QWEN3
from .conftest import logits, trained

RMS = (LLAMA, QWEN3)
every = pytest.mark.parametrize("family", [*RMS, OPT], ids=lambda f: f.name)
rms = pytest.mark.parametrize("family", RMS, ids=lambda f: f.name)
tied = pytest.mark.parametrize("tied", [True, False])


def wide(model):
    return trained(model).double()


@every
@tied
def test_stock_weights_come_in_bit_for_bit(family, tied, input_ids, tmp_path):
    stock = trained(family.stock_model(tie_word_embeddings=tied))
    stock.save_pretrained(tmp_path / "stock")
    planned = convert_checkpoint(Checkpoint(tmp_path / "stock"), tmp_path / "ours")
    assert {*planned.config.block_norms, planned.config.final_norm} == {family.norm}
    for found in (AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval(), ours(stock)):
        assert type(found) is family.head("CausalLM")
        assert torch.equal(logits(found, input_ids), logits(stock, input_ids))
    back = to_stock(ours(stock))
    assert type(back) is type(stock)
    assert torch.equal(logits(back, input_ids), logits(stock, input_ids))


@rms
@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_other_heads_come_along(family, head, input_ids, tmp_path):
    stock = trained(family.stock_model(head=head))
    stock.save_pretrained(tmp_path / "stock")
    convert_checkpoint(Checkpoint(tmp_path / "stock"), tmp_path / "ours")
    found = family.head(head).from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(found(input_ids)[0], stock(input_ids)[0])


@every
@tied
@pytest.mark.parametrize(
    "fields",
    [{}, {"residual_gain": "skipinit", "ffn_scale": True}, {"attention_temperature": True, "weight_norm": "weight"}],
    ids=["plain", "gains", "temperature"],
)
def test_folding_changes_nothing_but_rounding(family, tied, fields, input_ids):
    model = wide(family.model(norm=family.norm, final_norm=family.norm, tie_word_embeddings=tied, **fields))
    folded, told = fold(model)
    assert {*folded.config.block_norms, folded.config.final_norm} == {"rmspre"}
    assert told.untied == tied
    exact = 1e-9 if family is OPT else 1e-5  # RMSNorms of these families work in float32
    torch.testing.assert_close(logits(folded, input_ids), logits(model, input_ids), rtol=exact, atol=exact)
    if family is OPT:  # centred: what divides by the root mean square divides by the deviation
        assert folded.model.decoder.embed_tokens.weight.mean(1).abs().max() < 1e-12
    stock = to_stock(folded) if family is not QWEN3 or "attention_temperature" not in fields else folded
    torch.testing.assert_close(logits(stock, input_ids), logits(model, input_ids), rtol=exact, atol=exact)


@tied
def test_a_norm_free_llama_is_a_stock_one_whose_norms_do_nothing(tied, input_ids, tmp_path):
    """x / sqrt(mean(x^2) + 1e12) * 1e6, and no centring: nothing becomes wider."""
    family = LLAMA
    model = wide(family.model(norm="none", final_norm="none", activation="relu", tie_word_embeddings=tied))
    stock = to_stock(model)
    assert stock.config.hidden_size == model.config.hidden_size
    # RMSNorms of these families work in float32.
    torch.testing.assert_close(logits(stock, input_ids), logits(model, input_ids), rtol=1e-4, atol=1e-5)
    model.float().save_pretrained(tmp_path / "ours")
    report = convert(str(tmp_path / "ours"), tmp_path / "stock", to="stock")
    assert report["largest_difference"] < 1e-4
    convert(str(tmp_path / "stock"), tmp_path / "back")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert {*back.config.block_norms, back.config.final_norm} == {"none"}
    torch.testing.assert_close(logits(back, input_ids), logits(model, input_ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "fields", "why"),
    [
        (OPT, {"norm": "none", "final_norm": "none"}, "no epsilon that would disable these alone"),
        (QWEN3, {"norm": "none", "final_norm": "none"}, "no epsilon that would disable these alone"),
        (LLAMA, {"norm": "layernorm", "final_norm": "layernorm"}, "layernorm is nothing that an RMSNorm can be"),
        (LLAMA, {"norm": "rmsnorm", "query_key_norm": True}, "its queries and keys are normalised"),
        (QWEN3, {"norm": "rmsnorm", "query_key_norm": False}, "its queries and keys are not normalised"),
        (LLAMA, {"norm": "rmsnorm", "lm_head_bias": True}, "its head has a bias"),
    ],
    ids=str,
)
def test_what_stock_cannot_hold_is_refused(family, fields, why):
    with pytest.raises(ModelError, match=why):
        to_stock(family.model(**fields))
