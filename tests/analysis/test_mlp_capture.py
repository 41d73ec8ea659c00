"""Pre- and post-activations against those that hooks on the known layers of each family see."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_lnfree.analysis.mlp_capture import record_mlp
from tests.conftest import SIZES

MLP = {"intermediate_size": 48}
KV = {"num_key_value_heads": 2, "head_dim": 8}
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "pad_token_id": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, **TOKENS}
FAMILIES = {  # class, configuration, MLP's own name, its activation, its last layer
    "GPT2": (tf.GPT2LMHeadModel, tf.GPT2Config(**SIZES, n_inner=48, **TOKENS), "transformer.h.{}.mlp", "act", "c_proj"),
    "GPTNeoX": (tf.GPTNeoXModel, tf.GPTNeoXConfig(**SIZES, **MLP, **TOKENS), "layers.{}.mlp", "act", "dense_4h_to_h"),
    "Llama": (tf.LlamaModel, tf.LlamaConfig(**SIZES, **MLP, **KV, **TOKENS), "layers.{}.mlp", "act_fn", "down_proj"),
    "Phi3": (tf.Phi3Model, tf.Phi3Config(
        **SIZES, **MLP, num_key_value_heads=2, **TOKENS), "layers.{}.mlp", "activation_fn", "down_proj"),
    "Gemma3": (tf.Gemma3TextModel, tf.Gemma3TextConfig(
        **SIZES, **MLP, **KV, **TOKENS), "layers.{}.mlp", "act_fn", "down_proj"),
    "OPT": (tf.OPTModel, tf.OPTConfig(
        **SIZES, ffn_dim=48, word_embed_proj_dim=32, **TOKENS), "decoder.layers.{}", "activation_fn", "fc2"),
    "BERT": (tf.BertForSequenceClassification, tf.BertConfig(**SIZES, **MLP, pad_token_id=2),
             "bert.encoder.layer.{}.intermediate", "intermediate_act_fn", "../output.dense"),
}  # fmt: skip


def build(cls, config):
    torch.manual_seed(0)
    with torch.no_grad():
        model = cls(config).eval()
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(side="right"):
    ids = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    columns = slice(0, 4) if side == "left" else slice(8, 12)
    ids[1, columns], mask[1, columns] = 2, 0
    return {"input_ids": ids, "attention_mask": mask}


@contextmanager
def seen_by_hooks(model, name, activation, down):
    """The input of an activation and that of a last layer."""
    found, owner = {}, model.get_submodule(name)
    last = model.get_submodule(f"{name.rpartition('.')[0]}.{down[3:]}") if down.startswith("../") else None
    last = last or owner.get_submodule(down)
    handles = [
        module.register_forward_pre_hook(lambda m, args, key=key: found.update({key: args[0].detach()}))
        for key, module in (("pre", owner.get_submodule(activation)), ("post", last))
    ]
    yield found
    for handle in handles:
        handle.remove()


def recorded(model, **inputs):
    found = {}
    with record_mlp(model, lambda rows: found.update({rows.name: rows})) as record, torch.no_grad():
        model(**inputs)
    assert record.rows == {name: len(rows.pre) for name, rows in found.items()}
    return found


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_those_of_the_layers_without_padding(family, side):
    cls, config, name, activation, down = FAMILIES[family]
    model, inputs = build(cls, config), batch(side)
    found = recorded(model, **inputs)
    assert list(found) == [name.format(layer) for layer in range(3)]
    kept = inputs["attention_mask"].bool().flatten()
    for layer, (own, rows) in enumerate(found.items()):
        with seen_by_hooks(model, name.format(layer), activation, down) as expected, torch.no_grad():
            model(**inputs)
        for key in ("pre", "post"):
            torch.testing.assert_close(getattr(rows, key), expected[key].reshape(24, 48)[kept], rtol=0, atol=0)
        torch.testing.assert_close(rows.token, kept.nonzero().flatten(), msg=own)
        assert rows.length == 12
        assert rows.sequence.bincount().tolist() == [12, 8]
        assert rows.inputs.shape == (20, 32)


@pytest.mark.parametrize("gated", [True, False])
def test_encoder_and_decoder_have_masks_of_their_own(gated):
    model = build(tf.T5Model, tf.T5Config(**T5, feed_forward_proj="gated-gelu" if gated else "relu"))
    decoder = {"decoder_input_ids": torch.arange(3, 17).view(2, 7)}
    decoder["decoder_attention_mask"] = torch.ones(2, 7, dtype=torch.long)
    decoder["decoder_attention_mask"][0, 5:] = 0
    found = recorded(model, **batch(), **decoder)
    places = [(side, i, n) for side, n in (("encoder", 1), ("decoder", 2)) for i in range(3)]
    assert list(found) == [f"{side}.block.{i}.layer.{n}.DenseReluDense" for side, i, n in places]
    for name, rows in found.items():
        wi, wo = ("wi_0" if gated else "wi"), "wo"
        with seen_by_hooks(model, name, wi, wo) as seen, torch.no_grad():
            model(**batch(), **decoder)
        mask = decoder["decoder_attention_mask"] if name.startswith("decoder") else batch()["attention_mask"]
        kept = mask.bool().flatten()
        inputs, post = (seen[key].flatten(0, 1)[kept] for key in ("pre", "post"))
        torch.testing.assert_close(rows.inputs, inputs, rtol=0, atol=0)
        torch.testing.assert_close(rows.pre, model.get_submodule(f"{name}.{wi}")(inputs), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rows.post, post, rtol=0, atol=0)


def test_images_have_rows_for_the_class_token_and_every_patch():
    sizes = {**SIZES, **MLP, "image_size": 8, "patch_size": 4, "num_channels": 1}
    model = build(tf.ViTForImageClassification, tf.ViTConfig(**{k: v for k, v in sizes.items() if k != "vocab_size"}))
    found = recorded(model, pixel_values=torch.randn(3, 1, 8, 8))
    assert len(found) == 3
    for rows in found.values():
        assert rows.pre.shape == rows.post.shape == (15, 48)
        assert rows.sequence.tolist() == [0] * 5 + [1] * 5 + [2] * 5
        torch.testing.assert_close(rows.post, F.gelu(rows.pre), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_are_told_apart_whatever_runs_them(implementation):
    config = tf.MixtralConfig(**SIZES, **MLP, **KV, **EXPERTS)
    model = build(tf.MixtralModel, config)
    model.set_experts_implementation(implementation)
    inputs, routed = batch(), {}
    name = "layers.1.mlp.experts"
    hook = model.get_submodule(name).register_forward_pre_hook(lambda m, args: routed.update(args=args))
    found = recorded(model, **inputs)
    hook.remove()
    assert set(found) <= {f"layers.{i}.mlp.experts.{e}" for i in range(3) for e in range(4)}
    x, chosen, _ = routed["args"]
    weights, kept = model.get_submodule(name), inputs["attention_mask"].bool().flatten()
    for expert in range(4):
        here = (chosen == expert).any(-1) & kept
        gate, up = (x[here] @ weights.gate_up_proj[expert].mT).chunk(2, -1)
        rows = found[f"{name}.{expert}"]
        torch.testing.assert_close(rows.token, here.nonzero().flatten())
        torch.testing.assert_close(rows.pre, gate, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rows.post, F.silu(gate) * up, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rows.inputs, x[here], rtol=0, atol=0)
    assert sum(len(rows.pre) for rows in found.values()) == 3 * 2 * 20


def test_experts_that_do_more_than_their_weights_are_an_error():
    model = build(tf.MixtralModel, tf.MixtralConfig(**SIZES, **MLP, **KV, **EXPERTS))
    model.get_submodule("layers.0.mlp.experts").register_forward_hook(lambda m, args, y: 1.5 * y, prepend=True)
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts \(MixtralExperts\) do more than their weights say"):
        recorded(model, **batch())


def test_interleaved_experts_with_an_activation_of_their_own():
    config = tf.GptOssConfig(**SIZES, **MLP, **KV, **EXPERTS, layer_types=["full_attention"] * 3)
    model = build(tf.GptOssModel, config)
    found = recorded(model, **batch())
    assert sum(len(rows.pre) for rows in found.values()) == 3 * 2 * 20
    experts = model.get_submodule("layers.2.mlp.experts")
    for name, rows in found.items():
        if name.startswith("layers.2"):
            expert = int(name[-1])
            both = rows.inputs @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
            torch.testing.assert_close(rows.pre, both[:, ::2], rtol=1e-4, atol=1e-4)
            gate, up = both[:, ::2].clamp(max=experts.limit), both[:, 1::2].clamp(-experts.limit, experts.limit)
            post = (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
            torch.testing.assert_close(rows.post, post, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["GPT2", "Llama", "Phi3"])
def test_an_adapter_changes_what_is_recorded(family):
    cls, config, name, activation, down = FAMILIES[family]
    model = build(cls, config)
    plain = recorded(model, **batch())
    targets = {"GPT2": ["c_fc", "c_proj"], "Llama": ["gate_proj", "down_proj"], "Phi3": ["gate_up_proj", "down_proj"]}
    lora = LoraConfig(target_modules=targets[family], r=2, init_lora_weights=False, fan_in_fan_out=family == "GPT2")
    wrapped = get_peft_model(model, lora).eval()
    found = recorded(wrapped, **batch())
    assert [key.removeprefix("base_model.model.") for key in found] == list(plain)
    path = f"base_model.model.{name.format(1)}"
    with seen_by_hooks(wrapped, path, activation, down) as expected, torch.no_grad():
        wrapped(**batch())
    kept = batch()["attention_mask"].bool()
    torch.testing.assert_close(found[path].pre, expected["pre"][kept], rtol=0, atol=0)
    torch.testing.assert_close(found[path].post, expected["post"][kept], rtol=0, atol=0)
    assert not torch.allclose(found[path].pre, plain[name.format(1)].pre)
    assert found[path].inputs.shape == (20, 32)


class Block(nn.Module):
    """An MLP in the ways in which models write it."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.up, self.down = kind, nn.Linear(8, 16), nn.Linear(16, 8)
        self.inplace, self.norm = nn.ReLU(inplace=True), nn.LayerNorm(16)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        x = self.up(x)
        if self.kind == "function":
            x = F.gelu(x)
        elif self.kind == "in place":
            x = self.inplace(x)
        elif self.kind == "unknown":
            x = x * torch.erf(x)
        elif self.kind == "normed":
            x = self.norm(F.relu(x))
        return self.down(self.dropout(x))


