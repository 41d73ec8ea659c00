"""What sites say of a block is what the stock block computes: every branch of nine architectures, by hooks."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    GPTNeoXConfig,
    GPTNeoXModel,
    LlamaConfig,
    LlamaModel,
    OPTConfig,
    OPTModel,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5Model,
    WhisperConfig,
    WhisperModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

from hf_lnfree import (
    LNFreeBertModel,
    LNFreeGPT2ForCausalLM,
    LNFreeGPT2Model,
    LNFreeGPTNeoXModel,
    LNFreeLlamaModel,
    LNFreeOPTModel,
    LNFreeQwen3Model,
    LNFreeT5Model,
    LNFreeWhisperModel,
)
from hf_lnfree.conversion import to_stock
from hf_lnfree.models import MLPBranch, StackSites
from hf_lnfree.models.errors import ConfigurationError
from hf_lnfree.models.modeling_lnfree_t5 import gated
from hf_lnfree.models.softcap import SoftcapConfig

from ..conftest import GPT2

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
MLP = {"intermediate_size": 64}


LNFREE = {
    "Llama": LNFreeLlamaModel,
    "BERT": LNFreeBertModel,
    "OPT": LNFreeOPTModel,
    "T5": LNFreeT5Model,
    "T5 1.1": LNFreeT5Model,
    "Whisper": LNFreeWhisperModel,
}
T5_SIZES = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 3}
WHISPER_SIZES = {
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 2, "num_mel_bins": 8, "max_source_positions": 5},
}
FIELDS = {
    "GPT-2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "add_cross_attention": True},
    "GPT-NeoX": {**SIZES, **MLP},
    "Llama": {**SIZES, **MLP, "num_key_value_heads": 4},
    "Qwen3": {**SIZES, **MLP, "num_key_value_heads": 4, "head_dim": 8},
    "BERT": {**SIZES, **MLP},
    "OPT": {**SIZES, "word_embed_proj_dim": 32, "ffn_dim": 64},
    "T5": {**T5_SIZES, "vocab_size": 99, "decoder_start_token_id": 0},
    "T5 1.1": {**T5_SIZES, "vocab_size": 99, "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu"},
    "Whisper": {**WHISPER_SIZES, "vocab_size": 99, "decoder_start_token_id": 0, "pad_token_id": 2},
}
STOCK = {
    "GPT-2": (GPT2Model, GPT2Config, LNFreeGPT2Model.stacks),
    "GPT-NeoX": (GPTNeoXModel, GPTNeoXConfig, LNFreeGPTNeoXModel.stacks),
    "Llama": (LlamaModel, LlamaConfig, LNFreeLlamaModel.stacks),
    "Qwen3": (Qwen3Model, Qwen3Config, LNFreeQwen3Model.stacks),
    "BERT": (BertModel, BertConfig, LNFreeBertModel.stacks),
    "OPT": (OPTModel, OPTConfig, LNFreeOPTModel.stacks),
    "T5": (T5Model, T5Config, LNFreeT5Model.stacks),
    "T5 1.1": (T5Model, T5Config, tuple(map(gated, LNFreeT5Model.stacks))),
    "Whisper": (WhisperModel, WhisperConfig, LNFreeWhisperModel.stacks),
}
BRANCHES = [
    (name, number, branch)
    for name, (_, _, stacks) in STOCK.items()
    for number, stack in enumerate(stacks)
    for branch in stack.named_branches
]
VALUES: dict[nn.Module, torch.Tensor] = {}


def spying(module, query, key, value, attention_mask, **kwargs):
    VALUES[module] = value
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register("spying", spying)
AttentionMaskInterface.register("spying", sdpa_mask)


@dataclass
class Watched:
    """Inputs and outputs of every module in one forward pass of a stock model."""

    model: nn.Module
    stacks: tuple[StackSites, ...]
    given: dict
    made: dict

    @classmethod
    def run(cls, name):
        model_class, config_class, stacks = STOCK[name]
        torch.manual_seed(0)
        model = model_class(config_class(**FIELDS[name], attn_implementation="spying")).double().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        given, made = {}, {}
        for module in model.modules():
            # transformers changes some streams in place.
            module.register_forward_pre_hook(lambda m, args: given.update({m: args[0].clone()} if args else {}))
            module.register_forward_hook(
                lambda m, args, out: made.update({m: (out[0] if isinstance(out, tuple) else out)})
            )
        inputs = {"input_ids": torch.randint(3, 99, (2, 6))}
        if name == "GPT-2":
            inputs["encoder_hidden_states"] = torch.randn(2, 5, 32, dtype=torch.float64)
        if len(stacks) == 2:
            inputs["decoder_input_ids"] = torch.randint(3, 99, (2, 4))
        if name == "Whisper":
            inputs["input_features"] = torch.randn(2, 8, 10, dtype=torch.float64)
            del inputs["input_ids"]
        with torch.no_grad():
            model(**inputs)
        return cls(model, stacks, given, made)


@pytest.fixture(scope="module")
def watched():
    cache = {}
    return lambda name: cache.setdefault(name, Watched.run(name))


def close(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("name", "number", "kind"), BRANCHES, ids=lambda x: str(x))
def test_a_branch_is_what_the_block_computes(watched, name, number, kind):
    seen = watched(name)
    stack = seen.stacks[number]
    for block in stack.block_list(seen.model):
        branches = stack.branches(block)
        branch = branches[kind]
        norm, readers = branch.norm_module(block), branch.reader_modules(block)
        stream = seen.given[block]
        names = list(branches)
        before = [branches[other] for other in names[: names.index(kind)]]
        parallel = name == "GPT-NeoX"  # reads the stream as it enters the block
        if branch.post_norm:
            stream = seen.made[before[-1].norm_module(block)] if before else stream
            close(seen.given[norm], stream + seen.made[branch.writer_module(block)])
            read = stream
        else:
            added = [seen.made[other.writer_module(block)] for other in before]
            wanted = stream if parallel else sum((part.view_as(stream) for part in added), stream)
            close(seen.given[norm].view_as(wanted), wanted)
            read = seen.made[norm]
        for reader in readers:
            close(seen.given[reader].view_as(read), read)
        if branch.dropout is not None:
            dropout = block.get_submodule(branch.dropout)
            assert isinstance(dropout, nn.Dropout)
            close(seen.given[dropout], seen.made[branch.writer_module(block)])
        if isinstance(branch, MLPBranch):
            first, *others = (seen.made[reader] for reader in readers)
            activation = block.get_submodule(branch.activation)
            close(seen.given[activation], first)
            inner = seen.made[activation]
            for other in others:
                inner = inner * other
            close(seen.given[branch.writer_module(block)], inner)
            assert branch.width(block) == inner.shape[-1] == (128 if name == "GPT-2" else 64)
        else:
            check_attention(seen, block, branch)


def check_attention(seen, block, branch):
    """Values as the attention function is given them, [B, H, K, d], come out of the projections that are declared."""
    value = VALUES[block.get_submodule(branch.module)]
    heads, size = value.shape[1], value.shape[-1]
    if branch.fused:
        made = seen.made[block.get_submodule(branch.query_key_value)]
        rows = made.unflatten(-1, (branch.groups(heads), 3, heads // branch.groups(heads), size))
        close(rows[..., 2, :, :].flatten(2, 3).transpose(1, 2), value)
    else:
        source = branch.encoder_readers or branch.readers
        made = seen.made[block.get_submodule(source[-1])]
        close(made[..., -heads * size :].unflatten(-1, (heads, size)).transpose(1, 2), value)
    for path in branch.encoder_readers:
        assert seen.given[block.get_submodule(path)].shape[1] == value.shape[2]


@pytest.mark.parametrize(("name", "number"), sorted({(name, number) for name, number, _ in BRANCHES}))
def test_branches_are_all_that_a_block_adds(watched, name, number):
    """Stream before and after a block differ by what its writers made; the final norm reads what the last one left."""
    seen = watched(name)
    stack = seen.stacks[number]
    blocks = stack.block_list(seen.model)
    for block in blocks:
        writers = [branch.writer_module(block) for branch in stack.branches(block).values()]
        if stack.attention.post_norm:
            close(seen.made[block], seen.made[stack.mlp.norm_module(block)])
        else:
            added = sum(seen.made[writer].view_as(seen.given[block]) for writer in writers)
            close(seen.made[block], seen.given[block] + added)
        linear = {m for m in block.modules() if isinstance(m, (nn.Linear, Conv1D))}
        assert linear == {m for branch in stack.branches(block).values() for m in branch.projections(block).values()}
    if stack.final_norm is not None:
        close(seen.given[seen.model.get_submodule(stack.final_norm)], seen.made[blocks[-1]])


@pytest.mark.parametrize("name", LNFREE)
def test_every_stack_is_rewired(name):
    """Norms of post-norm blocks, of both stacks of an encoder-decoder, of gated MLPs: gone; activations by layer."""
    model_class = LNFREE[name]
    layers = sum(FIELDS[name].get(field, 0) for field in model_class.config_class.depth_fields)
    activations = ["relu" if layer % 2 else "gelu_relu" for layer in range(layers)]
    config = model_class.config_class(
        **FIELDS[name], norm="none", final_norm="none", layer_activations=activations, ffn_scale=True
    )
    model = model_class(config)
    blocks = [(stack, block) for stack in model.stacks for block in stack.block_list(model)]
    assert len(blocks) == layers
    for (stack, block), wanted in zip(blocks, activations, strict=True):
        assert all(isinstance(branch.norm_module(block), nn.Identity) for branch in stack.branches(block).values())
        found = block.get_submodule(stack.mlp.activation).activation
        assert type(found).__name__ == {"relu": "ReLU", "gelu_relu": "GELUReLU"}[wanted]
        assert not [n for n, m in block.named_modules() if "norm" in n.lower() and not isinstance(m, nn.Identity)]


@pytest.mark.parametrize("name", ["Llama", "OPT", "Whisper"])
def test_residual_init_reaches_every_writer(name):
    for scheme in ("plain", "scaled"):
        model = LNFREE[name](LNFREE[name].config_class(**FIELDS[name], residual_init=scheme))
        for stack in model.stacks:
            blocks = stack.block_list(model)
            expected = 0.02 / (2 * len(blocks)) ** 0.5 if scheme == "scaled" else 0.02
            writers = [b.writer_module(block) for block in blocks for b in stack.branches(block).values()]
            stds = torch.stack([writer.weight.std() for writer in writers])
            torch.testing.assert_close(stds, torch.full_like(stds, expected), rtol=0.15, atol=0)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("Llama", {"hidden_act": "identity_fused"}, r"hidden_act='identity_fused'.*the mlp of layers\.0 is gated"),
        ("Llama", {"layer_activations": ["relu", "identity_fused"]}, "layer_activations=.*is gated"),
        ("Llama", {"embedding_scale": True}, r"embedding_scale=True.*no module between the embeddings and layers"),
        ("BERT", {"final_norm": "layernorm"}, r"final_norm='layernorm'.*nothing stands after encoder\.layer"),
    ],
)
def test_what_blocks_cannot_honour_is_refused_by_name(name, fields, message):
    config_class = LNFREE[name].config_class
    with pytest.raises(ConfigurationError, match=message):
        LNFREE[name](config_class(**FIELDS[name], **fields))


@pytest.mark.parametrize("field", ["query_key_norm", "attention_temperature"])
def test_cross_attention_has_no_control_of_queries_and_keys(field):
    with pytest.raises(
        ConfigurationError, match=f"{field}=True.*cross-attention of h.0 reads its keys from the encoder"
    ):
        GPT2.model(add_cross_attention=True, **{field: True})


def test_cross_attention_is_capped_and_normed_like_the_rest(input_ids):
    """A cap so low that logits vanish makes attention uniform: cross-attention returns the mean of the values."""
    model = GPT2.model(
        add_cross_attention=True, attention_softcap=1e-7, weight_norm="weight", weight_norm_scope="block"
    )
    block = model.transformer.h[0]
    assert isinstance(block.crossattention.config, SoftcapConfig)
    assert hasattr(block.crossattention.c_attn, "weight_scale")
    states = torch.randn(2, 5, 32)
    seen = {}
    block.crossattention.c_attn.register_forward_hook(lambda m, args, out: seen.update(value=out[..., 32:]))
    block.crossattention.c_proj.register_forward_pre_hook(lambda m, args: seen.update(mixed=args[0]))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        model(input_ids, encoder_hidden_states=states)
    mean = seen["value"].mean(1, keepdim=True).expand_as(seen["mixed"])
    torch.testing.assert_close(seen["mixed"], mean, rtol=0, atol=1e-5)


def test_refusal_comes_before_weights_are_drawn_over():
    """A model of a head is refused as its backbone is."""
    with pytest.raises(ConfigurationError, match="linear_bias"):
        LNFreeGPT2ForCausalLM(GPT2.config(add_cross_attention=True, linear_bias="query_key"))
    assert to_stock(GPT2.model(norm="layernorm", add_cross_attention=True)).config.add_cross_attention
