"""What a configuration refuses, and that it says what is allowed."""

import json
from dataclasses import fields, is_dataclass

import pytest
from transformers import CONFIG_MAPPING, AutoConfig

from hf_lnfree.models.configuration_lnfree import ACTIVATION_NAMES, OTHER_NAMES, reject_study_typos
from hf_lnfree.models.errors import ConfigurationError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm": "batchnorm"}, r"norm='batchnorm'.*'none', 'layernorm'"),
        ({"final_norm": None}, r"final_norm=None.*'none', 'layernorm'"),
        ({"slope_scope": "head"}, r"'layer', 'global'"),
        ({"linear_bias": "none"}, r"'all', 'query_key'"),
        ({"residual_init": "zero"}, r"'scaled', 'plain'"),
        ({"activation": "rleu"}, r"'rleu'.*'relu'.*'learnable_leaky_relu'"),
        ({"layer_norms": ["none"]}, r"layer_norms.*3 layers, 1 entries"),
        ({"layer_norms": ["none", "none", "batch"]}, r"layer_norms\[2\]='batch'.*'layernorm'"),
        ({"layer_norms": "none"}, "a list with one name per layer"),
        ({"layer_activations": ["relu"] * 4}, r"layer_activations.*3 layers, 4 entries"),
        ({"layer_activations": ["relu", "relu", "x"]}, r"layer_activations\[2\]='x'"),
        ({"negative_slope": "steep"}, "finite number, got 'steep'"),
        ({"negative_slope": float("nan")}, "finite number"),
        ({"norms": "none"}, r"'norms'.*Did you mean 'norm'"),
        ({"layer_norm": ["none"] * 3}, r"'layer_norm'.*layer_norms"),
        ({"actvation": "relu"}, r"'actvation'.*layer_activations"),
        ({"slope": 0.1}, r"'slope'.*slope_scope"),
        ({"residual_initt": "plain"}, r"Did you mean 'residual_init'"),
        ({"final_nrom": "none"}, r"Did you mean 'final_norm'"),
    ],
)
def test_wrong_study_field_is_a_value_error_that_names_what_is_allowed(family, fields, message):
    with pytest.raises(ValueError, match=message):
        family.config(**fields)


def test_query_key_bias_needs_a_bias(family):
    if family.name in ("gpt_neox", "llama", "qwen3"):
        with pytest.raises(ValueError, match="attention_bias=False leaves none"):
            family.config(linear_bias="query_key", attention_bias=False)
    assert family.config(linear_bias="query_key").linear_bias == "query_key"


def test_the_other_familys_activation_field_is_refused(family):
    other = {"hidden_act": "activation_function", "activation_function": "hidden_act"}[family.activation_field]
    with pytest.raises(ValueError, match=family.activation_field):
        family.config(**{other: "relu"})


def test_assignment_is_checked_too(family):
    config = family.config()
    with pytest.raises(ValueError, match="'layernorm'"):
        config.norm = "batchnorm"
    config.layer_norms = ["none"]
    with pytest.raises(ValueError, match="layer_norms needs one entry per layer"):
        family.head("CausalLM")(config)


@pytest.mark.parametrize(
    "field", ["task_specific_params", "batch_norm_eps", "rms_norm_eps", "act_bits", "use_norm_bias", "hidden_act_scale"]
)
def test_other_unknown_fields_are_kept_as_transformers_keeps_them(family, field, tmp_path):
    if field == "rms_norm_eps" and family.gated:
        pytest.skip("a field of its own")
    config = family.config(**{field: 3})
    config.save_pretrained(tmp_path)
    assert getattr(AutoConfig.from_pretrained(tmp_path), field) == 3


def test_no_field_of_another_model_is_taken_for_a_slip(family):
    """Of every configuration of transformers; what is refused means one of ours, by a list."""
    own = type(family.config())
    names = {field.name for config in CONFIG_MAPPING.values() if is_dataclass(config) for field in fields(config)}
    names -= {field.name for field in fields(own)} | {*OTHER_NAMES, *ACTIVATION_NAMES}
    assert len(names) > 1000
    reject_study_typos(dict.fromkeys(names), own)


