"""Stock models some of whose modules were replaced, as `hf_lnfree.replace_norms` leaves them.

What was replaced stands in the configuration, under `replacements`. A model is of a subclass of its stock class, with
the same name, since transformers and PEFT decide much by names. Such a subclass is made when this module is asked for
it: `replaced.MistralForCausalLM`. On disk its configuration has a `model_type` that no stock class reads, because one
would draw norms of its own without a word.
"""

import json
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.models.auto import modeling_auto

from .activations import LearnableLeakyReLU, build_activation
from .errors import ConfigurationError
from .normalizations import build_norm

VERSION = 1  # of what stands under `replacements`
MODEL_TYPE = "lnfree_replaced"

NormKind = Literal["layernorm", "rmsnorm"]


@dataclass(frozen=True, kw_only=True)
class NewNorms:
    """
    Norms of one kind, and what stands in their place.

    Args:
        norm: a name in `NORMALIZATIONS`.
        was: what the stock modules compute.
        width: D, which they normalise over.
        eps: what they add to the mean square.
        alpha: where that of "dyt" and "derf" starts.
        paths: the modules, from the model on that was saved.
    """

    norm: str
    was: NormKind
    width: int
    eps: float
    alpha: float
    paths: list[str] = field(default_factory=list)

    def build(self) -> nn.Module:
        """The module for one of the paths."""
        with torch.device("meta"):
            stock = (nn.LayerNorm if self.was == "layernorm" else nn.RMSNorm)(self.width, eps=self.eps)
        alphas = {f"norm_alpha_{feeds}": None for feeds in ("attention", "mlp", "final")}
        numbers = SimpleNamespace(norm_alpha=self.alpha, **alphas)
        return build_norm(self.norm, stock, cast(PreTrainedConfig, numbers), "final")


@dataclass(frozen=True, kw_only=True)
class NewActivations:
    """
    Activations that take the place of those of MLPs of one width.

    Args:
        activation: a name in transformers' `ACT2FN`.
        width: how many there are per token.
        negative_slope: that of "leaky_relu", and where those that are learned start.
        slope_scope: whether each learns a slope of its own, or all of the model one.
        paths: the modules, from the model on that was saved.
    """

    activation: str
    width: int
    negative_slope: float
    slope_scope: Literal["layer", "global"]
    paths: list[str] = field(default_factory=list)

    def build(self) -> nn.Module:
        """The module for one of the paths."""
        return build_activation(self.activation, self.width, self.negative_slope)


New = NewNorms | NewActivations


def written(news: list[New], config: PreTrainedConfig) -> dict[str, Any]:
    """What stands under `replacements`."""
    return {
        "version": VERSION,
        "model_type": config.model_type,
        "norms": [asdict(new) for new in news if isinstance(new, NewNorms)],
        "activations": [asdict(new) for new in news if isinstance(new, NewActivations)],
    }


def read(replacements: dict[str, Any]) -> list[New]:
    """
    Raises:
        ConfigurationError: a later version of the package wrote it.
    """
    if replacements["version"] > VERSION:
        raise ConfigurationError(
            f"What was replaced is written in version {replacements['version']}, and this code reads up to {VERSION}: "
            "upgrade hf_lnfree, or load with trust_remote_code=True if the code lies beside the checkpoint."
        )
    norms = [NewNorms(**new) for new in replacements["norms"]]
    return [*norms, *(NewActivations(**new) for new in replacements["activations"])]


def put(model: nn.Module, path: str, new: New) -> nn.Module:
    """Set a module like the one that it replaces: on its device, in its dtype and mode; returns it."""
    old, module = model.get_submodule(path), new.build()
    like = next((p for m in (old, model) for p in m.parameters() if p.is_floating_point()), torch.empty(0))
    module = module.to("meta") if like.is_meta else module.to(like.device, like.dtype)
    model.set_submodule(path, module.train(old.training))
    return module


def locate(model: PreTrainedModel, path: str) -> str | None:
    """Where a model has what the saved one had at a path: a head has its base model under a prefix."""
    there = dict(model.named_modules(remove_duplicate=False))
    prefix = f"{model.base_model_prefix}."
    return next((p for p in (path, path.removeprefix(prefix), prefix + path) if p in there), None)


def share_slopes(model: PreTrainedModel) -> dict[str, str]:
    """Make one parameter of a global slope; returns {its other names: the first}, as `_tied_weights_keys` has it."""
    holders = [
        holder
        for new in read(model.config.replacements)
        if isinstance(new, NewActivations) and new.slope_scope == "global"
        for path in new.paths
        if (holder := locate(model, path)) and isinstance(model.get_submodule(holder), LearnableLeakyReLU)
    ]
    slopes = [cast(LearnableLeakyReLU, model.get_submodule(holder)) for holder in holders]
    for other in slopes[1:]:
        other.negative_slope = slopes[0].negative_slope
    return {f"{holder}.negative_slope": f"{holders[0]}.negative_slope" for holder in holders[1:]}


# At run time the bases of the mixins are the stock classes that they stand before.
if TYPE_CHECKING:
    ConfigBase = PreTrainedConfig
    ModelBase = PreTrainedModel
else:
    ConfigBase = ModelBase = object


