"""What cannot be made of settings is found before the corpus is read: model, attention, optimiser and schedule."""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import psutil
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel, SchedulerType, Trainer, get_scheduler
from transformers.training_args import OptimizerNames, ParallelMode
from transformers.utils import is_kernels_available, is_liger_kernel_available

from ..checks import SHARE, Range, above, at_least
from ..data.arguments import DIGITS, DataArguments
from ..data.objectives import CAUSAL, Objective, objective_of
from ..errors import LNFreeError, SettingsError
from ..loading import reason
from ..models.errors import ConfigurationError
from .arguments import LNFreeTrainingArguments, ModelArguments
from .build import auto_class

BYTES_A_WEIGHT = 4
SIZES = {
    **dict.fromkeys(("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"), at_least(1)),
    **dict.fromkeys(("image_size", "patch_size", "num_channels"), at_least(1)),
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "n_inner"), at_least(1)),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), at_least(0)),
    **dict.fromkeys(("initializer_range", "layer_norm_epsilon", "layer_norm_eps"), at_least(0)),
    **dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop", "attention_dropout", "hidden_dropout"), SHARE),
}
ROTARY = {"rope_theta": above(0), "factor": at_least(1), "partial_rotary_factor": Range(0, 1)}
PAGED = "paged|"
DIGITS_SIDE = 8  # pixels
REHEARSED = 20  # steps of a schedule, of which one is warm-up
LABELS = "labels"  # of windows
# Field -> (whether it asks in vain, what it needs). The host says so once the corpus is read, or with the first step.
NEEDS: dict[str, tuple[Callable[[LNFreeTrainingArguments], Any], str]] = {
    "fsdp": (
        lambda args: args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED,
        "several processes, as torchrun or accelerate start them",
    ),
    "use_liger_kernel": (
        lambda args: args.use_liger_kernel and not is_liger_kernel_available(),
        "liger-kernel: pip install liger-kernel",
    ),
    "dataloader_persistent_workers": (
        lambda args: args.dataloader_persistent_workers and not args.dataloader_num_workers,
        "dataloader_num_workers above 0",
    ),
    "save_strategy": (
        lambda args: args.save_strategy == "best" and args.metric_for_best_model is None,
        "metric_for_best_model, like loss",
    ),
}
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
    for name, (in_vain, needed) in NEEDS.items():
        if in_vain(args):
            raise SettingsError(f"{name}={plain(getattr(args, name))!r} needs {needed}.")
    require_recomputation(args)
    if args.torch_compile:
        try:
            torch.compile(nn.Identity(), backend=args.torch_compile_backend or "inductor", mode=args.torch_compile_mode)
        except REFUSALS as error:
            fields = (
                f"torch_compile_backend={args.torch_compile_backend!r}, torch_compile_mode={args.torch_compile_mode!r}"
            )
            raise SettingsError(f"{fields}: {reason(error)}") from error
    if args.label_names is not None and set(args.label_names) != {LABELS}:
        raise SettingsError(
            f"label_names must be null or name {LABELS!r} alone, which windows have, got {args.label_names!r}."
        )
    objective = objective_of(data_args.objective)
    if args.loss not in ("auto", "plain") and objective is not CAUSAL:
        raise SettingsError(f"loss={args.loss!r} is for the next token: objective {objective.name!r} needs 'plain'.")
    metrics = ("loss", objective.metric)
    metric = str(args.metric_for_best_model or "loss").removeprefix("eval_")
    if metric not in metrics:
        raise SettingsError(f"metric_for_best_model must be one of {', '.join(metrics)}, got {metric!r}.")


def require_model(model_args: ModelArguments, data_args: DataArguments, here: bool = True) -> PreTrainedModel:
    """
    The model without weights, with its attention.

    Args:
        here: whether this machine is to hold it.

    Raises:
        SettingsError: the configuration makes no model, or one that has too few positions for the windows or is larger
            than this machine; or its attention cannot be had.
        ModelError: the configuration of a checkpoint cannot be read.
    """
    source = model_args.model_name_or_path or "config_overrides"
    sides = DIGITS_SIDE if data_args.data == DIGITS else data_args.image_size
    image = {} if sides is None or objective_of(data_args.objective).example != "image" else {"image_size": sides}
    try:
        config = model_args.config(data_args.context_length, **image)
    except ConfigurationError as error:
        raise SettingsError(f"{source}: {error}") from error
    for name, allowed in SIZES.items():
        value = getattr(config, name, None)
        if any(part not in allowed for part in (value if isinstance(value, list) else [value]) if part is not None):
            raise SettingsError(f"{source}: {name} must be {allowed}, got {value!r}.")
    positions = getattr(config, "max_position_embeddings", None) or data_args.context_length
    if positions < data_args.context_length:
        raise SettingsError(
            f"The model has {positions} positions, fewer than --context-length {data_args.context_length}."
        )
    if here:
        require_memory(config)
    model = skeleton(config, model_args, objective_of(data_args.objective))
    require_heads(config, source)
    return model


