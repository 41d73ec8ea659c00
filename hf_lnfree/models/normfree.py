"""The idea of the package: the stock graph is rewired to what a configuration asks for.

A family is data (`StackSites`). The classes of transformers build their own graph; before they initialise it,
`LNFreeMixin` swaps norms and activations, so attention, caches and generation stay theirs.
"""

import math
import warnings
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from .activations import FUSED, LEARNED, LearnableLeakyReLU, build_activation
from .biases import QueryKeyBias, freeze_bias, train_query_key_bias_only
from .errors import ConfigurationError
from .honoured import refuse_unhonoured
from .host import name_task, norms_to_tune
from .normalizations import Feeds, build_norm
from .removal import FirstPosition, RemovalNorm
from .sites import AttentionBranch, Branch, Projection, StackSites, matrix_shape
from .softcap import cap_logits
from .stabilizers import EmbeddingScale, HeadControl, QueryKeyControl, ResidualGain, ScaledMLP, gain_path
from .weight_norms import NormedWeight, norm_weight


def rewire(model: PreTrainedModel, stacks: tuple[StackSites, ...]) -> None:
    """Give the stacks of a stock model the norms, activations, biases and stabilisers of `model.config`, in place."""
    config = model.config
    refuse_unhonoured(model, stacks)
    blocks = [(stack, block) for stack in stacks for block in stack.block_list(model)]
    # An encoder alone has the first of them: its configuration counts the layers of a decoder, too.
    norms, activations = config.block_norms[: len(blocks)], config.block_activations[: len(blocks)]
    for (stack, block), norm, activation in zip(blocks, norms, activations, strict=True):
        layers = len(stack.block_list(model))
        for branch in stack.branches(block).values():
            block.set_submodule(branch.norm, build_norm(norm, branch.norm_module(block), config, feeds(branch)))
            mark_writer(block, branch, layers)
        if activation == FUSED:
            stack.mlp.fuse(block)
        module = build_activation(activation, stack.mlp.width(block), config.negative_slope)
        block.set_submodule(stack.mlp.activation, ScaledMLP(module) if config.ffn_scale else module)
        if config.linear_bias == "query_key":
            freeze_biases(block, stack, config)
        stabilize(block, stack, layers, config)
    for stack in stacks:
        if stack.final_norm is not None:
            final = model.get_submodule(stack.final_norm)
            model.set_submodule(stack.final_norm, build_norm(config.final_norm, final, config, "final"))
        if config.embedding_scale:
            assert stack.embedding_dropout is not None
            dropout = cast(nn.Dropout, model.get_submodule(stack.embedding_dropout))
            model.set_submodule(stack.embedding_dropout, EmbeddingScale(dropout.p, config.hidden_size))
    connect_removal(model, stacks)


def feeds(branch: Branch) -> Feeds:
    """What reads the norm of a branch: the branch itself, or with norms behind branches the next one."""
    return "attention" if isinstance(branch, AttentionBranch) != branch.post_norm else "mlp"


def mark_writer(block: nn.Module, branch: Branch, layers: int) -> None:
    """Tell the module that holds the writer of a branch which of its children that is, and of how many layers."""
    parent, _, child = branch.writer.rpartition(".")
    holder = block.get_submodule(parent)
    marks = {**getattr(holder, "residual_writers", {}), child: layers}
    holder.residual_writers = marks  # type: ignore[assignment]  # a mark, no child


def freeze_biases(block: nn.Module, stack: StackSites, config: PreTrainedConfig) -> None:
    """Of the biases of a block, leave those of query and key to be trained, in place."""
    held = {path: m for branch in stack.branches(block).values() for path, m in branch.projections(block).items()}
    for attention in stack.attentions(block):
        if attention.fused:
            value_size = config.hidden_size // attention.groups(config.num_attention_heads)
            train_query_key_bias_only(held.pop(attention.readers[0]), value_size)
        else:
            query, key, _ = attention.query_key_value_readers
            del held[query], held[key]
    freeze_bias(held.values())


