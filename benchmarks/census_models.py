"""Small settings and guessed inputs for any model type of transformers."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig

LAYERS = dict.fromkeys(
    ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth",
     "num_encoder_layers", "num_decoder_layers", "encoder_num_hidden_layers", "decoder_num_hidden_layers",
     "num_hidden_layers_encoder"), 2)  # fmt: skip
WIDTHS = dict.fromkeys(
    ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "out_hidden_size"), 32
)
HEADS = dict.fromkeys(
    ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
     "encoder_num_attention_heads", "decoder_num_attention_heads", "num_encoder_attention_heads",
     "num_decoder_attention_heads"), 4)  # fmt: skip
MLP = dict.fromkeys(
    ("intermediate_size", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "n_inner", "d_inner"), 64
)
TEXT = {"vocab_size": 99, "max_position_embeddings": 64, "max_source_positions": 16, "n_positions": 64}
TEXT |= {"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
}
EXPERTS |= {"moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "moe_k": 2, "moe_topk": 2}
EXPERTS |= {"shared_expert_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
SIDES = {"image_size": 32, "patch_size": 8, "num_mel_bins": 8, "num_queries": 5}
COMMON = {**LAYERS, **MLP, **TEXT, **EXPERTS}
SETTINGS: tuple[dict[str, int], ...] = (
    {**COMMON, **WIDTHS, **HEADS, **SIDES, "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8, "rotary_dim": 4},
    {**COMMON, **WIDTHS, **HEADS, **SIDES, **LATENT, "num_key_value_heads": 4},
    {**COMMON, **dict.fromkeys(WIDTHS, 256), **dict.fromkeys(HEADS, 2), "num_key_value_heads": 2, "head_dim": 128},
    {**COMMON, **dict.fromkeys(WIDTHS, 256), **dict.fromkeys(HEADS, 4), "num_key_value_heads": 4},
    {**COMMON, **WIDTHS, **HEADS, **dict.fromkeys(LAYERS, 4), "num_key_value_heads": 2},
    {**LAYERS, **TEXT, **EXPERTS},
    {**LAYERS},
    dict.fromkeys(LAYERS, 4) | TEXT,
    {},
)
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
SIDED = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "vocab_size": 99}
SIDED |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "pad_token_id": 2}
MODEL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
SPECIAL: dict[str, tuple[dict[str, Any], ...]] = {
    "longformer": ({**MODEL, "attention_window": [4, 8], "pad_token_id": 2},),
    "led": ({**SIDED, "attention_window": 4},),
    "big_bird": ({**MODEL, "attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 2},),
    "bigbird_pegasus": ({**SIDED, "attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 2},),
    "reformer": ({"vocab_size": 99, "hidden_size": 32, "num_attention_heads": 2, "attention_head_size": 16,
                  "feed_forward_size": 32, "axial_pos_shape": [4, 16], "axial_pos_embds_dim": [16, 16],
                  "attn_layers": ["local", "lsh"], "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8,
                  "num_buckets": 4, "num_hashes": 2, "pad_token_id": 2},),
    "hiera": ({"image_size": [32, 32], "patch_size": [3, 3], "patch_stride": [2, 2], "patch_padding": [1, 1],
               "embed_dim": 16, "depths": [1, 2, 1], "num_heads": [1, 2, 4], "query_stride": [2, 2],
               "num_query_pool": 2, "masked_unit_size": [4, 4]},),
    "prophetnet": ({"hidden_size": 32, "vocab_size": 99, "num_encoder_layers": 2, "num_decoder_layers": 2,
                    "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "encoder_ffn_dim": 64,
                    "decoder_ffn_dim": 64, "ngram": 2},),
    "gpt_neo": ({"vocab_size": 99, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 4,
                 "attention_types": [[["global", "local"], 1]]},),
    "funnel": ({"vocab_size": 99, "block_sizes": [1, 2], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64},),
    "longt5": ({"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 99,
                "local_radius": 3, "global_block_size": 4,
                "encoder_attention_type": "transient-global"},),
    "pegasus_x": ({**SIDED, "block_size": 4, "num_global_tokens": 3},),
    "esm": ({**MODEL, "pad_token_id": 2, "mask_token_id": 4, "max_position_embeddings": 64},),
    "decision_transformer": ({"hidden_size": 32, "n_layer": 2, "n_head": 4, "state_dim": 5, "act_dim": 3},),
    "dbrx": ({"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 99},),
    **dict.fromkeys(("swin", "swinv2", "donut-swin", "maskformer-swin"), (SWIN,)),
    "cpmant": ({**MODEL, "dim_head": 8, "dim_ff": 64, "num_layers": 2, "prompt_length": 2, "init_std": 0.1},),
    "swin2sr": ({**SWIN, "depths": [2, 2], "num_heads": [2, 2]},),
    "clap_audio_model": ({"depths": [2, 2], "num_attention_heads": [2, 4], "patch_embeds_hidden_size": 16,
                          "spec_size": 64, "num_mel_bins": 16, "window_size": 4, "hidden_size": 32},),
    **{kind: ({"prediction_length": 4, "context_length": 8, "input_size": 1, "lags_sequence": [1, 2], "d_model": 16,
               "num_time_features": 1, "encoder_layers": 2, "decoder_layers": 2},)
       for kind in ("autoformer", "informer", "time_series_transformer")},
}  # fmt: skip


def configurations(kind: str, cls: type[PreTrainedConfig], reasons: list[str]) -> Iterator[PreTrainedConfig]:
    """Settings of a type, those made for it first; why one fails is added to `reasons`."""
    for fields in SPECIAL.get(kind, ()):
        yield cls(**fields)
    for sizes in SETTINGS:
        try:
            base = cls()
            fields = fitting(base, sizes)
            for name in base.sub_configs:
                part = getattr(base, name, None)
                if isinstance(part, PreTrainedConfig):
                    fields[name] = {"model_type": part.model_type, **fitting(part, sizes)}
            yield cls(**fields)
        except Exception as error:
            reasons.append(f"configure: {type(error).__name__} {str(error).strip()[:150]}")


def fitting(config: PreTrainedConfig, sizes: dict[str, int]) -> dict[str, Any]:
    """The sizes that the configuration has as whole numbers."""
    found = {}
    for name, value in sizes.items():
        try:
            default = getattr(config, name, "absent")
        except Exception:  # a size of each layer
            continue
        whole = isinstance(default, int) and not isinstance(default, bool)
        if whole or (default is None and name in ("num_key_value_heads", "head_dim", "pad_token_id")):
            found[name] = value
    return found


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def inputs(kind: str, model: Any, config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """Batches that the model may take, most likely first."""
    names = inspect.signature(model.forward).parameters
    vision = getattr(config, "vision_config", config)
    side, channels = (getattr(vision, name, None) for name in ("image_size", "num_channels"))
    side = side[0] if isinstance(side, (list, tuple)) else side
    side, channels = min(side or 32, 1024), channels if isinstance(channels, int) else 3
    audio = getattr(config, "audio_config", config)
    bins = next((getattr(audio, n) for n in ("num_mel_bins", "input_feat_per_channel", "feature_size", "input_dim")
                 if isinstance(getattr(audio, n, None), int)), 8)  # fmt: skip
    patch = next(
        (p for n in ("patch_size", "spatial_patch_size") if isinstance(p := getattr(vision, n, None), int)), 14
    )
    temporal = getattr(vision, "temporal_patch_size", 1)
    temporal = temporal if isinstance(temporal, int) else 1
    length = {"reformer": 64, "big_bird": 64, "bigbird_pegasus": 64, "longt5": 32}.get(kind, 16)
    ids = torch.randint(5, 90, (2, length), generator=torch.Generator().manual_seed(0))
    frames = getattr(vision, "num_frames", None) or 2
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    features = [numbers(2, bins, 32), numbers(2, 32, bins), numbers(2, bins, 3000), numbers(2, 1, 64, bins)]
    pictures = [numbers(2, channels, side, side), numbers(2, frames, channels, side, side)]
    patches = [numbers(32, channels * temporal * patch**2), numbers(32, channels, patch, patch)]
    sounds = [numbers(2, 4000), numbers(2, 1, 4000), numbers(2, bins, 32), numbers(2, 128, bins)]
    rows = [numbers(2, 32, channels * patch**2), numbers(2, channels, 256, 256), numbers(2, channels, 32, 128)]
    several: dict[str, list[torch.Tensor]] = {"pixel_values": pictures + patches + rows, "input_features": features}
    several |= {"input_values": [*sounds, numbers(2, 1, 7680)], "hidden_states": patches}
    several |= {"query_embeds": [numbers(2, 5, 32), numbers(2, 5, 768), numbers(2, 5, 256)]}
    several |= {"past_values": [numbers(2, 512, 7), numbers(2, 10), numbers(2, 64), numbers(2, 32, 1)]}
    shared: dict[str, Any] = {
        "input_ids": ids,
        "decoder_input_ids": ids[:, :6],
        "bbox": torch.zeros(2, length, 4, dtype=torch.long),
        "grid_thw": grid,
        "image_grid_thw": grid,
        "use_cache": False,
        "qformer_input_ids": ids,
        "task_inputs": torch.randint(5, 90, (2, 77), generator=torch.Generator().manual_seed(0)),
        "spatial_shapes": torch.tensor([[4, 8], [4, 8]]),
        "pixel_attention_mask": torch.ones(2, 32, dtype=torch.long),
        "visual_feats": numbers(2, 6, 2048),
        "visual_pos": numbers(2, 6, 4),
        "states": numbers(2, 8, 5),
        "actions": numbers(2, 8, 3),
        "rewards": numbers(2, 8, 1),
        "returns_to_go": numbers(2, 8, 1),
        "timesteps": torch.arange(8).expand(2, 8),
        "past_time_features": numbers(2, 10, 1),
        "past_observed_mask": torch.ones(2, 10),
        "future_values": numbers(2, 4),
        "future_time_features": numbers(2, 4, 1),
        "input_points": numbers(2, 1, 2, 2).abs() * 9,
        "pixel_position_ids": torch.stack(torch.meshgrid(torch.arange(4), torch.arange(8), indexing="ij"), -1)
        .view(1, 32, 2).expand(2, -1, -1),
    }  # fmt: skip
    main = {model.main_input_name} if isinstance(model.main_input_name, str) else set(model.main_input_name)
    needed = {n for n, p in names.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    few = {n: v for n, v in shared.items() if n in names and (n in needed | main | {"use_cache", "decoder_input_ids"})}
    many = {n: v for n, v in shared.items() if n in names and not n.startswith("image_grid")}
    every = {n: v for n, v in shared.items() if n in names}
    changing = [n for n in several if n in names]
    for base in (few, many, every):
        for index in range(8 if changing else 1):
            varied = {
                n: several[n][index]
                for n in changing
                if index < len(several[n]) and (base is not few or n in needed | main)
            }
            yield {**base, **varied}
