"""ViT and BERT, in and out: equal outputs to the bit under every head, and what is left out or refused by name."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, ViTImageProcessorPil

import hf_lnfree
from hf_lnfree.conversion import Checkpoint, convert, convert_checkpoint, fold, to_stock
from hf_lnfree.conversion.planning import plan
from hf_lnfree.conversion.stock_to_ours import ours
from hf_lnfree.errors import ModelError

from ..conftest import BERT, VIT
from .conftest import trained

ENDS = (
    *((VIT, end) for end in ("ForImageClassification", "Model")),
    *((BERT, f"For{head}") for head in ("MaskedLM", "SequenceClassification", "TokenClassification")),
    *((BERT, end) for end in ("ForQuestionAnswering", "Model")),
)
every_end = pytest.mark.parametrize(("family", "end"), ENDS, ids=lambda v: getattr(v, "name", v))


def stock_model(family, end, **fields):
    torch.manual_seed(0)
    fields = {"initializer_range": 0.2, **fields}
    return trained(family.stock_class(end)(family.stock_config(**fields)))


def inputs(family, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    if family is VIT:
        return torch.randn(3, 1, 8, 8, generator=generator, dtype=dtype)
    return torch.randint(3, 99, (2, 12), generator=generator)


def outputs(model, x):
    with torch.no_grad():
        return [value for value in model.eval()(x).values() if isinstance(value, torch.Tensor)]


def equal(model, other, x):
    one, two = outputs(model, x), outputs(other, x)
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@every_end
def test_stock_weights_come_in_and_go_out_bit_for_bit(family, end, tmp_path):
    stock, x = stock_model(family, end), inputs(family)
    stock.save_pretrained(tmp_path / "stock")
    report = convert(str(tmp_path / "stock"), tmp_path / "ours")
    assert report["largest_difference"] == 0
    own = getattr(hf_lnfree, family.prefix + end)
    for found in (own.from_pretrained(tmp_path / "ours"), ours(stock)):
        assert type(found) is own
        assert set(found.config.block_norms) == {"layernorm"}
        assert equal(found, stock, x)
    report = convert(str(tmp_path / "ours"), tmp_path / "back", "stock")
    assert report["largest_difference"] == 0
    back = type(stock).from_pretrained(tmp_path / "back")
    assert equal(back, stock, x)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("back", "stock")]
    assert configs[0].pop("tokenizer_class", None) in (None, "BertTokenizer")
    assert configs[0] == configs[1]


@every_end
def test_a_checkpoint_that_names_no_class_is_known_by_its_tensors(family, end, tmp_path):
    stock = stock_model(family, end)
    stock.config.architectures = None
    stock.save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    del checkpoint.config["architectures"]
    assert plan(checkpoint).model_class.__name__ == family.prefix + end


def test_the_image_processor_comes_along(tmp_path):
    stock_model(VIT, "ForImageClassification").save_pretrained(tmp_path / "stock")
    ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.25]).save_pretrained(tmp_path / "stock")
    for source, out, to in (("stock", "ours", "lnfree"), ("ours", "back", "stock")):
        convert(str(tmp_path / source), tmp_path / out, to)
        found = AutoImageProcessor.from_pretrained(tmp_path / out, backend="pil")
        assert (found.size["height"], list(found.image_mean)) == (8, [0.25])


def test_a_published_bert_has_older_names_and_heads_more(tmp_path):
    """As google-bert/bert-base-uncased: gamma and beta, the pooler and the head that told sentences apart."""
    stock, x = stock_model(BERT, "ForMaskedLM"), inputs(BERT)
    stock.save_pretrained(tmp_path / "stock")
    path = tmp_path / "stock" / "model.safetensors"
    state = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in load_file(path).items()
    }
    assert any("gamma" in name for name in state)
    more = {"bert.pooler.dense.weight": torch.ones(32, 32), "cls.seq_relationship.bias": torch.ones(2)}
    more |= {"cls.predictions.decoder.weight": state["bert.embeddings.word_embeddings.weight"].clone()}
    more |= {"bert.embeddings.position_ids": torch.arange(64)[None]}
    save_file(state | more, path, metadata={"format": "pt"})
    report = convert(str(tmp_path / "stock"), tmp_path / "ours")
    (note,) = report["notes"]
    assert "Left out, as LNFreeBertForMaskedLM has no part for it: bert.pooler.dense.weight, cls.seq_rel" in note
    assert report["largest_difference"] == 0
    assert equal(hf_lnfree.LNFreeBertForMaskedLM.from_pretrained(tmp_path / "ours"), stock, x)


def test_other_unknown_tensors_are_refused(tmp_path):
    stock_model(VIT, "ForImageClassification").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"vit.layers.0.gate": torch.ones(1)}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"has unknown tensors: vit\.layers\.0\.gate|has unknown 1 tensors"):
        convert_checkpoint(Checkpoint(tmp_path), tmp_path / "out")


@pytest.mark.parametrize("end", ["ForPreTraining", "ForNextSentencePrediction"])
def test_heads_without_a_class_are_refused_by_name(end, tmp_path):
    stock = getattr(transformers, f"Bert{end}")(BERT.stock_config())
    with pytest.raises(ModelError, match=f"no class of ours for Bert{end}, only for BertForMaskedLM"):
        ours(stock)
    stock.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"no class of ours for Bert{end}"):
        convert_checkpoint(Checkpoint(tmp_path), tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "end", "fields", "why"),
    [
        (BERT, "ForMaskedLM", {"norm": "none"}, "no epsilon that would disable these alone"),
        (BERT, "Model", {"norm": "rmsnorm"}, "rmsnorm is nothing that a LayerNorm can be"),
        (BERT, "Model", {"norm": "derf"}, "derf is nothing that a LayerNorm can be"),
        (VIT, "ForImageClassification", {"norm": "dyt"}, "dyt, layernorm|dyt is nothing that a LayerNorm can be"),
        (VIT, "Model", {"norm": "layernorm", "query_key_norm": True}, "its queries and keys are normalised"),
        (VIT, "Model", {"norm": "layernorm", "activation": "prelu"}, "prelu is no activation of transformers"),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_what_stock_cannot_hold_is_refused(family, end, fields, why):
    with pytest.raises(ModelError, match=why):
        to_stock(getattr(hf_lnfree, family.prefix + end)(family.config(**fields)))


@pytest.mark.parametrize(("family", "end"), [ENDS[0], ENDS[2]], ids=["vit", "bert"])
def test_onnx_is_for_causal_language_models(family, end, tmp_path):
    stock_model(family, end).save_pretrained(tmp_path / "stock")
    with pytest.raises(ModelError, match=f"Only causal language models .* this is a {family.prefix}{end}"):
        convert(str(tmp_path / "stock"), tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("end", ["ForImageClassification", "Model"])
@pytest.mark.parametrize(
    "fields", [{}, {"qkv_bias": False}, {"residual_gain": "skipinit", "embedding_scale": True}], ids=str
)
def test_folding_a_vit_changes_nothing_but_rounding(end, fields):
    own = getattr(hf_lnfree, f"LNFreeViT{end}")
    torch.manual_seed(0)
    model = trained(own(VIT.config(norm="layernorm", initializer_range=0.2, **fields))).double()
    folded, told = fold(model)
    x = inputs(VIT, torch.float64)
    for found, wanted in zip(outputs(folded, x), outputs(model, x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert set(folded.config.block_norms) == {"rmspre"}
    keeps = end == "Model"  # hidden states are the output, and a pooler reads the same ones
    assert folded.config.final_norm == ("layernorm" if keeps else "rmspre")
    assert any("keeps its gain and bias" in note for note in told.notes) == keeps
    stream = folded.base_model.embeddings(x)
    torch.testing.assert_close(stream.mean(-1), torch.zeros(3, 17, dtype=torch.float64), rtol=0, atol=1e-12)
    if not keeps:  # a stream without a mean: the deviation is the root mean square
        for found, wanted in zip(outputs(to_stock(folded), x), outputs(model, x), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def test_a_vit_that_masks_patches_is_refused_by_name():
    with pytest.raises(ModelError, match=r"has no place for embeddings\.mask_token"):
        fold(hf_lnfree.LNFreeViTModel(VIT.config(norm="layernorm"), use_mask_token=True))


def test_a_norm_free_vit_is_no_stock_one():
    """Its stream has a mean, which a stock LayerNorm takes out even when it does nothing else."""
    model = hf_lnfree.LNFreeViTForImageClassification(VIT.config(norm="none", final_norm="none"))
    with pytest.raises(ModelError, match="trained without norms cannot be made one with a centred stream"):
        to_stock(model)


def test_of_bert_all_but_the_norms_is_folded():
    torch.manual_seed(0)
    fields = {"residual_gain": "skipinit", "weight_norm": "weight", "attention_temperature": True, "ffn_scale": True}
    model = trained(hf_lnfree.LNFreeBertForMaskedLM(BERT.config(norm="none", initializer_range=0.2, **fields))).double()
    folded, _ = fold(model)
    assert (folded.config.residual_gain, folded.config.weight_norm, folded.config.ffn_scale) == ("none", "none", False)
    x = inputs(BERT)
    torch.testing.assert_close(outputs(folded, x)[0], outputs(model, x)[0], rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"norm": "layernorm"}, r"6 stand behind the sum of stream and branch.* bert\.encoder\.layer\.0\.attention"),
        ({"norm": "fixed_scale"}, "6 stand behind the sum"),
        ({"norm": "none", "embedding_scale": True}, "scale of the embeddings .* stands behind a norm"),
    ],
    ids=str,
)
def test_what_cannot_be_folded_of_bert_is_refused_by_name(fields, why):
    with pytest.raises(ModelError, match=why):
        fold(hf_lnfree.LNFreeBertForMaskedLM(BERT.config(**fields)))
