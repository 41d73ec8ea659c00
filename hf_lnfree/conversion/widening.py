r"""A norm-free model whose residual stream has no mean, at the price of one dimension a head.

A stock LayerNorm always centres. A model that was trained without norms reads the mean of its stream, so the stream
gets a coordinate that holds $-\sum_i x_i$: its mean is zero then, centring does nothing, and no projection reads the
new coordinate. Width is a multiple of the number of heads, hence one dimension more for each of them; those stay zero.
"""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from ..errors import ModelError
from .families import blank
from .folding import as_linear, norm_sites


@torch.no_grad()
def without_mean(model: PreTrainedModel) -> PreTrainedModel:
    """
    A model with equal logits, `num_attention_heads` wider, whose residual stream has mean zero.

    Args:
        model: of this package, without norms.

    Raises:
        ModelError: it has cross-attention, whose keys are read from another stream.
    """
    if getattr(model.config, "add_cross_attention", False):
        raise ModelError(
            "A model with cross-attention that was trained without norms cannot be made one with a centred stream."
        )
    sites, config = model.base_model.sites, copy.deepcopy(model.config)
    heads, width = config.num_attention_heads, config.hidden_size
    size = width // heads
    config.hidden_size = width + heads
    config.tie_word_embeddings = False  # the embedding has sums, the head zeros
    config.linear_bias = "all"  # the others hold sums now
    if hasattr(config, "n_inner"):
        config.n_inner = config.n_inner or 4 * width
    if getattr(config, "rope_parameters", None):
        rotated = int(size * config.rope_parameters.get("partial_rotary_factor", 1.0))
        config.rope_parameters["partial_rotary_factor"] = (rotated + 0.5) / (size + 1)  # rounded down
    new = blank(type(model), config, model.dtype)

    def closed(x: Tensor) -> Tensor:
        """[..., D] -> [..., D + heads], minus the sum behind what was there."""
        return pad(torch.cat((x, -x.sum(-1, keepdim=True)), dim=-1), (0, heads - 1))

    def with_room(rows: Tensor) -> Tensor:
        """Rows of the fused projection: a dimension more for each of query, key and value of each head."""
        groups = sites.fused_groups(config)
        parts = pad(rows.unflatten(0, (groups, 3, heads // groups, size)).movedim(3, -1), (0, 1))
        if getattr(config, "scale_attn_weights", True):  # queries are divided by the root of a larger size
            parts[:, 0] *= math.sqrt((size + 1) / size)
        return parts.movedim(-1, 3).flatten(0, 3)

    def put(name: str, weight: Tensor, bias: Tensor | None) -> None:
        module = new.get_submodule(name)
        target = module.weight if isinstance(module, nn.Embedding) else as_linear(module)
        target.copy_(weight)
        if bias is not None:
            module.bias.copy_(bias)

    names = {module: name for name, module in model.named_modules()}
    for name in sites.embeddings:
        module = model.base_model.get_submodule(name)
        put(names[module], closed(module.weight.double()), None)
    for site in norm_sites(model):
        for reader in site.readers:
            weight, bias = as_linear(reader).double(), None if reader.bias is None else reader.bias.double()
            if names[reader].endswith(str(sites.query_key_value)):
                weight, bias = with_room(weight), None if bias is None else with_room(bias)
            put(names[reader], pad(weight, (0, heads)), bias)
    for index in range(config.num_hidden_layers):
        for path, writer in sites.writers(model.base_model.get_submodule(f"{sites.blocks}.{index}")).items():
            weight, bias = as_linear(writer).double(), None if writer.bias is None else closed(writer.bias.double())
            if path == sites.residual_writers[0]:
                weight = pad(weight.unflatten(1, (heads, size)), (0, 1)).flatten(1)
            put(names[writer], closed(weight.T).T, bias)
    slopes = {name: value for name, value in model.state_dict().items() if name.endswith("negative_slope")}
    new.load_state_dict(slopes, strict=False)
    new.generation_config = copy.deepcopy(model.generation_config)
    return new.to(model.device).train(model.training)
