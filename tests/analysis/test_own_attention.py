"""Attentions past the attention interface are recorded as eager computes them, or named in an error."""

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import nn
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAEEncoderAttnBlock

from hf_lnfree.analysis.capture import record_attention_entropy
from hf_lnfree.errors import AttentionError
from tests.attention import models
from tests.attention.softmaxes import Softmaxes

SIZES = {**models.SIZES, "intermediate_size": 64, "initializer_range": 0.3}
IDS = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(0))
SOUND = models.numbers(2, 4000)


def build(cls, config, implementation="eager"):
    torch.manual_seed(0)
    model = cls._from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def wavlm():
    sound = {"conv_dim": (16, 16), "conv_stride": (20, 10), "conv_kernel": (20, 10), "num_feat_extract_layers": 2}
    sound |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    return build(tf.WavLMModel, tf.WavLMConfig(**SIZES, **sound))


class MapsOfTorch:
    """Per-head maps of torch's multi-head attention, in the order of its calls."""

    def __enter__(self):
        self.maps, self.before = [], F.multi_head_attention_forward

        def forward(*args, **kwargs):
            output = self.before(*args, **kwargs)
            again = kwargs | {"need_weights": True, "average_attn_weights": False}
            self.maps.append(self.before(*args, **again)[1])
            return output

        F.multi_head_attention_forward = forward
        return self

    def __exit__(self, *_):
        F.multi_head_attention_forward = self.before

    def entropies(self):
        return [torch.special.entr(map_.double()).sum(-1) for map_ in self.maps]


def close(found, expected, atol=2e-5):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=atol)


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # WavLM's
@pytest.mark.parametrize("padded", [False, True])
def test_every_head_of_wavlm(padded):
    model = wavlm()
    mask = torch.ones(2, 4000, dtype=torch.long)
    mask[1, 2500:] = 0
    inputs = {"input_values": SOUND, "attention_mask": mask if padded else None}
    with torch.no_grad():
        plain = model(**inputs)[0]
        with record_attention_entropy(model) as record:
            recorded = model(**inputs)[0]
        with MapsOfTorch() as torchs:
            model(**inputs)
    assert torch.equal(plain, recorded)
    close(record.entropies.values(), torchs.entropies())
    for name, entropy in record.entropies.items():
        assert (entropy.std(1) > 1e-3).all(), "heads differ"
        support = record.support[name].expand_as(entropy)
        assert support[0].unique().tolist() == [20]
        assert support[1].unique().tolist() == [12 if padded else 20]
    message = r"A softmax ran in encoder\.layers\.0\.attention \(WavLMAttention\), encoder"
    with torch.no_grad(), pytest.raises(AttentionError, match=message), record_attention_entropy(model, "fused"):
        model(**inputs)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_pooling_head_of_siglip(implementation):
    config = tf.SiglipVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                   image_size=16, patch_size=4)  # fmt: skip
    model = build(tf.SiglipVisionModel, config, implementation)
    pixels = models.numbers(2, 3, 16, 16)
    with torch.no_grad(), record_attention_entropy(model) as record:
        model(pixels)
    with torch.no_grad(), Softmaxes() as eager:
        build(tf.SiglipVisionModel, config)(pixels)
    with torch.no_grad(), MapsOfTorch() as torchs:
        model(pixels)
    assert [name for name in record.entropies if name.endswith("attention")]
    close(record.entropies.values(), eager.entropies() + torchs.entropies(), atol=1e-4)
    message = r"head\.attention \(MultiheadAttention\)\. Try method='auto'"
    with torch.no_grad(), pytest.raises(AttentionError, match=message), record_attention_entropy(model, "fused"):
        model(pixels)