def stabilize(block: nn.Module, stack: StackSites, layers: int, config: PreTrainedConfig) -> None:
    """Residual gains, control of queries, keys and logits, and normed weights of one block, in place."""
    branches = stack.branches(block)
    if config.residual_gain != "none":
        shared = None
        for name, branch in branches.items():
            p = 0.0 if branch.dropout is None else cast(nn.Dropout, block.get_submodule(branch.dropout)).p
            gain = ResidualGain(p, config.residual_gain, layers, shared)
            block.set_submodule(branch.dropout or gain_path(name), gain)
            if branch.dropout is None:
                gain.attach(block, branch.writer)
            shared = shared or (gain if config.residual_gain == "rezero" else None)
    for attention in stack.attentions(block):
        module = block.get_submodule(attention.module)
        for path in attention.query_key_norms if not config.query_key_norm else ():
            block.set_submodule(path, nn.Identity())
        own = config.query_key_norm and not attention.query_key_norms
        if own or config.attention_temperature:
            control_heads(block, attention, config, own)
        if config.attention_softcap is not None:
            cap_logits(module, config.attention_softcap)
    if config.weight_norm != "none":
        for branch in branches.values() if config.weight_norm_scope == "block" else (stack.mlp,):
            for projection in branch.projections(block).values():
                norm_weight(projection, config.weight_norm)


