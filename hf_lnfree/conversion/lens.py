"""A model of ours inside TransformerLens (4 or newer; the extra `lens`): its hook points, equal logits."""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ModelError
from .families import family_of, require_plain
from .norm_sites import norm_sites
from .stabilizers import fold_stabilizers

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

# What TransformerLens calls them.
NORMALIZATION_TYPES = {"none": None, "layernorm": "LN", "rmspre": "RMSPre"}


def to_transformer_lens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> "TransformerBridge":
    """
    A `TransformerBridge` around a copy of a causal language model.

    Where a norm is gone its hook points stay and see the residual stream itself; `cfg.normalization_type` is that of
    the blocks: None, "LN" or "RMSPre". Gains, scales and normed weights of the copy are folded.

    Raises:
        ModelError: TransformerLens is not there, the blocks' norms differ, a norm is half removed, or queries and keys
            are normed or logits capped.
    """
    try:
        from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    except ImportError as error:
        raise ModelError(f"This needs TransformerLens 4 or newer: pip install 'hf_lnfree[lens]' ({error}).") from error
    require_plain(model)
    family = family_of(model.config.model_type)
    if family.stock not in ("GPT2", "GPTNeoX"):
        raise ModelError(f"Only GPT-2 and GPT-NeoX go into TransformerLens without norms, and this is {family.stock}.")
    kinds = set(model.config.block_norms)
    if len(kinds) > 1 or not kinds | {model.config.final_norm} <= set(NORMALIZATION_TYPES):
        raise ModelError(
            f"TransformerLens has one normalization for all blocks ({', '.join(NORMALIZATION_TYPES)}); these are "
            f"{sorted(kinds)} and {model.config.final_norm} after the last block. A finished removal can be folded."
        )
    if model.config.query_key_norm or model.config.attention_softcap is not None:
        raise ModelError("TransformerLens computes attention itself and knows neither query-key norm nor soft-cap.")
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        fold_stabilizers(model)  # it takes the weights of projections, and passes over what stands around them
    names = {site.name.rpartition(".")[2] for site in norm_sites(model) if not isinstance(site.norm, nn.LayerNorm)}

    def without_norms(adapter: Any) -> None:
        """Components that pass on what the module of the model returns, in place of those that normalise."""
        adapter.cfg.normalization_type = NORMALIZATION_TYPES[model.config.block_norms[0]]
        blocks = adapter.component_mapping["blocks"].submodules
        for components in (adapter.component_mapping, blocks):
            for key, component in list(components.items()):
                if (component.name or "").rpartition(".")[2] in names:
                    components[key] = GeneralizedComponent(component.name, adapter.cfg)

    return build_bridge_from_module(
        model,
        family.stock_name("ForCausalLM"),
        hf_config=model.config,
        tokenizer=tokenizer,
        post_adapter_hook=without_norms,
        model_name=model.config.model_type,
    )