class MultiHead(nn.Module):
    """Self-attention of torch, with everything that its function takes."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(16, 4, **options).eval()

    def forward(self, x, **masks):
        return self.attention(x, x, x, need_weights=False, **masks)[0]


PADDING = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
LATER = torch.ones(6, 6, dtype=torch.bool).triu(1)
BIAS = models.numbers(6, 6)


@pytest.mark.parametrize(
    "masks",
    [{}, {"attn_mask": LATER}, {"key_padding_mask": PADDING}, {"attn_mask": LATER, "is_causal": True},
     {"attn_mask": BIAS, "key_padding_mask": torch.zeros(2, 6).masked_fill(PADDING, -torch.inf)},
     {"attn_mask": LATER.expand(8, 6, 6)}],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_multi_head_attention_of_torch(masks, dtype):
    model, x = MultiHead(batch_first=True).to(dtype), models.numbers(2, 6, 16).to(dtype)
    masks = {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in masks.items()}
    with torch.no_grad(), record_attention_entropy(model) as record:
        model(x, **masks)
    attention = model.attention.float()
    q, k, _ = F.linear(x.float(), attention.in_proj_weight, attention.in_proj_bias).unflatten(-1, (3, 4, 4)).unbind(2)
    logits = (q.transpose(1, 2) @ k.transpose(1, 2).mT / 2).double()
    for name in masks.keys() - {"is_causal"}:
        mask = masks[name][:, None, None] if name == "key_padding_mask" else masks[name][..., :6, :6].expand(8, 6, 6)[0]
        logits = logits.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    close([record.entropies["attention"]], [torch.special.entr(logits.softmax(-1)).sum(-1)])
    assert torch.equal(record.support["attention"].expand(2, 4, 6), logits.isfinite().sum(-1))


class SelfMix(nn.Module):
    """An attention that nothing of transformers sees, and that returns no map."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)


class OtherAttention(SelfMix):
    num_heads = 4


class Mixture(nn.Module):
    """One attention that is seen, one that computes by itself, a router, and a module of another kind."""

    def __init__(self, own):
        super().__init__()
        torch.manual_seed(0)
        self.bert = tf.BertModel._from_config(tf.BertConfig(**SIZES), attn_implementation="sdpa")
        self.own, self.router = own, nn.Sequential(nn.Linear(32, 6))

    def forward(self, ids):
        x = self.own(self.bert(ids)[0])
        return x, self.router(x).softmax(-1), x.unflatten(-1, (4, 8)).softmax(-1)


def test_what_ran_unseen_beside_a_recorded_attention_is_named():
    model = Mixture(SelfMix()).eval()
    with pytest.raises(AttentionError, match=r"own \(SelfMix\)"), record_attention_entropy(model):
        model(IDS)
    model = Mixture(nn.Sequential(nn.Linear(32, 32))).eval()
    with torch.no_grad(), record_attention_entropy(model) as record:
        model(IDS)
    assert len(record.calls) == 2


def test_the_softmax_of_a_module_that_says_its_heads():
    model = Mixture(OtherAttention()).eval()
    with torch.no_grad(), Softmaxes() as eager, record_attention_entropy(model) as record:
        model(IDS)
    close([record.entropies["own"]], [eager.entropies()[0]])
    assert list(record.entropies)[-1] == "own"
    with pytest.raises(AttentionError, match=r"own \(OtherAttention\)"), record_attention_entropy(model.train()):
        model(IDS)


def test_after_an_exception_calls_belong_to_nobody():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            raise RuntimeError("mine")

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            F.scaled_dot_product_attention(x, x, x)
            return self.inner(x)

    model, x = Outer(), torch.randn(1, 1, 3, 2)
    with record_attention_entropy(model) as record:
        with pytest.raises(RuntimeError, match="mine"):
            model(x)
        F.scaled_dot_product_attention(x, x, x)
    assert {name: len(calls) for name, calls in record.calls.items()} == {"": 1}