def control_heads(block: nn.Module, attention: AttentionBranch, config: PreTrainedConfig, norm: bool) -> None:
    """Query-key norm and temperatures of one attention, in place; keys have no temperature."""
    module, heads = block.get_submodule(attention.module), getattr(config, attention.heads_field)
    temperature = config.attention_temperature
    if attention.fused:
        module.query_key = QueryKeyControl(heads, attention.groups(heads), norm, temperature)
        module.query_key.attach(block, attention.readers[0])
        return
    query, key, *_ = attention.query_key_norms or attention.query_key_value_readers
    projections = attention.projections(block)
    queries, keys = (matrix_shape(projections[path])[0] for path in attention.query_key_value_readers[:2])
    # Not "query..." or "key...": transformers renames what old checkpoints of ViT call so.
    module.q_control = HeadControl(heads, norm, temperature, split=bool(attention.query_key_norms))
    module.q_control.attach(block, query)
    if norm:
        module.k_control = HeadControl(heads * keys // queries, norm, False)
        module.k_control.attach(block, key)


def connect_removal(model: PreTrainedModel, stacks: tuple[StackSites, ...]) -> None:
    """Tell the norms that are being removed where sequences begin, and which projection makes values of them."""
    for stack in stacks:
        owner = model.get_submodule(stack.blocks.rpartition(".")[0])  # OPT's head calls its decoder past its backbone
        norms = [module for module in owner.modules() if isinstance(module, RemovalNorm)]
        if not norms:
            continue
        first = FirstPosition()
        owner.register_forward_pre_hook(first.locate, with_kwargs=True)
        for removed in norms:
            removed.first = first
        for block in stack.block_list(model):
            for attention in stack.attentions(block):
                norm = attention.norm_module(block)
                if not isinstance(norm, RemovalNorm) or attention.post_norm or attention.encoder_readers:
                    continue
                if attention.fused:
                    norm.read_by(block, attention.readers[0], attention.groups(model.config.num_attention_heads))
                else:
                    norm.read_by(block, attention.query_key_value_readers[2], groups=0)


def refuse_quantisation(model: PreTrainedModel) -> None:
    """
    Raises:
        ConfigurationError: what a projection adds to a plain one would be lost with its class.
    """
    config = model.config
    if config.weight_norm != "none":
        raise ConfigurationError(
            f"Weights of weight_norm={config.weight_norm!r} are computed and cannot be quantised. Fold first "
            "(hf_lnfree.conversion.fold, or `hf-lnfree convert --to folded`), and quantise what comes out."
        )
    if config.linear_bias != "all":
        raise ConfigurationError(
            "Projections with frozen biases (linear_bias='query_key') cannot be quantised. Load the model with "
            "linear_bias='all', which computes the same."
        )


def refuse_tensor_parallelism(model: PreTrainedModel) -> None:
    """
    Raises:
        ConfigurationError: a part of the model needs more of a layer than the share that each process would have.
    """
    config = model.config
    learned = any(isinstance(module, LEARNED) for module in model.modules())
    asked = {
        # Which counts the heads in a projection's output; that of the stock attention stands behind it.
        "query_key_norm": config.query_key_norm and not config.stock_query_key_norm,
        "attention_temperature": config.attention_temperature,
        f"weight_norm={config.weight_norm!r}": config.weight_norm != "none",  # over whole rows and columns
        "linear_bias='query_key'": config.linear_bias != "all",
        "ffn_scale": config.ffn_scale,  # as below: each process would have the gradient of its own units alone
        "an activation that learns": learned,
        f"the activation {FUSED!r}": FUSED in config.block_activations,  # one matrix, where plans have two
        "norms that are being removed": any(isinstance(module, RemovalNorm) for module in model.modules()),
    }
    if found := [name for name, there in asked.items() if there]:
        raise ConfigurationError(
            f"Tensor parallelism would compute or train something else with {', '.join(found)}. Load the model with "
            "device_map, train it with FSDP or DDP, or fold first what can be folded (`hf-lnfree convert --to folded`)."
        )


def named_slopes(model: nn.Module) -> dict[str, nn.Parameter]:
    """The learnable slopes of a model by module name; a global slope appears under each of its names."""
    return {
        name: module.negative_slope for name, module in model.named_modules() if isinstance(module, LearnableLeakyReLU)
    }


def shared_slope_keys(model: PreTrainedModel) -> dict[str, str]:
    """{tied parameter: its source} for the layers that share one global slope, as `_tied_weights_keys` has it."""
    if model.config.slope_scope != "global":
        return {}
    source, *tied = [f"{name}.negative_slope" for name in named_slopes(model)] or [""]
    return dict.fromkeys(tied, source)


STABILIZERS = (ScaledMLP, ResidualGain, HeadControl, EmbeddingScale)
# Arguments of from_pretrained that say where a checkpoint lies.
PLACE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

# At run time the base of the mixin is the stock class that it stands before.
if TYPE_CHECKING:
    Base = PreTrainedModel
else:
    Base = object


class LNFreeMixin(Base):
    """Put before a stock class: rewires the graph, initialises what the study adds, ties the global slope."""

    stacks: ClassVar[tuple[StackSites, ...]]
    """Where the family keeps what is swapped: one stack of blocks for a decoder, two for an encoder-decoder."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        name_task(cls)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """
        As in transformers.

        Raises:
            ConfigurationError: a stock checkpoint, which has norms, without a word on what becomes of them.
        """
        if pretrained_model_name_or_path is not None and not {"config", "norm", "layer_norms"} & set(kwargs):
            place = {name: kwargs[name] for name in PLACE if name in kwargs}
            config_class: Any = cls.config_class
            stored, _ = config_class.get_config_dict(pretrained_model_name_or_path, **place)
            if stored.get("model_type", config_class.model_type) != config_class.model_type:
                raise ConfigurationError(
                    f"{pretrained_model_name_or_path} is a stock {stored['model_type']} with norms, and "
                    f"{config_class.__name__} has norm='none' by default: they would be dropped. Pass "
                    f'norm="{config_class.stock_norm}" to keep them, or norm="none" to drop those of the blocks.'
                )
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def post_init(self) -> None:
        if self.base_model is self and not getattr(self, "_rewired", False):  # a head's backbone is rewired already
            rewire(self, self.stacks)
            self._rewired = True  # should post_init be called again, on weights that are trained
            # What save_pretrained reads to write a shared parameter once.
            self._tied_weights_keys = (self._tied_weights_keys or {}) | shared_slope_keys(self)
        super().post_init()

    def _sdpa_can_dispatch(self, is_init_check: bool = False) -> bool:
        if self.config.attention_softcap is not None:
            raise ConfigurationError(
                "scaled_dot_product_attention cannot cap logits (attention_softcap). Load the model with "
                'attn_implementation="eager", or with one that can: flash attention, "flex_attention" for GPT-NeoX.'
            )
        return super()._sdpa_can_dispatch(is_init_check)

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        # Stock ties nothing when tie_word_embeddings is off; a global slope is tied regardless.
        tied = super().get_expanded_tied_weights_keys(all_submodels)
        return tied if all_submodels or self.base_model is not self else tied | shared_slope_keys(self)

    @classmethod
    def is_custom_code(cls) -> bool:
        # Of custom code transformers initialises no module without parameters of its own. Those that scale residual
        # projections and the attentions of T5 are such; the stock stacks within a model are told the same.
        return False

    @torch.no_grad()
    @init.guard_torch_init_functions()
    def initialize_weights(self) -> None:
        normed: dict[nn.Module, Any] = {m: type(m) for m in self.modules() if isinstance(m, NormedWeight)}
        for module, kind in normed.items():  # rules of stock classes write into `weight`
            module.__class__ = kind.plain
        super().initialize_weights()
        for module, kind in normed.items():
            module.__class__ = kind
        # A stack that is a model of its own (OPT, T5) was initialised by the stock class's rules.
        for module in self.modules():
            if not getattr(module, "_study_initialized", False):
                self._init_study(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not self._init_study(module):
            super()._init_weights(module)

    def _init_study(self, module: nn.Module) -> bool:
        """Initialise what the study adds or changes; whether the module is that."""
        if isinstance(module, NormedWeight):
            module.reset_norm()  # what is trained has been drawn
        elif hasattr(module, "residual_writers"):
            for name, layers in cast("dict[str, int]", module.residual_writers).items():
                if self.config.residual_init == "scaled":
                    # OPT and Whisper call it init_std.
                    whole = getattr(self.config, "init_std", None) or getattr(self.config, "initializer_range", 0.02)
                    self._init_writer(getattr(module, name), cast(float, whole) / math.sqrt(2 * layers))
        elif hasattr(module, "built"):
            fresh = build_activation(*cast("tuple[str, int, float]", module.built))
            for name, value in fresh.state_dict(keep_vars=True).items():
                init.copy_(getattr(module, name), value)
        elif hasattr(module, "norm_name") or isinstance(module, STABILIZERS):
            if (reset := getattr(module, "reset_parameters", None)) is not None:
                reset()
        else:
            return False
        module._study_initialized = True  # type: ignore[assignment]  # a mark, no child
        return True

    def _init_writer(self, writer: Projection | NormedWeight, std: float) -> None:
        """A projection into the residual stream, drawn anew."""
        if isinstance(writer, NormedWeight):
            init.normal_(writer.trained, mean=0.0, std=std)
            writer.reset_norm()
        else:
            init.normal_(writer.weight, mean=0.0, std=std)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "is_quantized" and value:  # a quantiser marks the model, then exchanges its projections
            refuse_quantisation(self)
        if name == "_tp_size" and (value or 1) > 1:  # transformers marks the model, then shares its projections out
            refuse_tensor_parallelism(self)
        if name == "peft_config":  # adapters were put in; PEFT itself compares shapes only
            trained_on = {config.base_model_name_or_path for config in value.values()} - {None, "", self.name_or_path}
            if trained_on and self.name_or_path:
                warnings.warn(
                    f"An adapter trained on {', '.join(sorted(trained_on))} is put on {self.name_or_path}. Weights of "
                    "the same shape fit, whatever they mean: if LayerNorms were removed or folded in between, merge "
                    "the adapter into the model it was trained on, or train it anew.",
                    stacklevel=2,
                )
        super().__setattr__(name, value)

    def get_parameter(self, target: str) -> nn.Parameter:
        """As in torch, by the names of `named_parameters`; of a normed weight what is trained."""
        path, _, name = target.rpartition(".")
        module = self.get_submodule(path)
        if isinstance(module, NormedWeight) and name == "weight":
            return cast(nn.Parameter, module.trained)
        return super().get_parameter(target)

    def norms_to_tune(self, asked: Any) -> Any:
        """PEFT's `LNTuningConfig` without the norms that have nothing to train, see `host.norms_to_tune`."""
        return norms_to_tune(self, self.stacks, asked)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As in transformers; `only_trainable` leaves out the frozen part of a query/key-only bias as well."""
        total = super().num_parameters(only_trainable, exclude_embeddings)
        if not only_trainable:
            return total
        fused = (m for m in self.modules() if isinstance(m, QueryKeyBias) and m.bias.requires_grad)
        return total - sum(m.num_frozen for m in fused)
