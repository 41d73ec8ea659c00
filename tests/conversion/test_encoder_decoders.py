"""T5 and Whisper, in and out: equal logits to the bit, or in float64 where norms are folded or disabled."""

import copy

import pytest
import torch
import transformers
from transformers import T5Config, T5ForConditionalGeneration

from hf_lnfree.analysis import attribute
from hf_lnfree.conversion import Checkpoint, convert, convert_checkpoint, export_onnx, fold, to_stock
from hf_lnfree.conversion.stock_to_ours import load, ours
from hf_lnfree.errors import ModelError
from hf_lnfree.removal import removable

from ..conftest import GATED_T5, T5, WHISPER
from ..models.test_cross_attention import AUTO, ENDS, GENERATION, fitting_inputs, inputs
from .conftest import trained

every = pytest.mark.parametrize("family", [T5, GATED_T5, WHISPER], ids=lambda f: f.name)
EVERY_END = [(f, end) for f in (T5, WHISPER) for end in ENDS[f.stock_prefix]]
t5 = pytest.mark.parametrize("family", [T5, GATED_T5], ids=lambda f: f.name)


@torch.no_grad()
def outputs(model, batch):
    return model.eval()(**batch)[0]


@pytest.mark.parametrize(("family", "end"), EVERY_END, ids=lambda x: str(x)[-20:])
def test_every_stock_class_comes_in_bit_for_bit_and_goes_back(family, end, tmp_path):
    stock = trained(getattr(transformers, family.stock_prefix + end)(family.stock_config()))
    stock.save_pretrained(tmp_path / "stock")
    planned = convert_checkpoint(Checkpoint(tmp_path / "stock"), tmp_path / "ours")
    assert {*planned.config.block_norms, planned.config.final_norm} == {family.norm}
    batch = fitting_inputs(family, end)
    read, notes = load(Checkpoint(tmp_path / "stock"))
    assert notes == []
    for found in (planned.model_class.from_pretrained(tmp_path / "ours"), ours(stock), read):
        assert type(found).__name__ == family.prefix + end
        assert torch.equal(outputs(found, batch), outputs(stock, batch))
        back = to_stock(found)
        assert type(back) is type(stock)
        assert torch.equal(outputs(back, batch), outputs(stock, batch))
        back.save_pretrained(tmp_path / "back")
        assert torch.equal(outputs(type(stock).from_pretrained(tmp_path / "back"), batch), outputs(stock, batch))


@t5
def test_a_head_of_its_own_stays_one(family, tmp_path):
    """As T5 1.1 is published: not the embedding, and not scaled; with a tensor that no class reads."""
    stock = T5ForConditionalGeneration(T5Config(**family.tiny, tie_word_embeddings=False))
    stock.lm_head.weight = torch.nn.Parameter(torch.randn(99, 32))
    trained(stock).save_pretrained(tmp_path / "stock")
    checkpoint = Checkpoint(tmp_path / "stock")
    convert_checkpoint(checkpoint, tmp_path / "ours")
    saved = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours")
    for found in (saved, ours(stock), load(checkpoint)[0]):
        assert not found.config.scale_decoder_outputs
        assert torch.equal(outputs(found, inputs(family)), outputs(stock, inputs(family)))
        back = to_stock(found)
        assert torch.equal(outputs(back, inputs(family)), outputs(stock, inputs(family)))
        back.save_pretrained(tmp_path / "back")
        again = T5ForConditionalGeneration.from_pretrained(tmp_path / "back")
        assert torch.equal(outputs(again, inputs(family)), outputs(stock, inputs(family)))


def test_what_old_checkpoints_hold_beside_is_passed_over(tmp_path):
    from safetensors.torch import load_file, save_file

    T5.stock_model(head=GENERATION).save_pretrained(tmp_path / "stock")
    path = tmp_path / "stock" / "model.safetensors"
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    save_file(load_file(path) | {name: torch.zeros(32, 4)}, path, metadata={"format": "pt"})
    convert_checkpoint(Checkpoint(tmp_path / "stock"), tmp_path / "ours")
    save_file(load_file(path) | {"decoder.other": torch.zeros(1)}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"has unknown 1 tensors: decoder\.other"):
        convert_checkpoint(Checkpoint(tmp_path / "stock"), tmp_path / "never")


FOLDED = [
    {},
    {"residual_gain": "skipinit", "ffn_scale": True},
    {"residual_gain": "rezero", "attention_temperature": True},
    {"weight_norm": "weight", "weight_norm_scope": "block"},
    {"activation": "prelu", "layer_norms": "rmsnorm:0-1,none:2,scale:3,rmspre:4"},
]


@t5
@pytest.mark.parametrize("fields", FOLDED, ids=str)
def test_folding_changes_nothing_but_rounding(family, fields, tmp_path):
    """The gain of the encoder's final norm goes into keys and values of cross-attention, the other into the head."""
    model = trained(family.model(head=GENERATION, norm="rmsnorm", initializer_range=1.0, **fields)).double()
    folded, told = fold(model)
    assert set(folded.config.block_norms) <= {"rmspre", "none"}
    assert folded.config.final_norm == "rmspre"
    assert told.untied
    assert not [name for name, _ in folded.named_parameters() if "norm" in name or "gain" in name or "scales" in name]
    wanted = outputs(model, inputs(family))
    exact = 1e-5 * wanted.abs().max().item()  # RMSNorms of T5 work in float32
    torch.testing.assert_close(outputs(folded, inputs(family)), wanted, rtol=0, atol=exact)
    folded.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(outputs(loaded, inputs(family)), outputs(folded, inputs(family)))


