"""Shared ground of the tests: both model families behind one face, a small corpus, and no network."""

import gc
import inspect
import os
import subprocess
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf_lnfree-tests-")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:  # several at once: one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import transformers

import hf_lnfree

HEADS = ("CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}


def cache_field(model: transformers.PreTrainedModel) -> str:
    """What a forward pass calls the cache that it takes and returns; transformers 5.24 renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def run_in_two(*arguments: str) -> subprocess.CompletedProcess:
    """`python *arguments` by torchrun in two processes of one thread each, from the root of the repository."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, env=environment)


def pytest_collection_finish():
    """Every run of the Trainer collects garbage: what was imported by then is not looked through again."""
    gc.freeze()


ACCELERATE = Path(__file__).parents[1] / "examples" / "accelerate"


def launch(config: str, *arguments: str, env: Mapping[str, str] = MappingProxyType({})) -> subprocess.Popen:
    """Start `accelerate launch` with a file of the examples from the root of the repository, as a user does."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ACCELERATE / config),
        *arguments,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen(command, cwd=ACCELERATE.parents[1], stderr=subprocess.PIPE, text=True, env=environment)


@dataclass(frozen=True)
class Family:
    """A model family at a tiny size, and its stock twin in transformers."""

    name: str
    prefix: str
    stock_prefix: str
    activation_field: str
    tiny: dict[str, Any]
    blocks: str
    projections: tuple[str, str]
    range_field: str = "initializer_range"

    @property
    def norm(self) -> str:
        """The name under which a model of ours is the stock one."""
        return getattr(hf_lnfree, f"{self.prefix}Config").stock_norm

    @property
    def heads(self) -> list[str]:
        return [head for head in HEADS if hasattr(hf_lnfree, f"{self.prefix}For{head}")]

    @property
    def gated(self) -> bool:
        return self.name in ("llama", "qwen3", "gated_t5")

    def is_norm(self, name: str, module: torch.nn.Module) -> bool:
        """Of a block or behind the last one; Qwen3 has others, of queries and keys."""
        return type(module).__name__.endswith("Norm") and not name.endswith(("q_norm", "k_norm"))

    @property
    def stack(self) -> hf_lnfree.StackSites:
        (stack,) = getattr(hf_lnfree, f"{self.prefix}Model").stacks
        return stack

    def activation(self, block: torch.nn.Module) -> torch.nn.Module:
        return block.get_submodule(self.stack.mlp.activation)

    def spelt(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Fields under the family's own names, and with biases where some are to be frozen."""
        names = {"activation": self.activation_field, "initializer_range": self.range_field}
        fields = {names.get(name, name): value for name, value in fields.items()}
        if self.name == "opt" and "hidden_size" in fields:
            fields = {"word_embed_proj_dim": fields["hidden_size"], **fields}
        biased = self.gated and fields.get("linear_bias") == "query_key"
        return ({"attention_bias": True} if biased else {}) | fields

    def config(self, **fields: Any):
        fields = self.spelt(fields)
        return getattr(hf_lnfree, f"{self.prefix}Config")(**{**self.tiny, **fields})

    def stock_config(self, **fields: Any):
        fields = self.spelt(fields)
        return getattr(transformers, f"{self.stock_prefix}Config")(**{**self.tiny, **fields})

    def head(self, head: str) -> type:
        return getattr(hf_lnfree, f"{self.prefix}For{head}")

    def stock_head(self, head: str) -> type:
        lm = "LMHeadModel" if self.name == "gpt2" else "ForCausalLM"
        return getattr(transformers, self.stock_prefix + (lm if head == "CausalLM" else f"For{head}"))

    def stock_class(self, end: str) -> type:
        return getattr(transformers, self.stock_prefix + end)

    def model(self, seed: int = 0, head: str = "CausalLM", **fields: Any):
        """A model whose attention is not uniform: weights are drawn wider than a real initialisation."""
        torch.manual_seed(seed)
        return self.head(head)(self.config(**{"initializer_range": 0.2, **fields})).eval()

    def stock_model(self, seed: int = 0, head: str = "CausalLM", **fields: Any):
        torch.manual_seed(seed)
        return self.stock_head(head)(self.stock_config(**{"initializer_range": 0.2, **fields})).eval()

    def block_list(self, model):
        return model.base_model.get_submodule(self.blocks)


TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
GPT2 = Family(
    name="gpt2",
    prefix="LNFreeGPT2",
    stock_prefix="GPT2",
    activation_field="activation_function",
    tiny={
        **TOKENS,
        **{"vocab_size": 99, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
        **{"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "activation_function": "gelu_new"},
    },
    blocks="h",
    projections=("attn.c_proj", "mlp.c_proj"),
)
GPT_NEOX = Family(
    name="gpt_neox",
    prefix="LNFreeGPTNeoX",
    stock_prefix="GPTNeoX",
    activation_field="hidden_act",
    tiny={**TOKENS, **SIZES, "intermediate_size": 128, "max_position_embeddings": 64},
    blocks="layers",
    projections=("attention.dense", "mlp.dense_4h_to_h"),
)
LLAMA = Family(
    name="llama",
    prefix="LNFreeLlama",
    stock_prefix="Llama",
    activation_field="hidden_act",
    tiny={**TOKENS, **SIZES, "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64},
    blocks="layers",
    projections=("self_attn.o_proj", "mlp.down_proj"),
)
QWEN3 = Family(
    name="qwen3",
    prefix="LNFreeQwen3",
    stock_prefix="Qwen3",
    activation_field="hidden_act",
    tiny={**LLAMA.tiny, "head_dim": 16},
    blocks="layers",
    projections=("self_attn.o_proj", "mlp.down_proj"),
)
OPT = Family(
    name="opt",
    prefix="LNFreeOPT",
    stock_prefix="OPT",
    activation_field="activation_function",
    tiny={**TOKENS, **SIZES, "word_embed_proj_dim": 32, "ffn_dim": 128, "max_position_embeddings": 64, "dropout": 0.0},
    blocks="decoder.layers",
    projections=("self_attn.out_proj", "fc2"),
    range_field="init_std",
)
VIT = Family(
    name="vit",
    prefix="LNFreeViT",
    stock_prefix="ViT",
    activation_field="hidden_act",
    tiny={
        **{"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128},
        **{"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 2},
    },
    blocks="layers",
    projections=("attention.o_proj", "mlp.fc2"),
)
BERT = Family(
    name="bert",
    prefix="LNFreeBert",
    stock_prefix="Bert",
    activation_field="hidden_act",
    tiny={**SIZES, "pad_token_id": 2, "intermediate_size": 128, "max_position_embeddings": 64},
    blocks="encoder.layer",
    projections=("attention.output.dense", "output.dense"),
)
T5 = Family(
    name="t5",
    prefix="LNFreeT5",
    stock_prefix="T5",
    activation_field="dense_act_fn",
    tiny={
        **{"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 2},
        **{"num_decoder_layers": 3, "dropout_rate": 0.0, "pad_token_id": 0, "decoder_start_token_id": 0},
    },
    blocks="decoder.block",
    projections=("layer.0.SelfAttention.o", "layer.2.DenseReluDense.wo"),
    range_field="initializer_factor",
)
GATED_T5 = replace(T5, name="gated_t5", tiny={**T5.tiny, "feed_forward_proj": "gated-gelu"})
WHISPER = Family(
    name="whisper",
    prefix="LNFreeWhisper",
    stock_prefix="Whisper",
    activation_field="activation_function",
    tiny={
        **{"vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4},
        **{"decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 48, "num_mel_bins": 8},
        **{"max_source_positions": 8, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1},
        **{"eos_token_id": 1, "decoder_start_token_id": 2, "begin_suppress_tokens": None, "init_std": 0.2},
    },
    blocks="decoder.layers",
    projections=("self_attn.out_proj", "fc2"),
    range_field="init_std",
)
EVERY = (GPT2, GPT_NEOX, LLAMA, QWEN3, OPT)


@pytest.fixture(params=[GPT2, GPT_NEOX], ids=lambda f: f.name)
def family(request) -> Family:
    return request.param


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Forty small Python files."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        lines = [f"def function_{i}_{j}(first, second):\n    return first * {j} + second - {i}\n" for j in range(12)]
        (folder / f"module_{i:02d}.py").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))
