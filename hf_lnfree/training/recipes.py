"""The published settings of arXiv 2410.09637 as data: the rows and the two models.

Nothing heavy is imported before a configuration is made: `hf-lnfree train --help` names the rows.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from ..errors import SettingsError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Row -> study fields; "activation" stands for the family's own field. SM softmax, LN LayerNorm, G GELU, R ReLU.
PAPER_ROWS: dict[str, dict[str, Any]] = {
    "SM+LN+G": {"norm": "layernorm", "activation": "gelu"},
    "SM+LN+R": {"norm": "layernorm", "activation": "relu"},
    "SM+G": {"norm": "none", "activation": "gelu"},
    "SM+R": {"norm": "none", "activation": "relu"},
    "SM+LeakyR": {"norm": "none", "activation": "leaky_relu"},
    "SM+LearnableR-layer": {"norm": "none", "activation": "learnable_leaky_relu", "slope_scope": "layer"},
    "SM+LearnableR-global": {"norm": "none", "activation": "learnable_leaky_relu", "slope_scope": "global"},
}
MAIN_ROWS = ("SM+LN+G", "SM+LN+R", "SM+G", "SM+R")

# The tokenizer huggingface-course/code-search-net-tokenizer has 50,000 entries and <|endoftext|> at 0.
_TOKENS = {"vocab_size": 50_000, "bos_token_id": 0, "eos_token_id": 0}

# transformers takes them for every configuration, whether or not it is a field of the class.
SPECIAL_TOKENS = {"bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"}

# Family -> the class of its configuration in `hf_lnfree.models`, and the fields that are not those of its defaults: the
# paper's two models, and of other families a published model of about their size.
PAPER_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (  # GPT-2 small as the published code builds it
        "LNFreeGPT2Config",
        {
            "n_positions": 1024,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.1,
            "linear_bias": "query_key",
            "residual_init": "plain",
        },
    ),
    "gpt_neox": (  # Pythia-70M; no code was published for it, so biases and initialisation are the stock ones
        "LNFreeGPTNeoXConfig",
        {
            "max_position_embeddings": 2048,
            "hidden_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "intermediate_size": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        },
    ),
    "llama": (  # SmolLM-135M
        "LNFreeLlamaConfig",
        {
            "max_position_embeddings": 2048,
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "intermediate_size": 1536,
            "tie_word_embeddings": True,
        },
    ),
    "opt": ("LNFreeOPTConfig", {"max_position_embeddings": 2048, "pad_token_id": None}),  # OPT-125M
    "qwen3": (  # Qwen3-0.6B
        "LNFreeQwen3Config",
        {
            "max_position_embeddings": 40960,
            "hidden_size": 1024,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 3072,
            "tie_word_embeddings": True,
        },
    ),
    "bert": ("LNFreeBertConfig", {"pad_token_id": 0}),  # BERT base
    "vit": ("LNFreeViTConfig", {}),  # ViT-B/16
    "t5": ("LNFreeT5Config", {}),  # T5 small
    "whisper": ("LNFreeWhisperConfig", {"pad_token_id": 0}),  # Whisper tiny
}
OF_FAMILIES: dict[str, tuple[str, ...]] = {
    "bert": ("masked",),
    "vit": ("image",),
    "t5": ("span", "pairs"),
    "whisper": ("speech",),
}
"""Family -> the objectives that it is trained for, the usual one first; of others it is "causal" alone."""


def objectives_of(family: str) -> tuple[str, ...]:
    """The objectives of a family, the usual one first."""
    return OF_FAMILIES.get(family, ("causal",))


def paper_config(family: str, row: str, context_length: int = 128, **overrides: Any) -> "PreTrainedConfig":
    """
    The configuration of one row of arXiv 2410.09637.

    GPT-2 small has 124.242M parameters with LayerNorm and 124.206M without; 64,512 of them are frozen zero biases.

    Args:
        family: "gpt2" (GPT-2 small) or "gpt_neox" (Pythia-70M). Beyond the paper "opt" (OPT-125M), and two that have
            RMSNorm where the rows say LN: "llama" (SmolLM-135M) and "qwen3" (Qwen3-0.6B). Encoders are "bert" (BERT
            base) and "vit" (ViT-B/16), an encoder with a decoder are "t5" (T5
            small) and "whisper" (Whisper tiny).
        row: "SM+LN+G", "SM+LN+R", "SM+G", "SM+R", "SM+LeakyR", "SM+LearnableR-layer" or "SM+LearnableR-global".
        context_length: tokens a window; positions are never fewer than the published model's.
        **overrides: any field of the configuration, for instance `n_layer=18` or `negative_slope=0.05`.

    Raises:
        SettingsError: an unknown family, row or field.
    """
    if family not in PAPER_MODELS:
        raise SettingsError(f"family={family!r} is not known. Allowed: {', '.join(map(repr, PAPER_MODELS))}.")
    if row not in PAPER_ROWS:
        raise SettingsError(f"row={row!r} is not known. Allowed: {', '.join(map(repr, PAPER_ROWS))}.")
    from huggingface_hub.errors import StrictDataclassError

    from .. import models
    from ..models.configuration_lnfree import reject_study_typos

    class_name, model = PAPER_MODELS[family]
    config_class = getattr(models, class_name)
    known = {field.name for field in dataclasses.fields(config_class)} | SPECIAL_TOKENS
    fields = {**(_TOKENS if "vocab_size" in known else {}), **model, **PAPER_ROWS[row]}
    fields[config_class.activation_field] = fields.pop("activation")
    if fields["norm"] == "layernorm":  # that is, the norm of the family
        fields["norm"] = config_class.stock_norm
    positions = config_class.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    if positions in known:
        fields[positions] = max(fields.get(positions, 0) or getattr(config_class, positions), context_length)
    # transformers drops an alias when the field itself is given, so overrides are spelt the family's way.
    spelt = {config_class.attribute_map.get(name, name): value for name, value in overrides.items()}
    if unknown := sorted(set(spelt) - known, key=str):
        reject_study_typos(dict.fromkeys(map(str, unknown)), config_class)
        raise SettingsError(f"{class_name} has no field {', '.join(map(str, unknown))}.")
    try:
        return config_class(**{**fields, **spelt})
    except StrictDataclassError as error:  # a field of the wrong type
        raise SettingsError(" ".join(str(error).split())) from error
