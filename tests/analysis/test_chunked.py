"""Attentions that compute their softmax in pieces are recorded, each query in its place, and padding does not count."""

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch.overrides import TorchFunctionMode

from hf_lnfree.analysis import AttentionEntropyAnalyzer
from hf_lnfree.analysis.capture import record_attention_entropy
from tests.attention import models

MODEL = {**models.SIZES, "intermediate_size": 64, "initializer_range": 0.3, "pad_token_id": 2}
SIDES = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4, "init_std": 0.3}
SIDES |= {
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 99,
    "pad_token_id": 2,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 4, "vocab_size": 99}
T5 |= {"pad_token_id": 2, "decoder_start_token_id": 0, "local_radius": 3, "global_block_size": 4}
BIRD = {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 2}
HIERA = {"image_size": [32, 32], "patch_size": [3, 3], "patch_stride": [2, 2], "patch_padding": [1, 1], "embed_dim": 16}
HIERA |= {"depths": [1, 2, 1], "num_heads": [1, 2, 4], "query_stride": [2, 2], "num_query_pool": 2}
REFORMER = {"vocab_size": 99, "hidden_size": 32, "num_attention_heads": 2, "attention_head_size": 16, "num_buckets": 4}
REFORMER |= {"feed_forward_size": 32, "axial_pos_shape": [4, 16], "axial_pos_embds_dim": [16, 16], "pad_token_id": 2}
REFORMER |= {"local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "num_hashes": 2, "initializer_range": 0.3}
PROPHET = {"hidden_size": 32, "num_encoder_layers": 1, "num_decoder_layers": 2, "num_encoder_attention_heads": 4}
PROPHET |= {
    "vocab_size": 99,
    "num_decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "ngram": 2,
}

IDS = torch.randint(5, 90, (2, 64), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(64) < torch.tensor([[64], [41]])).long()


class Logits(TorchFunctionMode):
    """All logits [...] of softmaxes over the last of at least three dimensions, in the order of the calls."""

    def __init__(self):
        super().__init__()
        self.logits = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        dim = (kwargs or {}).get("dim", args[1] if len(args) > 1 else None)
        softmax = function in (F.softmax, torch.softmax, torch.Tensor.softmax, torch.logsumexp)
        if softmax and args[0].dim() > 2 and dim in (-1, args[0].dim() - 1):
            self.logits.append(args[0].double())
        return function(*args, **(kwargs or {}))


def entropy(logits):
    logs = logits.log_softmax(-1).clamp_min(-1e4)
    return -(logs.exp() * logs).sum(-1)


def build(cls, config):
    torch.manual_seed(0)
    return cls._from_config(config, attn_implementation="eager").eval()


def recorded(model, **inputs):
    with torch.no_grad():
        torch.manual_seed(0)  # BigBird draws its blocks
        plain = model(**inputs)[0]
        torch.manual_seed(0)
        with Logits() as eager, record_attention_entropy(model) as record:
            assert torch.equal(model(**inputs)[0], plain)
    return record.calls, eager.logits


def close(found, expected):
    """Of tokens; Reformer's rows of padding add up to more than 1."""
    assert found.entropy.shape == expected.shape
    tokens = found.keys[:, None] if found.keys is not None and found.keys.shape[1] == expected.shape[2] else True
    counted = (found.support > 0) & tokens
    assert counted.any(-1).all()
    ours, theirs = (x.where(counted, 0.0) for x in (found.entropy.double(), expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


ENCODERS = {
    "Longformer": (tf.LongformerModel, tf.LongformerConfig(**MODEL, attention_window=8)),
    "LED": (tf.LEDModel, tf.LEDConfig(**SIDES, attention_window=8)),
    "BigBird": (tf.BigBirdModel, tf.BigBirdConfig(**MODEL, **BIRD)),
    "BigBird Pegasus": (tf.BigBirdPegasusModel, tf.BigBirdPegasusConfig(**SIDES, **BIRD)),
    "LongT5": (tf.LongT5Model, tf.LongT5Config(**T5)),
    "LongT5 global": (tf.LongT5Model, tf.LongT5Config(**T5, encoder_attention_type="transient-global")),
    "Pegasus X": (tf.PegasusXModel, tf.PegasusXConfig(**SIDES, block_size=4, num_global_tokens=3)),
    "Hiera": (tf.HieraModel, tf.HieraConfig(**HIERA, masked_unit_size=[4, 4], initializer_range=0.3)),
    "Reformer": (tf.ReformerModel, tf.ReformerConfig(**REFORMER, attn_layers=["local", "local"])),
    "LiLT": (tf.LiltModel, tf.LiltConfig(**{**MODEL, "hidden_size": 48}, max_position_embeddings=80)),
}  # fmt: skip
AXES = {  # of every softmax of an encoder's layer, to [B, H, queries, K]
    "Longformer": [lambda x: x.transpose(1, 2)],
    "LED": [lambda x: x.transpose(1, 2)],
    "LongT5": [lambda x: x.transpose(1, 2).flatten(2, 3)],
    "LongT5 global": [lambda x: x.transpose(1, 2).flatten(2, 3)],
    "Pegasus X": [lambda x: x, lambda x: x.flatten(2, 3)],
    "Hiera": [lambda x: x.flatten(2, 3)],
    "Reformer": [lambda x: x.flatten(2, 3)],
    "LiLT": [lambda x: x, lambda x: x],
}


def inputs_of(model):
    if model.main_input_name == "pixel_values":
        return {"pixel_values": models.numbers(2, 3, 32, 32)}
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    if isinstance(model, tf.LiltModel):
        inputs["bbox"] = torch.randint(0, 90, (2, 64, 4), generator=torch.Generator().manual_seed(1)).sort().values
    return inputs | ({"decoder_input_ids": IDS[:, :6]} if model.config.is_encoder_decoder else {})


def of_encoder(calls):
    return [rows for name, each in calls.items() if not name.startswith("decoder") for rows in each]


@pytest.mark.parametrize("name", AXES)
def test_every_query_stands_in_its_place(name):
    model = build(*ENCODERS[name])
    calls, logits = recorded(model, **inputs_of(model))
    found = of_encoder(calls)
    axes = AXES[name] * (len(found) // len(AXES[name]))
    for rows, each, arranged in zip(found, logits, axes, strict=False):
        close(rows, entropy(arranged(each)))


@pytest.mark.parametrize("name", ["BigBird", "BigBird Pegasus"])
def test_blocks_are_one_attention(name):
    model = build(*ENCODERS[name])
    calls, logits = recorded(model, **inputs_of(model))
    for layer, rows in enumerate(of_encoder(calls)):
        parts = [entropy(x).flatten(2) for x in logits[5 * layer : 5 * layer + 5]]
        close(rows, torch.cat(parts, 2))
        assert rows.entropy.shape == (2, 4, 64)
        assert rows.support[0].unique().tolist() == [24, 28, 64]  # 4 or 5 blocks beside 2 random ones, or all
        assert rows.support[1, :, :41].unique().numel() > 2


@pytest.mark.parametrize("name", sorted(set(ENCODERS) - {"Hiera"}))
def test_padding_does_not_count(name):
    model = build(*ENCODERS[name])
    report = AttentionEntropyAnalyzer(model).run([inputs_of(model)])
    counts = {
        int(count) for module, count in zip(report.modules, report.rows[:, 0], strict=True)
        if not module.startswith("decoder") and not (name == "Pegasus X" and module.endswith("#0"))
    }  # fmt: skip
    assert counts == {64 + 41}
    assert not report.masked_rows.any()


def test_global_tokens_of_longformer_have_the_rows_that_they_use():
    model = build(*ENCODERS["Longformer"])
    chosen = torch.zeros(2, 64, dtype=torch.long)
    chosen[0, [0, 5]] = chosen[1, 7] = 1
    calls, logits = recorded(model, input_ids=IDS, attention_mask=MASK, global_attention_mask=chosen)
    window, whole = entropy(logits[0]).transpose(1, 2), entropy(logits[1]).unflatten(0, (2, 4))
    window[0, :, 0], window[0, :, 5], window[1, :, 7] = whole[0, :, 0], whole[0, :, 1], whole[1, :, 0]
    (rows,) = calls["encoder.layer.0.attention.self"]
    close(rows, window)
    assert rows.support[0, :, 5].tolist() == [64] * 4
    assert rows.support[1, :, 7].tolist() == [41] * 4


def test_queries_of_reformer_stand_in_order_once_for_each_round_of_hashes(monkeypatch):
    model = build(tf.ReformerModel, tf.ReformerConfig(**REFORMER, attn_layers=["lsh"]))
    attention, orders = model.encoder.layers[0].attention.self_attention, []
    attend = type(attention)._attend

    def attending(self, *args, **kwargs):
        orders.append(kwargs["sorted_bucket_idx_per_hash"])
        return attend(self, *args, **kwargs)

    monkeypatch.setattr(type(attention), "_attend", attending)
    with torch.no_grad():
        model.config.hash_seed = attention.hash_seed = 1
        with Logits() as eager, record_attention_entropy(model) as record:
            model(input_ids=IDS, attention_mask=MASK)
    rounds = record.calls["encoder.layers.0.attention.self_attention"]
    assert len(rounds) == 2
    sorted_entropy = entropy(eager.logits[0]).flatten(2).unflatten(2, (2, 64))
    for number, rows in enumerate(rounds):
        order = orders[0].unflatten(2, (2, 64))[:, :, number]
        close(rows, torch.empty(2, 2, 64, dtype=torch.float64).scatter(2, order, sorted_entropy[:, :, number]))
    # 16 keys of two chunks, without the own one and without padding
    assert max(rows.support.max() for rows in rounds) == 15
    report = AttentionEntropyAnalyzer(model).run([{"input_ids": IDS, "attention_mask": MASK}])
    assert report.rows.tolist() == [[64 + 41] * 2] * 2


def test_streams_of_prophetnet_are_calls_of_their_own():
    model = build(tf.ProphetNetModel, tf.ProphetNetConfig(**PROPHET, init_std=0.3))
    with torch.no_grad(), Logits() as eager, record_attention_entropy(model) as record:
        model(input_ids=IDS[:, :16], decoder_input_ids=IDS[:, :6], use_cache=False)
    for layer in range(2):
        main, *streams = record.calls[f"decoder.layers.{layer}.self_attn"]
        found = [x for x in eager.logits if x.shape[-2] == 6 and x.shape[-1] in (6, 12)]
        of_main, of_streams = found[2 * layer : 2 * layer + 2]
        close(main, entropy(of_main))
        assert main.support[0, 0].tolist() == [1, 2, 3, 4, 5, 6]
        for rows, logits in zip(streams, of_streams.unbind(1), strict=True):
            close(rows, entropy(logits))


NAMED = {
    "LED": "A softmax ran in encoder.layers.0.* .LEDEncoderSelfAttention., encoder.layers.1",
    "LongT5": "ran that method='fused' cannot record: .* .LongT5LocalAttention.",
    "Pegasus X": "ran that method='fused' cannot record: .* .PegasusXGlobalLocalAttention.",
    "Hiera": "No attention of HieraModel .* A softmax ran in encoder.* .HieraMaskUnitAttention.",
    "Reformer": "No attention of ReformerModel .* A softmax ran in encoder.* .LocalSelfAttention.",
}


@pytest.mark.parametrize("name", NAMED)
def test_softmaxes_cut_in_pieces_are_named_where_queries_and_keys_are_asked_for(name):
    model = build(*ENCODERS[name])
    with torch.no_grad(), pytest.raises(ValueError, match=NAMED[name]), record_attention_entropy(model, "fused"):
        model(**inputs_of(model))
