"""Which class of ours stands for which class of transformers."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from .. import models
from ..errors import ModelError, listed
from ..models import LNFreeMixin, StackSites
from ..models.configuration_lnfree import LNFreeConfigMixin

HEADS = (
    *("ForCausalLM", "ForMaskedLM", "ForConditionalGeneration", "ForImageClassification", "ForAudioClassification"),
    *("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "EncoderModel", "Model"),
)


@dataclass(frozen=True)
class Family:
    """A stock family and ours, by the first part of their class names."""

    ours: str
    stock: str
    eps_field: str | None
    """The configuration field with the epsilon of every norm of the blocks, and of no other; None if there is none."""

    @property
    def config(self) -> type[LNFreeConfigMixin]:
        """The configuration class of ours."""
        return getattr(models, f"{self.ours}Config")

    @property
    def stock_config(self) -> type[PreTrainedConfig]:
        """The configuration class of transformers."""
        return getattr(transformers, f"{self.stock}Config")

    @property
    def classes(self) -> dict[str, type[PreTrainedModel]]:
        """Name of a stock class -> the class of ours with the same parameters."""
        return {
            self.stock_name(head): getattr(models, self.ours + head)
            for head in HEADS
            if hasattr(models, self.ours + head)
        }

    def stock_name(self, head: str) -> str:
        """What transformers calls a class of the family, by the end of our name for it."""
        return "GPT2LMHeadModel" if (self.stock, head) == ("GPT2", "ForCausalLM") else self.stock + head

    def stock_class(self, ours: type) -> type[PreTrainedModel]:
        """The class of transformers with the parameters of one of ours."""
        return getattr(transformers, {own: name for name, own in self.classes.items()}[ours])

    def auto_class(self, ours: type) -> Any:
        """The Auto class of transformers for one of ours."""
        head = ours.__name__.removeprefix(self.ours)
        return getattr(transformers, models.AUTO_CLASSES.get(ours, f"AutoModel{head.removesuffix('Model')}"))

    def read_elsewhere(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Fields of older releases of transformers, which converters of other tools still read."""
        if self.stock == "GPT2":
            return {"n_ctx": config.n_positions}
        if self.stock == "T5":  # which transformers reads first
            gate = "gated-" if config.is_gated_act else ""
            gelu = config.is_gated_act and config.dense_act_fn == "gelu_new"
            return {"feed_forward_proj": gate + ("gelu" if gelu else config.dense_act_fn)}
        if self.stock != "GPTNeoX":
            return {}
        rope = config.rope_parameters or {}
        return {
            "rotary_pct": rope.get("partial_rotary_factor", 1.0),
            "rotary_emb_base": rope.get("rope_theta", 10000.0),
        }

    def class_of(self, architectures: list[str] | None, names: Iterable[str]) -> type[PreTrainedModel]:
        """
        The class of ours for a checkpoint, by what its configuration calls it, or else by the names of its tensors.

        Raises:
            ModelError: there is none for what the configuration names, or it does not name the class of an
                encoder-decoder.
        """
        if not architectures and len(self.config.depth_fields) > 1:
            raise ModelError(f"Say in config.json which class it is, as architectures: {', '.join(self.classes)}.")
        if not architectures:
            return getattr(models, self.ours + self.head_of(names))
        known = self.classes | {own.__name__: own for own in self.classes.values()}
        if architectures[0] not in known:
            raise ModelError(f"There is no class of ours for {architectures[0]}, only for {', '.join(self.classes)}.")
        return known[architectures[0]]

    def head_of(self, names: Iterable[str]) -> str:
        """The end of the name of a class, as in `HEADS`, by the names of a checkpoint's tensors."""
        names = list(names)
        firsts = {name.split(".")[0] for name in names}
        base: type[PreTrainedModel] = getattr(models, f"{self.ours}Model")
        # A head that shares the weights of the embedding has no tensor; a backbone alone has no prefix.
        tied = ["ForCausalLM"] if base.base_model_prefix in firsts else []
        heads = [head for first, head in HEAD_TENSORS if first in firsts] + tied
        if any(".pooler." in name for name in names):  # of the two that BERT calls a classifier, the one that pools
            heads = ["ForSequenceClassification" if head == "ForTokenClassification" else head for head in heads]
        return next((head for head in heads if hasattr(models, self.ours + head)), "Model")

    @property
    def stacks(self) -> tuple[StackSites, ...]:
        """Where the family keeps its norms and projections."""
        return getattr(models, f"{self.ours}Model").stacks