class BlockMLP(Block):
    """Named for what it is."""


def test_functions_and_activations_in_place_are_seen():
    x = torch.randn(2, 3, 8)
    for kind, function in (("function", F.gelu), ("in place", torch.relu)):
        block = Block(kind).eval()
        rows = recorded(nn.ModuleDict({"mlp": nn.Sequential(block)})["mlp"], input=x)["0"]
        expected = block.up(x).flatten(0, 1)
        torch.testing.assert_close(rows.pre, expected)
        torch.testing.assert_close(rows.post, function(expected))


@pytest.mark.parametrize("kind", ["unknown", "normed"])
def test_what_cannot_be_seen_is_an_error(kind):
    with pytest.raises(ValueError, match="No MLP of Sequential was recorded"):
        recorded(nn.Sequential(Block(kind)).eval(), input=torch.randn(2, 3, 8))
    beside = nn.Sequential(Block("function"), BlockMLP(kind)).eval()
    with pytest.raises(ValueError, match=r"MLPs of Sequential ran that cannot be recorded: 1 \(BlockMLP\)"):
        recorded(beside, input=torch.randn(2, 3, 8))
    with pytest.raises(ValueError, match="it was not called"), record_mlp(beside, print):
        pass


def test_dropout_changes_the_rows_and_is_told():
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        recorded(nn.Sequential(BlockMLP("function")).train(), input=torch.randn(20, 3, 8))