def test_what_becomes_of_the_norms_of_a_stock_checkpoint_must_be_said(family, tmp_path):
    family.stock_model().save_pretrained(tmp_path)
    head = family.head("CausalLM")
    with pytest.raises(ConfigurationError, match=rf"would be dropped. Pass norm=\"{family.norm}\""):
        head.from_pretrained(tmp_path)
    assert head.from_pretrained(tmp_path, norm=family.norm).config.block_norms == [family.norm] * 3
    assert head.from_pretrained(tmp_path, layer_norms=f"none:0,{family.norm}:1-2").config.block_norms[0] == "none"
    assert head.from_pretrained(tmp_path, norm="none").config.block_norms == ["none"] * 3


PUBLISHED = {  # the keys that the configurations of openai-community/gpt2 and EleutherAI/pythia-70m have on the Hub
    "gpt2": {
        **{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "n_ctx": 1024},
        **{"bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "n_head": 12},
        **{"layer_norm_epsilon": 1e-5, "model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_positions": 1024},
        **{"resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1, "summary_type": "cls_index"},
        **{"summary_proj_to_labels": True, "summary_use_proj": True, "vocab_size": 50257},
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
    "gpt_neox": {
        **{"architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu"},
        **{"hidden_size": 512, "initializer_range": 0.02, "intermediate_size": 2048, "layer_norm_eps": 1e-5},
        **{"max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 8, "rotary_pct": 0.25},
        **{"num_hidden_layers": 6, "rotary_emb_base": 10000, "tie_word_embeddings": False, "vocab_size": 50304},
        **{"torch_dtype": "float16", "transformers_version": "4.24.0", "use_cache": True},
        "use_parallel_residual": True,
    },
    "llama": {  # TinyLlama/TinyLlama-1.1B-Chat-v1.0
        **{"architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2},
        **{"hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5632},
        **{"max_position_embeddings": 2048, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 22},
        **{"num_key_value_heads": 4, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None},
        **{"rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True},
        "vocab_size": 32000,
    },
    "qwen3": {  # Qwen/Qwen3-0.6B
        **{"architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "head_dim": 128},
        **{"bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 1024},
        **{"initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960},
        **{"max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28},
        **{"num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000},
        **{"sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True},
        **{"use_sliding_window": False, "vocab_size": 151936},
    },
    "opt": {  # facebook/opt-125m
        **{"_remove_final_layer_norm": False, "activation_dropout": 0.0, "activation_function": "relu"},
        **{"architectures": ["OPTForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 2, "dropout": 0.1},
        **{"do_layer_norm_before": True, "eos_token_id": 2, "ffn_dim": 3072, "hidden_size": 768, "init_std": 0.02},
        **{"layerdrop": 0.0, "max_position_embeddings": 2048, "model_type": "opt", "num_attention_heads": 12},
        **{"num_hidden_layers": 12, "pad_token_id": 1, "prefix": "</s>", "torch_dtype": "float16", "use_cache": True},
        **{"vocab_size": 50272, "word_embed_proj_dim": 768},
    },
}


def test_published_configurations_are_accepted(family, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[family.name]))
    config = type(family.config()).from_pretrained(tmp_path, norm=family.norm)
    assert config.block_norms == [family.norm] * config.num_hidden_layers
    assert config.block_activations[0] == PUBLISHED[family.name][family.activation_field]
    stock = type(family.stock_config()).from_pretrained(tmp_path)
    shared = set(stock.to_dict()) - {"model_type", "transformers_version", "architectures"}
    assert {key: getattr(config, key) for key in shared} == {key: getattr(stock, key) for key in shared}


def test_round_trip_and_auto_classes(family, tmp_path):
    config = family.config(layer_activations=["relu", "gelu", "relu"], linear_bias="query_key", negative_slope=0)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    assert loaded.to_dict() == config.to_dict() | {"_name_or_path": str(tmp_path)} or loaded == config
    written = json.loads((tmp_path / "config.json").read_text())
    assert set(written["auto_map"]) == {"AutoConfig", "AutoModel", *(f"AutoModelFor{head}" for head in family.heads)}
