"""T5: what is its own: position bias, gated MLPs, float16, tied embeddings, and what has no place."""

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model
from transformers import AutoConfig, T5Config, T5ForConditionalGeneration

from hf_lnfree import LNFreeT5Config, LNFreeT5EncoderModel, LNFreeT5ForConditionalGeneration, LNFreeT5Model
from hf_lnfree.models.errors import ConfigurationError

from ..conftest import GATED_T5, T5
from .test_cross_attention import GENERATION, inputs, logits, model_of
from .test_variants import moved


@pytest.fixture(params=(T5, GATED_T5), ids=lambda f: f.name)
def family(request):
    return request.param


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_the_encoder_changes_nothing(family, side):
    """Positions are relative, so a sequence may stand anywhere in its row."""
    model = model_of(family, norm="none", final_norm="none").double()
    batch = inputs(family)
    padding = torch.full((2, 4), model.config.pad_token_id)
    rows = (padding, batch["input_ids"]) if side == "left" else (batch["input_ids"], padding)
    mask = torch.cat([torch.full_like(part, int(part is not padding)) for part in rows], dim=1)
    padded = {**batch, "input_ids": torch.cat(rows, dim=1), "attention_mask": mask}
    torch.testing.assert_close(logits(model, padded), logits(model, batch), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("given", "gated", "activation"),
    [
        ({}, False, "relu"),
        ({"feed_forward_proj": "gated-gelu"}, True, "gelu_new"),
        ({"feed_forward_proj": "gated-prelu"}, True, "prelu"),
        ({"feed_forward_proj": "learnable_leaky_relu"}, False, "learnable_leaky_relu"),
        ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "silu"}, True, "silu"),
        ({"dense_act_fn": "prelu"}, False, "prelu"),
    ],
)
def test_the_activation_is_that_of_either_field_and_stays(given, gated, activation, tmp_path):
    config = LNFreeT5Config(**{**T5.tiny, **given})
    config.save_pretrained(tmp_path)
    for found in (config, AutoConfig.from_pretrained(tmp_path)):
        assert (found.is_gated_act, found.block_activations) == (gated, [activation] * 5)
        model = LNFreeT5Model(found)
        mlps = [block.layer[-1].DenseReluDense for stack in (model.encoder, model.decoder) for block in stack.block]
        assert {mlp.act.built[0] for mlp in mlps} == {activation}
        assert all(hasattr(mlp, "wi_1") == gated for mlp in mlps)
    with pytest.raises(ConfigurationError, match="dense_act_fn='nonsense' is not known"):
        LNFreeT5Config(feed_forward_proj="gated-nonsense")


@pytest.mark.parametrize("final", ["none", "rmsnorm"])
@pytest.mark.parametrize("norm", ["none", "dyt", "rmsnorm"])
def test_half_precision_runs_with_any_norm(family, norm, final, tmp_path):
    """transformers keeps `wo` in float32 in float16, and only stock norms take the stream back to it."""
    model = model_of(family, norm=norm, final_norm=final, residual_gain="fixed")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 0.7
    expected = logits(model, inputs(family))
    model.save_pretrained(tmp_path)
    loaded = LNFreeT5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float16)
    wo = {p.dtype for name, p in loaded.named_parameters() if name.endswith("wo.weight")}
    assert wo == {torch.float32 if norm == final == "rmsnorm" else torch.float16}
    error = (logits(loaded, inputs(family)).float() - expected).abs().max() / expected.abs().max()
    assert error < 0.03


def test_a_head_of_its_own_stays_one_and_is_not_scaled(family, tmp_path):
    """T5 1.1 is published with a head that is not the embedding, and says so by tie_word_embeddings=False."""
    stock = T5ForConditionalGeneration(T5Config(**family.tiny, tie_word_embeddings=False))
    stock.lm_head.weight = torch.nn.Parameter(torch.randn(99, 32))
    moved(stock).save_pretrained(tmp_path / "stock")
    ours = LNFreeT5ForConditionalGeneration.from_pretrained(tmp_path / "stock", norm="rmsnorm")
    assert not ours.config.scale_decoder_outputs
    assert not torch.equal(ours.lm_head.weight, ours.shared.weight)
    assert torch.equal(logits(ours, inputs(family)), logits(stock, inputs(family)))
    ours.save_pretrained(tmp_path / "ours")
    again = LNFreeT5ForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert torch.equal(logits(again, inputs(family)), logits(stock, inputs(family)))


def test_embeddings_of_both_stacks_are_one(family):
    model = model_of(family, norm="none")
    model.resize_token_embeddings(120)
    assert model.shared.weight is model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight
    assert model.lm_head.weight is model.shared.weight
    assert logits(model, inputs(family)).shape[-1] == 120


def test_matrices_begin_with_the_sizes_that_stock_ones_have():
    """Also the one that is left of a fused MLP, which has the width of the stream: its deviation is 1 / sqrt(32)."""
    torch.manual_seed(0)
    model = LNFreeT5Model(T5.config(activation="identity_fused", weight_norm="weight", initializer_range=0.5))
    for stack in (model.encoder, model.decoder):
        for block in stack.block:
            assert block.layer[-1].DenseReluDense.wo.weight.std().item() == pytest.approx(0.5 / 32**0.5, rel=0.1)
            assert block.layer[0].SelfAttention.q.weight.std().item() == pytest.approx(0.5 / (32 * 8) ** 0.5, rel=0.1)


def test_an_encoder_alone_has_the_first_layers():
    norms = ["dyt", "none", "scale", "scale", "scale"]
    model = LNFreeT5EncoderModel(T5.config(layer_norms=norms))
    found = [type(block.layer[0].layer_norm).__name__ for block in model.encoder.block]
    assert found == ["DynamicTanh", "Identity"]


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # what PEFT says of stock T5 too
def test_adapters_have_the_targets_of_the_stock_family(family):
    model = get_peft_model(model_of(family, norm="dyt"), LoraConfig(task_type="SEQ_2_SEQ_LM", r=2))
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name, p in model.named_parameters() if "lora_" in name}
    assert adapted == {"q", "v"}
    tuned = get_peft_model(model_of(family, norm="none"), LNTuningConfig(task_type="SEQ_2_SEQ_LM"))
    names = {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert len(names) == 2
    assert all("final_layer_norm" in name for name in names)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"residual_init": "scaled"}, "residual_init='scaled' is not for LNFreeT5Config: it draws every matrix"),
        ({"lm_head_bias": True}, "lm_head_bias=True is not for LNFreeT5Config"),
        ({"linear_bias": "query_key"}, "linear_bias='query_key' is not for LNFreeT5Config: it has no biases"),
        ({"query_key_norm": True}, "query_key_norm=True is not for LNFreeT5Config: its logits are not divided"),
        ({"embedding_scale": True}, r"no module between the embeddings and encoder\.block.*Leave it at False"),
        ({"feed_forward_proj": "gated-identity_fused"}, r"dense_act_fn='identity_fused'.*is gated.*Leave it at 'relu'"),
    ],
)
def test_what_has_no_place_is_refused(fields, message):
    with pytest.raises(ConfigurationError, match=message):
        T5.head(GENERATION)(T5.config(**fields))
