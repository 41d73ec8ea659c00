"""ViT without LayerNorm: configuration, sites and classes; the rest is transformers' own."""

from dataclasses import field
from typing import Any, ClassVar, Literal

from transformers import ViTConfig, ViTForImageClassification, ViTModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .configuration_lnfree import LNFreeConfigMixin, auto_map
from .errors import ConfigurationError
from .heads import ImageClassificationHead
from .normfree import LNFreeMixin
from .sites import AttentionBranch, MLPBranch, StackSites

HEADS = ("ImageClassification",)


class LNFreeViTConfig(LNFreeConfigMixin, ViTConfig):  # noqa: D101  set in the next line
    __doc__ = "[`ViTConfig`] with the study's fields.\n" + (LNFreeConfigMixin.__doc__ or "")

    model_type = "lnfree_vit"
    activation_field: ClassVar[str] = "hidden_act"

    residual_init: Literal["scaled", "plain"] = "plain"
    auto_map: dict[str, str] = field(default_factory=lambda: auto_map("modeling_lnfree_vit", "LNFreeViT", HEADS))

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.lm_head_bias:
            raise ConfigurationError("lm_head_bias=True: a ViT has no language-model head. Leave it at False.")


class LNFreeViTMixin(LNFreeMixin):
    """Where ViT keeps its branches. One dropout module serves both of a block, so neither has one of its own."""

    config_class = LNFreeViTConfig
    stacks = (
        StackSites(
            embeddings=(
                "embeddings.cls_token",
                "embeddings.position_embeddings",
                "embeddings.patch_embeddings.projection",
            ),
            embedding_dropout="embeddings.dropout",
            blocks="layers",
            attention=AttentionBranch(
                norm="layernorm_before",
                readers=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
                module="attention",
                writer="attention.o_proj",
            ),
            mlp=MLPBranch(
                norm="layernorm_after", readers=("mlp.fc1",), activation="mlp.activation_fn", writer="mlp.fc2"
            ),
            final_norm="layernorm",
        ),
    )


class LNFreeViTModel(LNFreeViTMixin, ViTModel):
    """[`ViTModel`] with the norms and activations of an [`LNFreeViTConfig`]."""


class LNFreeViTForImageClassification(ImageClassificationHead, LNFreeViTMixin, ViTForImageClassification):
    """[`ViTForImageClassification`] on an [`LNFreeViTModel`]."""

    backbone = LNFreeViTModel
    backbone_options = {"add_pooling_layer": False}


# Checkpoints have older names for the tensors of ViT; transformers renames them by the name of the class.
register_checkpoint_conversion_mapping(
    LNFreeViTModel.__name__, get_checkpoint_conversion_mapping(ViTModel.__name__), overwrite=True
)
