"""Tiny models of families that nobody declared, and where they keep their norms, as one reads in modeling files."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers

TOKENS = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
GROUPED = {**SIZES, "num_key_value_heads": 2}
HEADED = {**GROUPED, "head_dim": 8}
OLD = {**TOKENS, "n_layer": 2, "n_head": 4}
PICTURE = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    **{"image_size": 8, "patch_size": 2, "num_channels": 1},
}
TWO = {
    **{**TOKENS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "decoder_start_token_id": 2},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
}
MODERN = ("input_layernorm", "post_attention_layernorm")
FOUR = (*MODERN, "pre_feedforward_layernorm", "post_feedforward_layernorm")
GLM4 = (*MODERN, "post_self_attn_layernorm", "post_mlp_layernorm")
BERT = ("attention.output.LayerNorm", "output.LayerNorm")
QUERY_KEY = ("self_attn.q_norm", "self_attn.k_norm")


@dataclass(frozen=True)
class Stack:
    """Two blocks: the norms that are replaced, the others, the activations, the norm after the last block."""

    blocks: str
    norms: tuple[str, ...]
    activations: tuple[str, ...]
    final: str | None = None
    left: tuple[str, ...] = ()

    def paths(self, names: tuple[str, ...]) -> set[str]:
        return {f"{self.blocks}.{number}.{name}" for number in range(2) for name in names}


@dataclass(frozen=True)
class Architecture:
    """
    Args:
        head: the class.
        fields: of its configuration.
        stacks: of blocks.
        left: norms outside the stacks.
        absent: what one block has not.
        kind: of its norms.
        behind: whether norms stand behind the sum.
    """

    head: str
    fields: dict[str, Any]
    stacks: tuple[Stack, ...]
    left: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    kind: str = "rmsnorm"
    behind: bool = False

    @property
    def norms(self) -> set[str]:
        return set().union(*(stack.paths(stack.norms) for stack in self.stacks)) - set(self.absent)

    @property
    def finals(self) -> set[str]:
        return {stack.final for stack in self.stacks if stack.final}

    @property
    def activations(self) -> set[str]:
        return set().union(*(stack.paths(stack.activations) for stack in self.stacks)) - set(self.absent)

    @property
    def others(self) -> set[str]:
        """Norms that no argument of `replace_norms` but `query_key_norm` means."""
        return set().union(*(stack.paths(stack.left) for stack in self.stacks), self.left)

    def model(self, seed: int = 0) -> transformers.PreTrainedModel:
        """Weights and gains far from where they begin, so that a norm that is missing shows."""
        torch.manual_seed(seed)
        head = getattr(transformers, self.head)
        model = head(head.config_class(**self.fields)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model

    def given(self, model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(1)
        ids = torch.randint(3, 99, (2, 6), generator=draw)
        given: dict[str, torch.Tensor] = {"input_ids": ids}
        if model.main_input_name == "pixel_values":
            size = model.config.image_size
            given = {"pixel_values": torch.randn(2, 1, size, size, generator=draw)}
        elif model.main_input_name == "input_features":
            given = {"input_features": torch.randn(2, 8, 20, generator=draw)}
        elif model.main_input_name == "input_values":
            given = {"input_values": torch.randn(2, 4000, generator=draw)}
        if model.config.is_encoder_decoder:
            given["decoder_input_ids"] = ids[:, :4]
        return {key: value.to(model.dtype) if value.is_floating_point() else value for key, value in given.items()}


def decoder(head: str, fields: dict[str, Any], norms: tuple[str, ...] = MODERN, **more: Any) -> Architecture:
    """A model whose modules are called as those of Llama are."""
    stack = {"blocks": "model.layers", "activations": ("mlp.act_fn",), "final": "model.norm"}
    stack |= {name: more.pop(name) for name in ("blocks", "activations", "final") if name in more}
    left = more.pop("inner", ())
    return Architecture(head, fields, (Stack(norms=norms, left=left, **stack),), **more)


def picture(head: str, blocks: str, norms: tuple[str, ...], final: str, act: str = "mlp.activation_fn") -> Architecture:
    return Architecture(head, PICTURE, (Stack(blocks, norms, (act,), final),), kind="layernorm")


def two_stacks(prefix: str, behind: bool) -> tuple[Stack, ...]:
    """BART normalises behind the sum and not after the last block; Whisper before branches."""
    own, cross, mlp = ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")
    ends = (None, None) if behind else ("encoder.layer_norm", "decoder.layer_norm")
    names = ((own, mlp), (own, cross, mlp))
    return tuple(
        Stack(f"{prefix}.{name}.layers", norms, ("activation_fn",), end and f"{prefix}.{end}")
        for name, norms, end in zip(("encoder", "decoder"), names, ends, strict=True)
    )


PHI = {"final": "model.final_layernorm", "activations": ("mlp.activation_fn",), "kind": "layernorm"}
OLDER = {"blocks": "transformer.h", "final": "transformer.ln_f", "activations": ("mlp.act",), "kind": "layernorm"}
EAGER = {"experts_implementation": "eager"}  # the others know no float64
DEEPSEEK = {
    **{**SIZES, **EAGER, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    **{"num_experts_per_tok": 1, "moe_intermediate_size": 16, "q_lora_rank": 8, "kv_lora_rank": 8},
    **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 1},
}
COHERE = {**GROUPED, "use_qk_norm": True}
MIXTURE = {**EAGER, "num_local_experts": 2, "num_experts_per_tok": 1}

ARCHITECTURES = (
    decoder("Gemma2ForCausalLM", HEADED, FOUR),
    decoder("Gemma3ForCausalLM", HEADED, FOUR, inner=QUERY_KEY),
    decoder("MistralForCausalLM", GROUPED),
    decoder("GraniteForCausalLM", GROUPED),
    decoder("Qwen2ForCausalLM", GROUPED),
    decoder("Phi3ForCausalLM", GROUPED, activations=("mlp.activation_fn",)),
    decoder("PhiForCausalLM", SIZES, ("input_layernorm",), **PHI),
    decoder("MixtralForCausalLM", {**GROUPED, **MIXTURE}, activations=("mlp.experts.act_fn",)),
    decoder(
        "Qwen3MoeForCausalLM",
        {**HEADED, **EAGER, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
        activations=("mlp.experts.act_fn",),
        inner=QUERY_KEY,
    ),
    decoder("GptOssForCausalLM", {**HEADED, **MIXTURE}, activations=()),
    decoder(
        "DeepseekV3ForCausalLM",
        DEEPSEEK,
        activations=("mlp.act_fn", "mlp.experts.act_fn", "mlp.shared_experts.act_fn"),
        inner=("self_attn.q_a_layernorm", "self_attn.kv_a_layernorm"),
        absent=tuple(
            f"model.layers.{path}" for path in ("0.mlp.experts.act_fn", "0.mlp.shared_experts.act_fn", "1.mlp.act_fn")
        ),
    ),
    decoder(
        "Glm4ForCausalLM",
        HEADED,
        (*MODERN, "post_self_attn_layernorm", "post_mlp_layernorm"),
        activations=("mlp.activation_fn",),
    ),
    decoder("Olmo2ForCausalLM", GROUPED, ("post_attention_layernorm", "post_feedforward_layernorm"), inner=QUERY_KEY),
    decoder("OlmoForCausalLM", GROUPED, kind="layernorm"),
    decoder(
        "CohereForCausalLM", {**GROUPED, "use_qk_norm": True}, ("input_layernorm",), kind="layernorm", inner=QUERY_KEY
    ),
    decoder(
        "StableLmForCausalLM",
        {**SIZES, "num_key_value_heads": 4, "qk_layernorm": True},
        kind="layernorm",
        inner=tuple(f"self_attn.{name}_layernorm.norms.{head}" for name in "qk" for head in range(4)),
    ),
    decoder("Starcoder2ForCausalLM", GROUPED, kind="layernorm", activations=("mlp.act",)),
    decoder(
        "FalconForCausalLM",
        {**TOKENS, **{k: SIZES[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads")}},
        ("input_layernorm",),
        **OLDER,
    ),
    decoder("GPTJForCausalLM", {**OLD, "n_embd": 32, "rotary_dim": 4}, ("ln_1",), **OLDER),
    decoder(
        "BloomForCausalLM",
        {**OLD, "hidden_size": 32},
        **{**OLDER, "activations": ("mlp.gelu_impl",), "left": ("transformer.word_embeddings_layernorm",)},
    ),
    decoder(
        "MptForCausalLM",
        {**TOKENS, "d_model": 32, "n_layers": 2, "n_heads": 4},
        ("norm_1", "norm_2"),
        **{**OLDER, "blocks": "transformer.blocks", "final": "transformer.norm_f", "activations": ("ffn.act",)},
    ),
    decoder(
        "ModernBertForMaskedLM",
        {**SIZES, "cls_token_id": 1, "sep_token_id": 2},
        ("attn_norm", "mlp_norm"),
        final="model.final_norm",
        activations=("mlp.act",),
        left=("model.embeddings.norm", "head.norm"),
        absent=("model.layers.0.attn_norm",),
        kind="layernorm",
    ),
    Architecture(
        "RobertaForMaskedLM",
        {**SIZES, "pad_token_id": 1, "bos_token_id": 0},
        (Stack("roberta.encoder.layer", BERT, ("intermediate.intermediate_act_fn",)),),
        left=("roberta.embeddings.LayerNorm", "lm_head.layer_norm"),
        kind="layernorm",
        behind=True,
    ),
    Architecture(
        "DistilBertForSequenceClassification",
        {**TOKENS, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
        (Stack("distilbert.transformer.layer", ("sa_layer_norm", "output_layer_norm"), ("ffn.activation",)),),
        left=("distilbert.embeddings.LayerNorm",),
        kind="layernorm",
        behind=True,
    ),
    Architecture(
        "BartForConditionalGeneration",
        TWO,
        two_stacks("model", behind=True),
        left=("model.encoder.layernorm_embedding", "model.decoder.layernorm_embedding"),
        kind="layernorm",
        behind=True,
    ),
    Architecture(
        "WhisperForConditionalGeneration",
        {**TWO, "max_source_positions": 10, "num_mel_bins": 8},
        two_stacks("model", behind=False),
        kind="layernorm",
    ),
    picture("Dinov2ForImageClassification", "dinov2.encoder.layer", ("norm1", "norm2"), "dinov2.layernorm"),
    picture("DeiTForImageClassification", "deit.layers", ("layernorm_before", "layernorm_after"), "deit.layernorm"),
    Architecture(
        "SwinForImageClassification",
        {
            **{"image_size": 16, "patch_size": 2, "num_channels": 1, "embed_dim": 16, "depths": [2, 2]},
            **{"num_heads": [2, 4], "window_size": 4},
        },
        (
            Stack("swin.encoder.layers.0.blocks", ("layernorm_before", "layernorm_after"), ("mlp.activation_fn",)),
            Stack(
                "swin.encoder.layers.1.blocks",
                ("layernorm_before", "layernorm_after"),
                ("mlp.activation_fn",),
                "swin.layernorm",
            ),
        ),
        left=("swin.embeddings.norm", "swin.encoder.layers.0.downsample.norm"),
        kind="layernorm",
    ),
    Architecture(
        "Wav2Vec2ForCTC",
        {
            **{**SIZES, "conv_dim": [8] * 7, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
            **{"do_stable_layer_norm": True, "feat_extract_norm": "layer"},
        },
        (
            Stack(
                "wav2vec2.encoder.layers",
                ("layer_norm", "final_layer_norm"),
                ("feed_forward.intermediate_act_fn",),
                "wav2vec2.encoder.layer_norm",
            ),
        ),
        left=(
            "wav2vec2.feature_projection.layer_norm",
            *(f"wav2vec2.feature_extractor.conv_layers.{number}.layer_norm" for number in range(7)),
        ),
        kind="layernorm",
    ),
)
