"""Padding is what an attention was told to hide, whatever the shape of the model's inputs."""

import pytest
import torch
import transformers as tf
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

from hf_lnfree import AttentionEntropyAnalyzer
from tests.attention import models
from tests.attention.softmaxes import Softmaxes

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def mean_entropies(model, inputs, tokens):
    """[L, H] of the queries that are `tokens` [L][B, Q], from the softmaxes of the eager model."""
    model.set_attn_implementation("eager")
    with torch.no_grad(), Softmaxes() as eager:
        model(**inputs)
    return torch.stack([e.transpose(0, 1)[:, t].mean(-1) for e, t in zip(eager.entropies(), tokens, strict=True)])


def check(model, inputs, tokens):
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        report = AttentionEntropyAnalyzer(model).run([inputs])
        assert report.rows[:, 0].tolist() == [int(t.sum()) for t in tokens]
        expected = mean_entropies(model, inputs, tokens)
        torch.testing.assert_close(report.entropy, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["Wav2Vec2", "Hubert"])
def test_sound_is_shortened_before_attention(kind):
    sound = {"conv_dim": (16, 16), "conv_stride": (20, 10), "conv_kernel": (20, 10), "num_feat_extract_layers": 2}
    sound |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "initializer_range": 0.3}
    config = getattr(tf, f"{kind}Config")(vocab_size=99, **SIZES, **sound)
    torch.manual_seed(0)
    model = getattr(tf, f"{kind}Model")._from_config(config, attn_implementation="sdpa").eval()
    mask = torch.ones(2, 4000, dtype=torch.long)
    mask[1, 2500:] = 0
    tokens = torch.arange(20) < torch.tensor([[20], [12]])
    check(model, {"input_values": models.numbers(2, 4000), "attention_mask": mask}, [tokens] * 2)


def test_patches_as_many_as_text_tokens_are_no_text():
    sides = {**SIZES, "projection_dim": 16, "initializer_range": 0.3}
    text = {**sides, "vocab_size": 99, "max_position_embeddings": 64, "eos_token_id": 1, "bos_token_id": 0}
    config = tf.CLIPConfig(text_config=text, vision_config={**sides, "image_size": 8, "patch_size": 4})
    torch.manual_seed(0)
    model = tf.CLIPModel._from_config(config, attn_implementation="sdpa").eval()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    inputs = {"input_ids": torch.randint(3, 90, (2, 5)), "attention_mask": mask}
    inputs |= {"pixel_values": models.numbers(2, 3, 8, 8)}
    everything = torch.ones(2, 5, dtype=torch.bool)
    report = AttentionEntropyAnalyzer(model).run([inputs])
    rows = {name: int(count) for name, count in zip(report.modules, report.rows[:, 0], strict=True)}
    assert {count for name, count in rows.items() if name.startswith("vision")} == {10}
    assert {count for name, count in rows.items() if name.startswith("text")} == {8}
    order = [everything if name.startswith("vision") else mask.bool() for name in report.modules]
    check(model, inputs, order)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")  # PEFT's
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_prompts_of_peft_stand_before_the_tokens(kind, side):
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM._from_config(tf.LlamaConfig(**models.TEXT), attn_implementation="sdpa")
    tuned = get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    inputs = models.texts()
    if side == "left":
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    prompt = torch.ones(2, 3 if kind is PromptTuningConfig else 0, dtype=torch.bool)
    tokens = torch.cat((prompt, inputs["attention_mask"].bool()), 1)
    report = AttentionEntropyAnalyzer(tuned).run([inputs])
    assert report.rows[:, 0].tolist() == [int(tokens.sum())] * 2
    model.set_attn_implementation("eager")
    with torch.no_grad(), Softmaxes() as eager:
        tuned(**inputs)
    expected = [entropies.transpose(0, 1)[:, tokens].mean(-1) for entropies in eager.entropies()]
    torch.testing.assert_close(report.entropy, torch.stack(expected), rtol=0, atol=2e-5)


def test_cross_attention_counts_the_tokens_of_its_decoder():
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "init_std": 0.3}
    sizes |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    torch.manual_seed(0)
    model = tf.BartModel._from_config(tf.BartConfig(vocab_size=99, **sizes), attn_implementation="sdpa").eval()
    inputs = models.texts()  # the decoder's input is as long as the encoder's
    mask = torch.ones_like(inputs["attention_mask"])
    mask[0, 5:] = 0
    inputs |= {"decoder_input_ids": inputs["input_ids"].flip(1), "decoder_attention_mask": mask}
    check(model, inputs, [inputs["attention_mask"].bool(), mask.bool(), mask.bool()])