VISION = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 4}
RECORDED = {
    "Donut": (tf.DonutSwinModel, tf.DonutSwinConfig(**VISION)),
    "Swin 2": (tf.Swinv2Model, tf.Swinv2Config(**VISION)),
    "XLNet": (tf.XLNetModel, tf.XLNetConfig(vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=64)),
    "ConvBERT": (tf.ConvBertModel, tf.ConvBertConfig(**SIZES, embedding_size=32)),
    "I-BERT": (tf.IBertModel, tf.IBertConfig(**SIZES)),
    "DeBERTa": (tf.DebertaV2Model, tf.DebertaV2Config(**SIZES)),
    "CPM-Ant": (tf.CpmAntModel, tf.CpmAntConfig(**SIZES, dim_head=8, dim_ff=64, num_layers=2, prompt_length=2)),
}


def inputs_of(model):
    if model.main_input_name == "pixel_values":
        return {"pixel_values": models.numbers(2, 3, 32, 32)}
    return {"input_ids": IDS}


@pytest.mark.parametrize("name", RECORDED)
def test_softmaxes_of_classes_that_return_no_map(name):
    model = build(*RECORDED[name])
    with torch.no_grad(), Softmaxes() as eager:
        plain = model(**inputs_of(model))[0]
    with torch.no_grad(), record_attention_entropy(model) as record:
        assert torch.equal(model(**inputs_of(model))[0], plain)
    close(record.entropies.values(), eager.entropies(), atol=1e-4)


SWIN = VISION | {"image_size": 32, "patch_size": 2, "depths": [2]}
CLAP = {"spec_size": 64, "num_mel_bins": 16, "patch_size": 4, "patch_embeds_hidden_size": 16, "depths": [2]}
CLAP |= {"num_attention_heads": [2], "window_size": 4, "hidden_size": 16}
PIXELS = {"pixel_values": models.numbers(2, 3, 32, 32)}
SHIFTED = {
    "Donut": (tf.DonutSwinModel, tf.DonutSwinConfig(**SWIN), PIXELS),
    "MaskFormer": (tf.MaskFormerSwinModel, tf.MaskFormerSwinConfig(**SWIN), PIXELS),
    "CLAP": (tf.ClapAudioModel, tf.ClapAudioConfig(**CLAP), {"input_features": models.numbers(2, 1, 64, 16)}),
}  # fmt: skip


@pytest.mark.parametrize("name", SHIFTED)
def test_shifted_windows_hide_keys(name):
    cls, config, inputs = SHIFTED[name]
    model = build(cls, config)
    with torch.no_grad(), Softmaxes() as eager, record_attention_entropy(model) as record:
        model(**inputs)
    for support, logits in zip(record.support.values(), eager.logits, strict=True):
        visible = (logits > logits.amax(-1, keepdim=True) - 50).any(1)  # Swin hides with -100
        assert torch.equal(support[:, 0], visible.sum(-1))
    whole, shifted = record.support.values()
    assert whole.unique().tolist() == [16]
    assert shifted.unique().tolist() == [4, 8, 16]


def test_mixing_maps_of_no_attention_are_left_out():
    """DeepSeek V4's streams are mixed by a map [batch, queries, streams, streams], whose rows add up to 1."""

    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            return x, torch.full((2, 4, 3, 3), 1 / 3)

    Mixing.__module__ = "transformers.models.of_mine"
    model = Mixing()
    with pytest.raises(AttentionError, match="No attention"), record_attention_entropy(model):
        model(torch.ones(1))


def test_attention_without_heads_is_one_head():
    """The blocks of picture tokenizers attend over all pixels, with convolutions for projections."""
    torch.manual_seed(0)
    model = nn.Sequential(ChameleonVQVAEEncoderAttnBlock(32)).eval()
    pixels = models.numbers(3, 32, 4, 4)
    with torch.no_grad(), record_attention_entropy(model) as record:
        model(pixels)
        block = model[0]
        x = block.norm(pixels)
        q, k = block.q(x).flatten(2).double(), block.k(x).flatten(2).double()
    expected = torch.special.entr((q.mT @ k / 32**0.5).softmax(-1)).sum(-1)
    close([record.entropies["0"]], [expected[:, None]])
    assert record.support["0"].unique().tolist() == [16]