# What a head's tensors are called, and the head; a family has one of those that share a name.
HEAD_TENSORS = (
    ("lm_head", "ForCausalLM"),
    ("embed_out", "ForCausalLM"),
    ("cls", "ForMaskedLM"),
    ("score", "ForSequenceClassification"),
    ("classifier", "ForImageClassification"),
    ("classifier", "ForTokenClassification"),
    ("qa_outputs", "ForQuestionAnswering"),
)

# model_type of the stock configuration -> family
FAMILIES = {
    "bert": Family("LNFreeBert", "Bert", None),  # its epsilon is that of the embeddings' norm, too
    "gpt2": Family("LNFreeGPT2", "GPT2", "layer_norm_epsilon"),
    "gpt_neox": Family("LNFreeGPTNeoX", "GPTNeoX", "layer_norm_eps"),
    "llama": Family("LNFreeLlama", "Llama", "rms_norm_eps"),
    "opt": Family("LNFreeOPT", "OPT", None),
    "qwen3": Family("LNFreeQwen3", "Qwen3", "rms_norm_eps"),
    "t5": Family("LNFreeT5", "T5", "layer_norm_epsilon"),
    "vit": Family("LNFreeViT", "ViT", "layer_norm_eps"),
    "whisper": Family("LNFreeWhisper", "Whisper", None),
}


def family_of(model_type: str) -> Family:
    """
    Raises:
        ModelError: neither a family of ours nor the stock one behind it.
    """
    for stock, family in FAMILIES.items():
        if model_type in (stock, family.config.model_type):
            return family
    known = ", ".join(f"{family.stock} ({name})" for name, family in FAMILIES.items())
    raise ModelError(f"model_type {model_type!r} is not known here. Models that can be converted: {known}.")


def stacks_of(model: PreTrainedModel) -> tuple[StackSites, ...]:
    """
    Where a model keeps its norms and projections: what its class declares, or the family of ours that it is stock of.

    Raises:
        ModelError: neither.
    """
    base = model.base_model
    return base.stacks if isinstance(base, LNFreeMixin) else family_of(model.config.model_type).stacks


def stack_of(model: PreTrainedModel) -> StackSites:
    """
    The stack of a model that has one.

    Raises:
        ModelError: as `stacks_of`, or a model with an encoder and a decoder.
    """
    stacks = stacks_of(model)
    if len(stacks) > 1:
        raise ModelError(f"{type(model).__name__} has {len(stacks)} stacks of blocks, and this works on one.")
    return stacks[0]


def require_plain(model: PreTrainedModel) -> None:
    """Raise ModelError for a model with adapters, which stand between its norms and its weights, or one offloaded."""
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ModelError("The model has adapters: merge them first (merge_and_unload), and adapt what comes out anew.")
    if away := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ModelError(
            f"The model has no values for {listed(away)}: it is offloaded, or on the meta device. Load it without "
            "device_map, on one device that holds all of it."
        )


def set_block_norms(config: PreTrainedConfig, kinds: list[str]) -> None:
    """The norm of every block, said once where all are alike."""
    config.norm, config.layer_norms = kinds[0], None if len(set(kinds)) == 1 else kinds


def placed(model: PreTrainedModel, where: torch.dtype | torch.device) -> PreTrainedModel:
    """`model.to(where)`, in place: a decorator of transformers hides that method's signature from type checkers."""
    return cast(PreTrainedModel, cast(nn.Module, model).to(where))


def blank(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype, own: Iterable[str] = ()
) -> PreTrainedModel:
    """
    A model to be filled with weights: none are drawn, so random numbers stay where they are; tied ones are tied.

    Args:
        own: parameters that are not tied in this model, whatever its class ties.
    """
    with no_init_weights():
        model = model_class(config)
    model.tie_weights()
    for name in own:
        holder, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(holder), leaf, nn.Parameter(model.get_parameter(name).detach().clone()))
    return placed(model, dtype)


def own_weights(model: PreTrainedModel) -> list[str]:
    """What the class of a model ties and this model does not: the heads of T5 1.1 are no embeddings."""
    tied = (model._tied_weights_keys or {}).items()
    return [name for name, source in tied if model.get_parameter(name) is not model.get_parameter(source)]