def test_padding_that_cannot_be_told_is_an_error():
    cls, config, *_ = FAMILIES["Llama"]
    model = build(cls, config)
    mask = batch()["attention_mask"]
    with pytest.raises(ValueError, match=r"Padding of layers.0.mlp cannot be told: attention_mask is \(2, 1, 12, 12\)"):
        recorded(model, input_ids=batch()["input_ids"], attention_mask=mask[:, None, None].expand(2, 1, 12, 12).bool())


def test_a_checkpoint_is_recorded_once_and_a_cache_keeps_the_mask():
    cls, config, *_ = FAMILIES["GPT2"]
    model = build(cls, config).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    seen = []
    with record_mlp(model, lambda rows: seen.append(rows)):
        model(**batch(), labels=batch()["input_ids"], use_cache=False).loss.backward()
    assert [len(rows.pre) for rows in seen] == [20, 20, 20]
    assert not seen[0].pre.requires_grad
    model.eval()
    inputs = batch("left")
    seen.clear()
    with record_mlp(model, lambda rows: seen.append(rows)):
        model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert [len(rows.pre) for rows in seen] == [20] * 3 + [2] * 3
    assert seen[-1].name == "transformer.h.2.mlp"


def test_shared_layers_are_numbered_and_hooks_leave():
    model = build(tf.AlbertModel, tf.AlbertConfig(**SIZES, **MLP, embedding_size=16))
    found = recorded(model, **batch())
    assert [name.partition("#")[2] for name in found] == ["", "1", "2"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