def require_heads(config: PreTrainedConfig, source: str) -> None:
    """Raise SettingsError unless heads share the width, and rotary embeddings turn pairs of what a head has."""
    width, heads = config.hidden_size, config.num_attention_heads
    if hasattr(config, "d_kv"):  # T5 names the width of a head
        return
    if width % heads:
        raise SettingsError(f"{source}: the width, {width}, must be a multiple of the number of heads, {heads}.")
    rotary = getattr(config, "rope_parameters", None) or {}
    for name, allowed in ROTARY.items():
        if rotary.get(name) is not None and rotary[name] not in allowed:
            raise SettingsError(f"{source}: {name} of rope_parameters must be {allowed}, got {rotary[name]!r}.")
    turned = int(width // heads * rotary.get("partial_rotary_factor", 1))
    if rotary and (turned < 2 or turned % 2):
        raise SettingsError(
            f"{source}: heads of width {width // heads} and partial_rotary_factor={rotary['partial_rotary_factor']!r} "
            f"leave {turned} numbers to turn: their number must be even and at least 2."
        )


@lru_cache
def require_row(family: str, row: str, overrides: str, attention: str, here: bool = True, **data: Any) -> None:
    """`require_model` for a new model, once for settings that many cells of a study share."""
    model = ModelArguments(family=family, row=row, config_overrides=overrides, attn_implementation=attention)
    require_model(model, DataArguments(**data), here)


def require_memory(config: PreTrainedConfig) -> None:
    """Raise SettingsError for a model whose bare weights are larger than the memory of this machine."""
    layers, width = config.num_hidden_layers, config.hidden_size
    positions = getattr(config, "max_position_embeddings", 0) or 0
    vocabulary = getattr(config, "vocab_size", 0)
    needed = BYTES_A_WEIGHT * (12 * layers * width**2 + (vocabulary + positions) * width)
    memory = psutil.virtual_memory().total
    if torch.cuda.is_available():
        memory = max(memory, torch.cuda.mem_get_info()[1])
    if needed > memory:
        raise SettingsError(
            f"A model of {layers} layers of width {width} with {vocabulary} tokens and {positions} positions "
            f"takes {needed / 1e9:,.0f} GB, and this machine has {memory / 1e9:,.0f}."
        )


def skeleton(config: PreTrainedConfig, model_args: ModelArguments, objective: Objective) -> PreTrainedModel:
    """The model without weights, with its attention."""
    sides = getattr(config, "image_size", None)
    if sides is not None and sides % config.patch_size:
        raise SettingsError(
            f"image_size={sides} must be a multiple of patch_size={config.patch_size}: give a patch_size that fits, in "
            "config_overrides."
        )
    try:
        with torch.device("meta"):
            model = auto_class(objective).from_config(config, trust_remote_code=model_args.trust_remote_code)
    except LNFreeError:
        raise
    except REFUSALS as error:
        raise SettingsError(
            f"config_overrides={model_args.config_overrides!r} make no model: {reason(error)}"
        ) from error
    name = model_args.attn_implementation
    if name.startswith(PAGED):
        raise SettingsError(f"attn_implementation={name!r} is for generation: give {name.removeprefix(PAGED)!r}.")
    if "/" in name and not is_kernels_available():
        raise SettingsError(f"attn_implementation={name!r} is a kernel on the Hub, and needs: pip install kernels.")
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
    given = f"lr_scheduler_type={plain(SchedulerType(args.lr_scheduler_type))!r} with lr_scheduler_kwargs={schedule!r}"
    try:
        made = get_scheduler(args.lr_scheduler_type, optimiser, 1, REHEARSED, schedule)
        rates = [rate(step) for rate in getattr(made, "lr_lambdas", ()) for step in range(REHEARSED)]
    except REFUSALS as error:
        raise SettingsError(f"{given}: {reason(error)}") from error
    if negative := [name for name, value in (schedule or {}).items() if name.endswith("_steps") and value < 0]:
        raise SettingsError(f"{given}: {negative[0]} must be at least 0.")
    if wrong := [rate for rate in rates if isinstance(rate, complex) or not math.isfinite(rate) or rate < 0]:
        raise SettingsError(f"{given}: gives {wrong[0]:g} times the learning rate.")


def require_recomputation(args: LNFreeTrainingArguments) -> None:
    """Raise SettingsError unless activations can be recomputed as the settings say."""
    for name in ("activation_checkpointing", "gradient_checkpointing"):  # as the host calls it, and called it
        options: Any = getattr(args, f"{name}_kwargs", None)
        if not getattr(args, name, False) or options is None:
            continue
        if not isinstance(options.get("use_reentrant", False), bool):
            raise SettingsError(f"{name}_kwargs={options!r}: use_reentrant must be true or false.")
        try:
            checkpoint(nn.Identity().forward, torch.zeros(1, requires_grad=True), **{"use_reentrant": False, **options})
        except REFUSALS as error:
            raise SettingsError(f"{name}_kwargs={options!r}: {reason(error)}") from error


def plain(value: Any) -> Any:
    """What the settings say for a member of an enumeration."""
    return getattr(value, "value", value)
