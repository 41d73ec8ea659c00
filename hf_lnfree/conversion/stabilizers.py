"""Everything linear that is neither a norm of activations nor a bias, folded into the weights."""

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import ModelError
from ..models.activations import FUSED
from ..models.sites import AttentionBranch, MLPBranch, Projection, StackSites
from ..models.stabilizers import EmbeddingScale, HeadControl, ResidualGain, ScaledMLP, gain_path
from ..models.weight_norms import NormedWeight, plain_weight
from .families import stacks_of
from .norm_sites import as_linear, beginnings


def has_linear_stabilizers(config: PreTrainedConfig) -> bool:
    """Whether `fold_stabilizers` finds something."""
    temperature = config.attention_temperature and not config.query_key_norm
    gains = config.residual_gain != "none" or config.ffn_scale or config.embedding_scale
    return config.weight_norm != "none" or gains or temperature


def fold_stabilizers(model: PreTrainedModel) -> None:
    """Normed weights, the scale of embeddings, residual gains, scales of MLPs and temperatures of heads, in place."""
    config = model.config
    for module in list(model.modules()):
        if isinstance(module, NormedWeight):
            plain_weight(module)
    for stack in stacks_of(model):
        for block in stack.block_list(model.base_model):
            fold_mlp_scales(block, stack.mlp)
            fold_gains(block, stack)
            for attention in stack.attentions(block):
                fold_temperatures(block, attention)
        fold_embedding_scale(model, stack)
    config.weight_norm, config.residual_gain, config.ffn_scale = "none", "none", False
    config.attention_temperature = config.attention_temperature and config.query_key_norm


def head_is_tied(model: PreTrainedModel) -> bool:
    """Whether the head has the weights of the token embedding."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def untie_head(model: PreTrainedModel) -> None:
    """Give a head that has the weights of the token embedding some of its own, in place."""
    if head_is_tied(model):
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.clone())
        if len(model._tied_weights_keys or {}) == 1:  # T5 ties the embeddings of its stacks by the same field
            model.config.tie_word_embeddings = False


def fold_embedding_scale(model: PreTrainedModel, stack: StackSites) -> None:
    """
    The learned scalar of the embeddings, into each of them; a head that shares their weights keeps its own.

    Raises:
        ModelError: a norm stands between the embeddings and the scalar.
    """
    base, path = model.base_model, stack.embedding_dropout
    scaled = None if path is None else base.get_submodule(path)
    if not isinstance(scaled, EmbeddingScale):
        return
    if not stack.embeddings:
        raise ModelError(f"The scale of the embeddings of {type(model).__name__} stands behind a norm: not folded.")
    untie_head(model)
    for start in beginnings(model, stack):
        start.mul_(scaled.scale)
    base.set_submodule(str(path), nn.Dropout(scaled.p))
    model.config.embedding_scale = False


def fold_mlp_scales(block: nn.Module, mlp: MLPBranch) -> None:
    """The two learned scales of a `ScaledMLP`, into its projections."""
    scaled = block.get_submodule(mlp.activation)
    if not isinstance(scaled, ScaledMLP):
        return
    before, after = scaled.scales
    projections = mlp.projections(block)
    writer = projections.pop(mlp.writer)
    if projections:  # of a gated MLP the first is activated
        scale_output(projections[mlp.readers[0]], before)
    as_linear(writer).mul_(after if projections else before * after)
    block.set_submodule(mlp.activation, scaled.activation)


def fold_gains(block: nn.Module, stack: StackSites) -> None:
    """The gain of each residual branch, into the projection that ends it."""
    for name, branch in stack.branches(block).items():
        gain = dict(block.named_modules()).get(branch.dropout or gain_path(name))
        if not isinstance(gain, ResidualGain):
            continue
        scale_output(branch.writer_module(block), gain.value)
        if branch.dropout is None:
            gain.detach(block)
            delattr(block, gain_path(name))
        else:
            block.set_submodule(branch.dropout, nn.Dropout(gain.p))


def fold_temperatures(block: nn.Module, attention: AttentionBranch) -> None:
    """Into the rows of the queries; a temperature behind a query-key norm stays."""
    module = block.get_submodule(attention.module)
    name = "query_key" if attention.fused else "q_control"
    control = getattr(module, name, None)
    if not isinstance(control, HeadControl) or control.temperature is None:
        return
    if control.norm or any(
        not isinstance(block.get_submodule(path), nn.Identity) for path in attention.query_key_norms
    ):
        return
    groups = attention.groups(control.heads)
    parts_of_a_row = 3 if attention.fused else 1
    query = attention.reader_modules(block)[0]
    for rows in (as_linear(query), query.bias):
        if rows is not None:  # groups, (q, k, v) or q, heads of a group, d, and the inputs of a weight
            parts = rows.unflatten(0, (groups, parts_of_a_row, control.heads // groups, -1))
            factor = control.temperature.view(groups, -1, *[1] * (parts.dim() - 3))
            parts[:, 0].mul_(factor)
    control.detach(block)
    delattr(module, name)


def fuse_identities(model: PreTrainedModel) -> None:
    """$W_2 (W_1 x + b_1) + b_2$ as one projection wherever nothing stands between the two, in place."""
    config, base = model.config, model.base_model
    activations = config.block_activations  # a list of its own
    blocks = [(stack, block) for stack in stacks_of(model) for block in stack.block_list(base)]
    for index, (stack, block) in enumerate(blocks):
        if activations[index] != "identity" or stack.mlp.gated:
            continue
        (reader,), writer = stack.mlp.reader_modules(block), stack.mlp.writer_module(block)
        one = stack.mlp.fuse(block)
        one.to(writer.weight)
        as_linear(one).copy_(as_linear(writer) @ as_linear(reader))
        if writer.bias is not None:
            one.bias.copy_(writer.bias + (0 if reader.bias is None else as_linear(writer) @ reader.bias))
        activations[index] = FUSED
        config.layer_activations = activations


def scale_output(projection: Projection, factor: Tensor | float) -> None:
    """The projection times a factor, in place."""
    as_linear(projection).mul_(factor)
    if projection.bias is not None:
        projection.bias.mul_(factor)
