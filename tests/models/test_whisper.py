"""Whisper: what is its own: prompts before the start token, the pipeline, padding of the decoder; and refusals."""

import pytest
import torch
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, pipeline

from hf_lnfree import LNFreeWhisperConfig, LNFreeWhisperForAudioClassification
from hf_lnfree.data.tokenization import train_bpe
from hf_lnfree.models.errors import ConfigurationError

from ..conftest import WHISPER
from .test_cross_attention import GENERATION, inputs, logits, model_of


def test_padding_of_the_decoder_changes_nothing():
    model = model_of(WHISPER, norm="none", final_norm="none").double()
    batch = inputs(WHISPER)
    batch["input_features"] = batch["input_features"].double()
    decoded = batch["decoder_input_ids"]
    padded = {
        "input_features": batch["input_features"],
        "decoder_input_ids": torch.cat((torch.zeros(2, 3, dtype=torch.long), decoded), dim=1),
        "decoder_attention_mask": torch.tensor([[0] * 3 + [1] * 5] * 2),
        "decoder_position_ids": torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4]] * 2),
    }
    torch.testing.assert_close(logits(model, padded)[:, 3:], logits(model, batch), rtol=1e-9, atol=1e-9)


def test_a_pipeline_takes_it_for_whisper(tmp_path):
    """By its model_type, so that it may return time stamps."""
    tokenizer = train_bpe(["some words"], 300)
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    models = {
        "ours": WHISPER.model(head=GENERATION, norm="layernorm", max_source_positions=50),
        "stock": WHISPER.stock_model(head=GENERATION, max_source_positions=50),
    }
    found = {}
    for name, model in models.items():
        speech = pipeline("automatic-speech-recognition", model, tokenizer=tokenizer, feature_extractor=extractor)
        found[name] = (speech.type, speech._preprocess_params, speech._forward_params, speech._postprocess_params)
    assert found["ours"][0] == "seq2seq_whisper"
    assert found["ours"] == found["stock"]


def test_a_frozen_encoder_is_left_alone():
    model = model_of(WHISPER, norm="none").train()
    model.freeze_encoder()
    batch = inputs(WHISPER)
    model(**batch, labels=batch["decoder_input_ids"]).loss.backward()
    with_gradient = {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {"decoder"}


def test_query_and_key_biases_alone_are_trained():
    """Of self- and cross-attention; keys have no biases at all."""
    model = model_of(WHISPER, linear_bias="query_key", norm="none", final_norm="none")
    trained = [name for name, p in model.named_parameters() if name.endswith(".bias") and p.requires_grad]
    layers = [name for name in trained if ".layers." in name]
    assert len(layers) == 2 + 2 * 3
    assert all(name.endswith("q_proj.bias") for name in layers)


def test_classes_of_sounds_are_learned_without_norms():
    torch.manual_seed(0)
    model = LNFreeWhisperForAudioClassification(WHISPER.config(norm="none", num_labels=2, use_weighted_layer_sum=True))
    sounds, labels = torch.zeros(8, 8, 16), torch.arange(8) % 2
    sounds[labels == 0, :4], sounds[labels == 1, 4:] = 1.0, 1.0
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(40):
        optimizer.zero_grad()
        model(sounds, labels=labels).loss.backward()
        optimizer.step()
    assert torch.equal(model(sounds).logits.argmax(-1), labels)


def test_long_recordings_and_prompts_are_decoded_as_by_the_stock_model():
    """Whisper's own `generate`: two windows of a recording, with the first one's words before those of the second."""
    ours = WHISPER.model(head=GENERATION, norm="layernorm")
    stock = WhisperForConditionalGeneration(WHISPER.stock_config())
    stock.load_state_dict(ours.state_dict())
    sound = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for model in (ours, stock.eval()):
        model.generation_config.no_timestamps_token_id = 50
        model.generation_config.return_timestamps = True
        options = {"condition_on_prev_tokens": True, "prompt_ids": torch.tensor([60, 61]), "max_new_tokens": 8}
        model.generation_config.prev_sot_token_id = 60
        found.append(model.generate(sound, attention_mask=torch.ones(1, 32), return_timestamps=True, **options))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm": "removal"}, "norm='removal' cannot be honoured.*reads input_features"),
        ({"lm_head_bias": True}, "lm_head_bias=True is not for LNFreeWhisperConfig: its head has no bias"),
        ({"embedding_scale": True}, r"no module between the embeddings and encoder\.layers"),
    ],
)
def test_what_has_no_place_is_refused(fields, message):
    with pytest.raises(ConfigurationError, match=message):
        WHISPER.head(GENERATION)(WHISPER.config(**fields))


def test_layers_of_a_configuration_are_those_of_both_stacks():
    assert len(LNFreeWhisperConfig(encoder_layers=3, decoder_layers=4).block_norms) == 7
