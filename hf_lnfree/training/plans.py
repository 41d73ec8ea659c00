"""What would be trained on which devices: read from the settings of a run, without making the run."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.objectives import objective_of
from ..errors import SettingsError
from .arguments import LNFreeTrainingArguments
from .efficiency import LOGITS_WORTH_COMPILING, choose_attention, form_of_loss, training_dtype
from .memory import Step, is_fused
from .possible import skeleton
from .settings import merge, parse_settings, read_file, read_settings
from .shape import Shape, shape_of

# What the host calls it from transformers 5.2x on, and called it before.
NAMES = ("activation_checkpointing", "gradient_checkpointing")
CHECKPOINTING = next(n for n in NAMES if n in {known.name for known in dataclasses.fields(LNFreeTrainingArguments)})
# Fields that this machine need not be able to obey, since the run will be on another.
ELSEWHERE = ("bf16", "fp16", "fsdp", "fsdp_config", "device", "use_cpu", "report_to", "torch_compile")
# Field -> the values that change nothing here.
UNCOUNTED: dict[str, tuple[Any, ...]] = {
    "deepspeed": (None,),
    "use_liger_kernel": (False,),
    "entropy_weight": (0,),
    **{f"{name}_kwargs": (None, {}, {"use_reentrant": False}) for name in NAMES},
}


@dataclass(frozen=True)
class Devices:
    """
    What it is trained on.

    Args:
        count: of all machines together.
        memory: bytes of each.
        fsdp: whether weights, gradients and moments are sharded over all, rather than copied to each.
        peak_flops: FLOP/s of each, as its maker states them for the precision.
        mfu: the share of that which a training reaches.
    """

    count: int = 1
    memory: float = 80e9
    fsdp: bool = False
    cpu: bool = False
    peak_flops: float | None = None
    mfu: float = 0.3

    def __post_init__(self) -> None:
        """Raise SettingsError for what no device can be."""
        for name, value in dataclasses.asdict(self).items():
            if name in ("count", "memory", "peak_flops", "mfu") and value is not None and not 0 < value < float("inf"):
                raise SettingsError(f"{'devices' if name == 'count' else name} must be above 0, got {value}.")
        if self.mfu > 1:
            raise SettingsError(f"mfu must be at most 1, got {self.mfu}.")


@dataclass(frozen=True)
class Plan:
    """
    A run, as an estimate needs it.

    Args:
        name: of the model, for people.
        parameters: of the whole model; `outside`: those of them that lie in no block.
        step: a micro-batch of one device.
        accumulation: micro-batches of a device that make an optimiser step.
        tokens: that the run is to train on; None if nothing says how many.
        shardable: whether FSDP can be had.
    """

    name: str
    parameters: int
    outside: int
    shape: Shape
    step: Step
    accumulation: int
    tokens: int | None
    optim: str
    precision: str
    attention: str
    devices: Devices
    shardable: bool = True

    def with_step(self, **changes: Any) -> "Plan":
        """The same with another step."""
        return dataclasses.replace(self, step=dataclasses.replace(self.step, **changes))

    def with_devices(self, **changes: Any) -> "Plan":
        """The same on other devices, or on them in another way."""
        return dataclasses.replace(self, devices=dataclasses.replace(self.devices, **changes))


def plan_of(
    file: Path, changes: Mapping[str, Any] | None = None, devices: Devices | None = None, tokens: int | None = None
) -> Plan:
    """
    What `hf-lnfree train FILE` would train, with these changes of its fields.

    Args:
        devices: that need not be those of this machine; whether they are CPUs or share by FSDP, the settings say too.
        tokens: instead of those that `max_steps` come to.

    Raises:
        SettingsError: what training refuses whatever the machine, and what no estimate counts.
        ModelError: the configuration of a checkpoint cannot be read.
    """
    changes = changes or {}
    values = merge(read_settings(file), changes)
    there = {name: values.pop(name) for name in ELSEWHERE if name in values}
    asked = {name: value for name, value in read_file(file).items() if name in values}
    model_args, data_args, args = parse_settings(
        {**values, "device": "cpu"}, str(file), given=asked, later=changes, here=False
    )
    for name, plain in UNCOUNTED.items():
        if (value := getattr(args, name, plain[0])) not in plain:
            raise SettingsError(f"There is no estimate for {name}={value!r}; only {' or '.join(map(repr, plain))}.")
    half = {name: switch(name, there.get(name)) for name in ("bf16", "fp16")}
    if all(half.values()):
        raise SettingsError("bf16 and fp16 are two precisions: choose one.")
    # A tokenizer that is learned has as many entries; one that is named is not read here.
    learned = {"vocab_size": data_args.vocab_size} if data_args.tokenizer is None else {}
    config = model_args.config(data_args.context_length, **learned)
    shape, objective = shape_of(config), objective_of(data_args.objective)
    model = skeleton(config, model_args, objective)
    product, weight = training_dtype(**half), next(model.parameters()).dtype
    sharding = there.get("fsdp_config") or {}
    inside = isinstance(sharding, dict) and sharding.get("activation_checkpointing") is True
    on_cpu = there.get("device") == "cpu" or there.get("use_cpu") is True
    devices = devices or Devices()
    devices = dataclasses.replace(
        devices, fsdp=devices.fsdp or there.get("fsdp") not in (None, False, ""), cpu=devices.cpu or on_cpu
    )
    attention = model_args.attn_implementation
    if attention == "auto":
        device = torch.device("cpu" if devices.cpu else "cuda")
        attention = choose_attention(device, training_dtype(**half), data_args.context_length, shape.dropout[1])
    batch, length = args.per_device_train_batch_size, data_args.context_length
    multiplied = min(weight.itemsize, product.itemsize)
    windows = batch * args.gradient_accumulation_steps * devices.count
    steps = args.max_steps if args.max_steps > 0 else None
    logits = batch * length * shape.vocabulary
    worth = steps is not None and logits * steps > LOGITS_WORTH_COMPILING
    return Plan(
        name=f"{model_args.family}, row {model_args.name}"
        if model_args.model_name_or_path is None
        else model_args.name,
        parameters=model.num_parameters(),
        outside=outside_blocks(model),
        shape=shape,
        step=Step(
            batch,
            length,
            weight=weight.itemsize,
            product=multiplied,
            fused=is_fused(attention, shape, multiplied, devices.cpu),
            checkpointing=bool(getattr(args, CHECKPOINTING)) or inside,
            loss=form_of_loss(logits, devices.memory, worth) if args.loss == "auto" else args.loss,
            mask=weight.itemsize if devices.cpu else 1,
        ),
        accumulation=args.gradient_accumulation_steps,
        tokens=tokens or (None if steps is None else steps * windows * length),
        optim=str(args.optim.value),
        precision=str(product if product.itemsize < weight.itemsize else weight).removeprefix("torch."),
        attention=attention,
        devices=devices,
        shardable=getattr(config, "slope_scope", "layer") != "global",
    )


def switch(name: str, value: Any) -> bool:
    """Raise SettingsError for a field of the file that is neither true nor false."""
    if value is not None and not isinstance(value, bool):
        raise SettingsError(f"{name} must be true or false, got {value!r}.")
    return bool(value)


def outside_blocks(model: torch.nn.Module) -> int:
    """Parameters of embeddings, head and final norm."""
    stack = max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
    inside = {id(p) for p in stack.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in inside)
