"""`hf-lnfree estimate`: a YAML file and devices into a plan, then what it will take; nothing is trained."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import SettingsError
from ..files import write_json
from ..tables import duration
from ..training.estimate import DAY, USABLE, Estimate, estimate
from ..training.plans import CHECKPOINTING, Devices, Plan, plan_of
from ..training.remedies import what_fits

UNITS = {"GB": 1e9, "GiB": 2.0**30, "MB": 1e6, "MiB": 2.0**20}
PRECISIONS = {
    **{name: {"bf16": False, "fp16": False} for name in ("float32", "fp32")},
    **{name: {"bf16": True, "fp16": False} for name in ("bfloat16", "bf16")},
    **{name: {"bf16": False, "fp16": True} for name in ("float16", "fp16")},
}


def parse_memory(text: str) -> float:
    """ "80GB" or "24 GiB" as bytes."""
    number = text.strip().rstrip("GMiB ")
    unit = UNITS.get(text.strip()[len(number) :].strip())
    try:
        memory = float(number) * (unit or 0)
    except ValueError:
        memory = 0
    if not 0 < memory < float("inf"):
        raise SettingsError(f"--gpu-memory must be a size above 0 with its unit, like 80GB or 80GiB; got {text!r}.")
    return memory


def parse_precision(text: str | None) -> dict[str, Any]:
    """The fields of a run that stand for a dtype."""
    if text is not None and text not in PRECISIONS:
        raise SettingsError(f"--dtype must be one of {', '.join(map(repr, PRECISIONS))}, got {text!r}.")
    return {} if text is None else PRECISIONS[text]


def estimate_command(
    file: Path, changes: dict[str, Any], devices: Devices, tokens: int | None, out: Path | None
) -> Iterator[str]:
    """
    What the terminal shows.

    Raises:
        SettingsError: as `plan_of` and `estimate`; and after all lines, that it does not fit, and what would.
    """
    plan = plan_of(file, changes, devices, tokens)
    found = estimate(plan)
    launch = launch_command(file, changes, plan)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, found.to_dict(plan) | {"accelerate": accelerate_file(plan), "launch": launch})
    yield from lines(plan, found)
    if not found.fits:
        raise SettingsError(
            f"{file} does not fit: {gigabytes(found.peak)} of {gigabytes(USABLE * found.memory)} GB that can be used. "
            + what_fits(plan)
        )
    yield f"Start it: {launch}"


def lines(plan: Plan, found: Estimate) -> Iterator[str]:
    """The estimate in words."""
    step, devices = plan.step, plan.devices
    how = ["FSDP" if devices.fsdp else "DDP"] if devices.count > 1 else []
    how += [plan.precision, *(["checkpointing"] if step.checkpointing else []), f"{step.loss} loss"]
    how += [plan.attention, plan.optim]
    yield f"Model: {plan.name}, {plan.parameters:,} parameters, a vocabulary of {plan.shape.vocabulary:,}."
    yield f"Devices: {devices.count} of {gigabytes(found.memory)} GB; {', '.join(how)}."
    tokens = step.tokens * plan.accumulation * devices.count
    yield (
        f"Step: {tokens:,} tokens; {step.batch} windows of {step.length} tokens on each device, gradient accumulation "
        f"{plan.accumulation}."
    )
    yield "Memory of each, in GB, of which parts need not be there together:"
    for name in ("weights", "gradients", "moments", "activations", "logits", "communication"):
        yield f"  {name:14}{gigabytes(getattr(found, name)):>9}"
    yield f"  {'peak':14}{gigabytes(found.peak):>9}  of {gigabytes(USABLE * found.memory)} that can be used"
    yield f"Largest micro-batch that fits: {found.largest_batch} windows."
    again = f", and {found.flops.recomputed:.4g} that checkpointing repeats" if step.checkpointing else ""
    yield f"FLOPs a token: {found.flops.model:.4g}{again}."
    if found.tokens is None:
        yield "Time: unknown. The settings say nothing of how many tokens: give --tokens, or max_steps."
        return
    if found.days is None or found.peak_flops is None:
        yield f"Time: unknown for {found.tokens:,} tokens on a CPU: give its --peak-flops."
        return
    yield (
        f"Time: {days(found.days)} for {found.tokens:,} tokens, at {found.mfu:.0%} of {found.peak_flops / 1e12:.4g} "
        "TFLOP/s of each device."
    )


def gigabytes(count: float) -> str:
    """Bytes as a number of GB."""
    return f"{count / 1e9:.2f}"


def days(count: float) -> str:
    """Days; of less than two of them hours, minutes or seconds."""
    return f"{count:,.1f} days" if count >= 2 else duration(count * DAY)


def accelerate_file(plan: Plan) -> str:
    """The launch file of examples/accelerate for it."""
    if plan.devices.count == 1:
        return "examples/accelerate/single_gpu.yaml"
    return f"examples/accelerate/two_gpus{'_fsdp2' if plan.devices.fsdp else ''}.yaml"


def launch_command(file: Path, changes: dict[str, Any], plan: Plan) -> str:
    """The command that trains what was estimated."""
    flags = []
    for name, value in changes.items():
        if name not in ("fsdp", "fsdp_config"):  # of the launch file
            text = str(value).lower() if isinstance(value, bool) else str(value)
            flags += [f"--{name.replace('_', '-')}", text]
    train = ["-m", "hf_lnfree.cli.main", "train", str(file), *flags]
    count = ["--num_processes", str(plan.devices.count)] if plan.devices.count > 2 else []
    start = ["accelerate", "launch", "--config_file", accelerate_file(plan), *count]
    if plan.devices.cpu:
        start = ["torchrun", "--standalone", "--nproc-per-node", str(plan.devices.count)]
    return shlex.join([*start, *train])


def changes_of(
    change: dict[str, Any], fsdp: bool, checkpointing: bool, dtype: str | None, optim: str | None
) -> dict[str, Any]:
    """The fields of a run that the options stand for, over those of --set."""
    asked = {**parse_precision(dtype), **({"optim": optim} if optim else {})}
    asked |= {"fsdp": True} if fsdp else {}
    return {**change, **asked, **({CHECKPOINTING: True} if checkpointing else {})}