class ReplacedConfigMixin(ConfigBase):
    """A stock configuration that says what was replaced."""

    replacements: dict[str, Any]

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("model_type", None)  # of the file; in memory it is the stock one
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> Any:
        stored, unused = super().get_config_dict(*args, **kwargs)
        return ({**stored, "model_type": cls.model_type} if "replacements" in stored else stored), unused

    def to_json_string(self, *args: Any, **kwargs: Any) -> str:
        stored = {**json.loads(super().to_json_string(*args, **kwargs)), "model_type": MODEL_TYPE}
        return json.dumps(stored, indent=2, sort_keys=True) + "\n"


class ReplacedConfig(PreTrainedConfig):
    """What `model_type` on disk stands for: reads the configuration of the stock model's own kind."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A configuration of the class for what was replaced in it."""
        stock: Any = CONFIG_MAPPING[config_dict["replacements"]["model_type"]]
        return config_class(stock).from_dict(config_dict, **kwargs)


class ReplacedMixin(ModelBase):
    """Put before a stock class: replaces again what its configuration says was replaced, and initialises it."""

    @classmethod
    def is_custom_code(cls) -> bool:
        # Weights are named, renamed and initialised as those of the stock class.
        return False

    def post_init(self) -> None:
        if self.base_model is self or not isinstance(self.base_model, ReplacedMixin):
            self.replace_again()
        super().post_init()

    def replace_again(self) -> None:
        """
        Raises:
            ConfigurationError: a module that was replaced in the model that was saved is not there.
        """
        whole = type(self).__name__ in (self.config.architectures or ())
        for new in read(self.config.replacements):
            for path in new.paths:
                if (here := locate(self, path)) is not None:
                    put(self, here, new)
                elif whole:  # another head may have only one of the stacks
                    raise ConfigurationError(f"{path} was replaced in what was saved, and is not there.")
        self.tie_slopes()

    def tie_slopes(self) -> None:
        """One global slope is one parameter, here and on disk."""
        self.slope_keys = share_slopes(self)
        self._tied_weights_keys: dict[str, str] = (self._tied_weights_keys or {}) | self.slope_keys

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        # Stock ties nothing when tie_word_embeddings is off; a global slope is tied regardless.
        return super().get_expanded_tied_weights_keys(all_submodels) | getattr(self, "slope_keys", {})

    @torch.no_grad()
    @init.guard_torch_init_functions()
    def initialize_weights(self) -> None:
        super().initialize_weights()
        for module in self.modules():  # those that a checkpoint has are left as they are
            if hasattr(module, "built"):
                fresh = build_activation(*cast("tuple[str, int, float]", module.built))
                for name, value in fresh.state_dict(keep_vars=True).items():
                    init.copy_(getattr(module, name), value)
            elif hasattr(module, "norm_name") and hasattr(module, "reset_parameters"):
                cast(Any, module).reset_parameters()


MADE: dict[type, type] = {}  # stock class -> its subclass


def config_class(stock: type[PreTrainedConfig]) -> Any:
    """The class of configurations, known to the Auto classes beside those of its models."""
    if stock not in MADE:
        made = MADE[stock] = type(stock.__name__, (ReplacedConfigMixin, stock), {"__module__": __name__})
        cast(Any, made)._auto_class = "AutoConfig"
        for auto, models in auto_classes(stock).items():
            for model in models:
                getattr(modeling_auto, auto).register(made, model_class(model), exist_ok=True)
    return MADE[stock]


def model_class(stock: type[PreTrainedModel]) -> Any:
    """The class of models; `save_pretrained` of one lays this file beside the weights."""
    if stock not in MADE:
        assert stock.config_class is not None
        MADE[stock] = made = type(stock.__name__, (ReplacedMixin, stock), {"__module__": __name__})
        cast(Any, made).config_class = configuration = config_class(stock.config_class)
        assert configuration is not None
        autos = [auto for auto, models in auto_classes(stock.config_class).items() if stock in models]
        cast(Any, made)._auto_class = (autos or [stock.__name__])[0]
    return MADE[stock]


def auto_classes(stock: type[PreTrainedConfig]) -> dict[str, tuple[type[PreTrainedModel], ...]]:
    """Auto class -> the stock models that it has for a stock configuration."""
    found = {}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None) if name.startswith("AutoModel") else None
        if mapping is not None and stock in mapping:
            models = mapping[stock] if isinstance(mapping[stock], tuple) else (mapping[stock],)
            found[name] = tuple(model for model in models if model.config_class is stock)
    return {name: models for name, models in found.items() if models}


def auto_map(stock: type[PreTrainedConfig]) -> dict[str, str]:
    """Where the Auto classes find the models of a configuration in the code beside a checkpoint."""
    module = __name__.rpartition(".")[2]
    models = {auto: f"{module}.{models[0].__name__}" for auto, models in auto_classes(stock).items()}
    return {"AutoConfig": f"{module}.{stock.__name__}", **models}


def __getattr__(name: str) -> Any:
    stock = getattr(transformers, name, None) if not name.startswith("_") else None
    if isinstance(stock, type) and issubclass(stock, PreTrainedModel):
        return model_class(stock)
    if isinstance(stock, type) and issubclass(stock, PreTrainedConfig):
        return config_class(stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
