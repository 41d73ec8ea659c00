"""What cannot be made of settings is found before the corpus is read: model, attention, optimiser and schedule."""

from functools import lru_cache
from typing import Any

import psutil
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, SchedulerType, Trainer, get_scheduler
from transformers.training_args import OptimizerNames

from ..checks import at_least
from ..data.arguments import DataArguments
from ..errors import LNFreeError, SettingsError
from ..loading import reason
from ..models.errors import ConfigurationError
from .arguments import LNFreeTrainingArguments, ModelArguments

BYTES_A_WEIGHT = 4
SIZES = {
    **dict.fromkeys(("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"), at_least(1)),
    **dict.fromkeys(("vocab_size", "max_position_embeddings"), at_least(1)),
    **dict.fromkeys(("initializer_range", "layer_norm_epsilon", "layer_norm_eps"), at_least(0)),
}
METRICS = ("loss", "perplexity")
# What transformers, torch and optional libraries raise for a value that they cannot take.
REFUSALS = (ValueError, TypeError, KeyError, ImportError, RuntimeError, AssertionError, AttributeError, OverflowError)


def require_possible(model_args: ModelArguments, data_args: DataArguments, args: LNFreeTrainingArguments) -> None:
    """
    Raises:
        SettingsError: as `require_model`; or the optimiser or its schedule cannot be made, or there is no such metric,
            compiler or mode of it, or windows without the labels that are named.
        ModelError: as `require_model`.
    """
    require_optimiser(args, require_model(model_args, data_args))
    if args.torch_compile:
        try:
            torch.compile(nn.Identity(), backend=args.torch_compile_backend or "inductor", mode=args.torch_compile_mode)
        except REFUSALS as error:
            fields = (
                f"torch_compile_backend={args.torch_compile_backend!r}, torch_compile_mode={args.torch_compile_mode!r}"
            )
            raise SettingsError(f"{fields}: {reason(error)}") from error
    if args.label_names is not None and "labels" not in args.label_names:
        raise SettingsError(f"label_names must be null or name 'labels', which windows have, got {args.label_names!r}.")
    metric = str(args.metric_for_best_model or METRICS[0]).removeprefix("eval_")
    if metric not in METRICS:
        raise SettingsError(f"metric_for_best_model must be one of {', '.join(METRICS)}, got {metric!r}.")


def require_model(model_args: ModelArguments, data_args: DataArguments) -> PreTrainedModel:
    """
    The model without weights, with its attention.

    Raises:
        SettingsError: the configuration makes no model, or one that has too few positions for the windows or is larger
            than this machine; or its attention cannot be had.
        ModelError: the configuration of a checkpoint cannot be read.
    """
    source = model_args.model_name_or_path or "config_overrides"
    try:
        config = model_args.config(data_args.context_length)
    except ConfigurationError as error:
        raise SettingsError(f"{source}: {error}") from error
    for name, allowed in SIZES.items():
        value = getattr(config, name, None)
        if value is not None and value not in allowed:
            raise SettingsError(f"{source}: {name} must be {allowed}, got {value!r}.")
    positions = getattr(config, "max_position_embeddings", None) or data_args.context_length
    if positions < data_args.context_length:
        raise SettingsError(
            f"The model has {positions} positions, fewer than --context-length {data_args.context_length}."
        )
    require_memory(config)
    return skeleton(config, model_args)


@lru_cache
def require_row(family: str, row: str, overrides: str, attention: str, length: int) -> None:
    """`require_model` for a new model, once for settings that many cells of a study share."""
    model = ModelArguments(family=family, row=row, config_overrides=overrides, attn_implementation=attention)
    require_model(model, DataArguments(context_length=length))


def require_memory(config: PreTrainedConfig) -> None:
    """Raise SettingsError for a model whose bare weights are larger than the memory of this machine."""
    layers, width = config.num_hidden_layers, config.hidden_size
    positions = getattr(config, "max_position_embeddings", 0) or 0
    needed = BYTES_A_WEIGHT * (12 * layers * width**2 + (config.vocab_size + positions) * width)
    memory = psutil.virtual_memory().total
    if torch.cuda.is_available():
        memory = max(memory, torch.cuda.mem_get_info()[1])
    if needed > memory:
        raise SettingsError(
            f"A model of {layers} layers of width {width} with {config.vocab_size} tokens and {positions} positions "
            f"takes {needed / 1e9:,.0f} GB, and this machine has {memory / 1e9:,.0f}."
        )


def skeleton(config: PreTrainedConfig, model_args: ModelArguments) -> PreTrainedModel:
    """The model without weights, with its attention."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=model_args.trust_remote_code)
    except LNFreeError:
        raise
    except REFUSALS as error:
        raise SettingsError(
            f"config_overrides={model_args.config_overrides!r} make no model: {reason(error)}"
        ) from error
    name = model_args.attn_implementation
    if name != "auto" and "/" not in name:  # what has a slash is fetched from the Hub
        try:
            model.set_attn_implementation(name)
        except REFUSALS as error:
            raise SettingsError(f"attn_implementation={name!r} cannot be used: {reason(error)}") from error
    return model


def require_optimiser(args: LNFreeTrainingArguments, model: PreTrainedModel) -> None:
    """Raise SettingsError unless optimiser and schedule can be made, on one parameter."""
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        whole = {"params", "model", "optimizer_dict"} & set(options)  # they are made for a whole model
        weights = [nn.Parameter(torch.zeros(1, 1))]
        optimiser = torch.optim.SGD(weights) if whole else kind(weights, **options)
    except REFUSALS as error:
        given = f"optim={OptimizerNames(args.optim).value!r} with optim_args={args.optim_args!r}"
        raise SettingsError(f"{given}: {reason(error)}") from error
    schedule: Any = args.lr_scheduler_kwargs  # text became a mapping, if it is one
    try:
        get_scheduler(args.lr_scheduler_type, optimiser, 1, 2, schedule)
    except REFUSALS as error:
        given = (
            f"lr_scheduler_type={SchedulerType(args.lr_scheduler_type).value!r} with lr_scheduler_kwargs={schedule!r}"
        )
        raise SettingsError(f"{given}: {reason(error)}") from error