@t5
@pytest.mark.parametrize("end", ENDS["T5"])
def test_every_head_is_folded_as_far_as_it_reads_the_norm(family, end):
    own = getattr(__import__("hf_lnfree"), f"LNFreeT5{end}")
    model = trained(own(family.config(norm="rmsnorm"))).double()
    folded, _ = fold(model)
    assert set(folded.config.block_norms[:2]) == {"rmspre"}
    one_projection = end in ("ForConditionalGeneration", "ForTokenClassification", "ForQuestionAnswering")
    assert folded.config.final_norm == ("rmspre" if one_projection else "rmsnorm")
    batch = fitting_inputs(family, end)
    torch.testing.assert_close(outputs(folded, batch), outputs(model, batch), rtol=1e-5, atol=1e-5)


@t5
@pytest.mark.parametrize("end", ["ForConditionalGeneration", "ForQuestionAnswering"])
def test_final_biases_stay_where_keys_and_values_have_none(family, end):
    """Though the head of question answering could take them: a configuration has one kind of final norm."""
    own = getattr(__import__("hf_lnfree"), f"LNFreeT5{end}")
    model = trained(own(family.config(norm="none", final_norm="affine"))).double()
    folded, _ = fold(model)
    assert folded.config.final_norm == "affine"
    batch = fitting_inputs(family, end)
    torch.testing.assert_close(outputs(folded, batch), outputs(model, batch), rtol=0, atol=1e-10)


@t5
def test_a_norm_free_t5_is_a_stock_one_whose_norms_do_nothing(family, tmp_path):
    fields = {"norm": "none", "final_norm": "none", "residual_gain": "skipinit", "attention_temperature": True}
    model = trained(family.model(head=GENERATION, initializer_range=0.3, activation="silu", **fields)).double()
    stock = to_stock(model)
    assert type(stock) is T5ForConditionalGeneration
    wanted = outputs(model, inputs(family))
    close = {"rtol": 0, "atol": 1e-5 * wanted.abs().max().item()}
    torch.testing.assert_close(outputs(stock, inputs(family)), wanted, **close)
    model.float().save_pretrained(tmp_path / "ours")
    report = convert(str(tmp_path / "ours"), tmp_path / "stock", to="stock")
    assert report["largest_difference"] <= report["tolerance"]
    read = T5ForConditionalGeneration.from_pretrained(tmp_path / "stock")
    assert read.config.dense_act_fn == "silu"
    torch.testing.assert_close(outputs(read.double(), inputs(family)), wanted, **close)
    convert(str(tmp_path / "stock"), tmp_path / "back")
    back = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "back")
    assert {*back.config.block_norms, back.config.final_norm} == {"none"}
    torch.testing.assert_close(outputs(back.double(), inputs(family)), wanted, **close)


@pytest.mark.parametrize(
    ("family", "end"), [*EVERY_END, (GATED_T5, "ForConditionalGeneration")], ids=lambda x: str(x)[-20:]
)
def test_a_conversion_is_checked_on_random_inputs(family, end, tmp_path):
    trained(getattr(transformers, family.stock_prefix + end)(family.stock_config())).save_pretrained(tmp_path / "stock")
    report = convert(str(tmp_path / "stock"), tmp_path / "ours")
    assert report["largest_difference"] == 0.0
    assert report["largest_logit"] > 0
    if end == "ForConditionalGeneration":
        auto = getattr(transformers, f"AutoModelFor{AUTO[family.name]}")
        assert type(auto.from_pretrained(tmp_path / "ours")) is family.head(GENERATION)
    assert convert(str(tmp_path / "ours"), tmp_path / "again", to="stock")["largest_difference"] == 0.0


@pytest.mark.parametrize(
    ("family", "fields", "why"),
    [
        (WHISPER, {"norm": "none", "final_norm": "none"}, "no epsilon that would disable these alone"),
        (WHISPER, {"norm": "layernorm", "query_key_norm": True}, "its queries and keys are normalised"),
        (WHISPER, {"norm": "layernorm", "residual_gain": "fixed"}, "does not declare what its residual stream begins"),
        (T5, {"norm": "layernorm", "final_norm": "layernorm"}, "layernorm is nothing that an RMSNorm can be"),
        (T5, {"norm": "rmsnorm", "attention_softcap": 1.0}, "its attention logits are capped"),
        (T5, {"norm": "rmsnorm", "layer_activations": "relu:0-2,gelu:3-4"}, "its layers have different activations"),
    ],
    ids=str,
)
def test_what_stock_cannot_hold_is_refused(family, fields, why):
    with pytest.raises(ModelError, match=why):
        to_stock(family.model(head=GENERATION, **fields))


@every
def test_what_works_on_one_stack_is_refused(family, tmp_path):
    model = family.model(head=GENERATION, norm=family.norm)
    for refused in (lambda m: attribute(m, torch.arange(4)[None]), lambda m: export_onnx(m, tmp_path / "x")):
        with pytest.raises(ModelError):
            refused(copy.deepcopy(model))
    for refused in (removable, fold) if family is WHISPER else ():
        with pytest.raises(ModelError, match="does not declare what its residual stream begins with"):
            refused(copy.deepcopy(model))


def test_a_configuration_that_does_not_name_its_class_is_refused(tmp_path):
    import json

    T5.stock_model(head=GENERATION).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["architectures"]
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="as architectures: T5ForConditionalGeneration"):
        convert_checkpoint(Checkpoint(tmp_path), tmp_path / "ours")
