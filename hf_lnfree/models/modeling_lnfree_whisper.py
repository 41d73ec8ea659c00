"""Whisper without LayerNorm: configuration, sites and classes; the rest is transformers' own."""

from dataclasses import field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from transformers import (
    PreTrainedConfig,
    WhisperConfig,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
    WhisperModel,
)

from .configuration_lnfree import LNFreeConfigMixin, auto_map
from .errors import ConfigurationError
from .heads import Head
from .normfree import LNFreeMixin
from .sites import AttentionBranch, MLPBranch, StackSites

HEADS = ("AudioClassification",)
OTHERS = {"ForSpeechSeq2Seq": "ForConditionalGeneration"}


class LNFreeWhisperConfig(LNFreeConfigMixin, WhisperConfig):  # noqa: D101  set in the next line
    __doc__ = "[`WhisperConfig`] with the study's fields.\n" + (LNFreeConfigMixin.__doc__ or "")

    model_type = "lnfree_whisper"
    activation_field: ClassVar[str] = "activation_function"
    depth_fields: ClassVar[tuple[str, ...]] = ("encoder_layers", "decoder_layers")

    residual_init: Literal["scaled", "plain"] = "plain"
    auto_map: dict[str, str] = field(
        default_factory=lambda: auto_map("modeling_lnfree_whisper", "LNFreeWhisper", HEADS, OTHERS)
    )
    tokenizer_class: str | None = "WhisperTokenizer"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.lm_head_bias:
            raise ConfigurationError(
                f"lm_head_bias=True is not for {type(self).__name__}: its head has no bias. Leave it at False."
            )


def attention(
    name: str, heads_field: str, readers: tuple[str, ...], encoder_readers: tuple[str, ...]
) -> AttentionBranch:
    """One attention of a block."""
    return AttentionBranch(
        norm=f"{name}_layer_norm",
        readers=tuple(f"{name}.{reader}" for reader in readers),
        encoder_readers=tuple(f"{name}.{reader}" for reader in encoder_readers),
        module=name,
        writer=f"{name}.out_proj",
        heads_field=heads_field,
    )


def stack(name: str, cross: bool) -> StackSites:
    """The encoder, or the decoder with its cross-attention."""
    heads_field = f"{name}_attention_heads"
    return StackSites(
        blocks=f"{name}.layers",
        attention=attention("self_attn", heads_field, ("q_proj", "k_proj", "v_proj"), ()),
        cross_attention=attention("encoder_attn", heads_field, ("q_proj",), ("k_proj", "v_proj")) if cross else None,
        mlp=MLPBranch(norm="final_layer_norm", readers=("fc1",), activation="activation_fn", writer="fc2"),
        final_norm=f"{name}.layer_norm",
    )


ENCODER, DECODER = stack("encoder", cross=False), stack("decoder", cross=True)


class LNFreeWhisperMixin(LNFreeMixin):
    """Where Whisper keeps its branches. Its dropouts are functions, so no branch has a module for one."""

    config_class = LNFreeWhisperConfig
    stacks: ClassVar[tuple[StackSites, ...]] = (ENCODER, DECODER)


class LNFreeWhisperModel(LNFreeWhisperMixin, WhisperModel):
    """[`WhisperModel`] with the norms and activations of an [`LNFreeWhisperConfig`]."""


class LNFreeWhisperForConditionalGeneration(Head, LNFreeWhisperMixin, WhisperForConditionalGeneration):
    """[`WhisperForConditionalGeneration`] on an [`LNFreeWhisperModel`]."""

    backbone = LNFreeWhisperModel

    def add_head(self, config: PreTrainedConfig) -> None:
        self.proj_out = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.max_target_positions = config.max_target_positions

    def _prepare_decoder_input_ids_for_generation(  # type: ignore[override]  # whose self is a protocol
        self, batch_size: int, model_input_name: str, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        # transformers puts a start token before whatever begins otherwise, but not for the model_type "whisper":
        # a prompt stands before the start token there.
        for name in ("decoder_input_ids", "input_ids"):
            if model_kwargs.get(name) is not None:
                return model_kwargs.pop(name), model_kwargs
        prepare: Any = super()._prepare_decoder_input_ids_for_generation  # type: ignore[misc]  # the same
        return prepare(batch_size, model_input_name, model_kwargs, *args, **kwargs)


class LNFreeWhisperForAudioClassification(LNFreeWhisperMixin, WhisperForAudioClassification):
    """[`WhisperForAudioClassification`] with the norms and activations of an [`LNFreeWhisperConfig`]."""

    stacks = (ENCODER,)
