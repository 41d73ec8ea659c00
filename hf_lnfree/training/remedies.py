"""What would make a run fit that does not: the fewest changes of its settings, or else more devices."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations

from .estimate import fits, largest_batch
from .plans import CHECKPOINTING, Plan

MOST_DEVICES = 4096


def smaller_batch(plan: Plan) -> Plan:
    """The largest part of the micro-batch that fits, with as many windows a step; the same plan if none does."""
    windows = plan.step.batch * plan.accumulation
    for batch in range(min(largest_batch(plan), plan.step.batch), 0, -1):
        found = dataclasses.replace(plan.with_step(batch=batch), accumulation=windows // batch)
        if windows % batch == 0 and fits(found):
            return found
    return plan


def half_precision(plan: Plan) -> Plan:
    """Under autocast."""
    return dataclasses.replace(plan.with_step(product=min(2, plan.step.product)), precision="bfloat16")


def eight_bits(plan: Plan) -> Plan:
    """With moments of eight bits, of an optimiser that shards; it needs torchao."""
    return dataclasses.replace(plan, optim="adamw_torch_8bit")


CHUNKED, BATCH, SHARDED = "loss: chunked", "batch", "--fsdp"
# Field -> the change of a plan that stands for it. The batch comes last: it is what is left to fit.
REMEDIES: dict[str, Callable[[Plan], Plan]] = {
    CHUNKED: lambda plan: plan.with_step(loss="chunked"),
    "bf16: true": half_precision,
    f"{CHECKPOINTING}: true": lambda plan: plan.with_step(checkpointing=True),
    SHARDED: lambda plan: plan.with_devices(fsdp=plan.shardable and plan.devices.count > 1),
    BATCH: smaller_batch,
}
LAST_RESORT = "optim: adamw_torch_8bit"
CHANGES = {LAST_RESORT: eight_bits, **REMEDIES}


def what_fits(plan: Plan) -> str:
    """A sentence that names the changes, for a plan that does not fit."""
    for remedies in (REMEDIES, CHANGES):
        useful = useful_of(plan, remedies)
        for size in range(1, len(useful) + 1):
            ways = (words_if_fit(plan, names) for names in combinations(useful, size))
            if found := [words for words in ways if words]:
                return f"{'Any of these' if len(found) > 1 else 'This'} makes it fit: {'; '.join(found)}."
    while plan.shardable and plan.devices.count < MOST_DEVICES:
        plan = plan.with_devices(count=2 * plan.devices.count)
        if words := words_if_fit(plan, useful_of(plan, REMEDIES)):
            return f"It fits {plan.devices.count} devices with {words}."
    return (
        f"No number of devices of {plan.devices.memory / 1e9:.4g} GB is enough: take a smaller model or larger devices."
    )


def useful_of(plan: Plan, remedies: Iterable[str]) -> list[str]:
    """Those that change the plan; how large the batch may be is known after the others."""
    return [name for name in remedies if name == BATCH or CHANGES[name](plan) != plan]


def words_if_fit(plan: Plan, names: Sequence[str]) -> str:
    """The changes in words, if the plan fits with all of them; else nothing."""
    words = []
    for name in names:
        changed = CHANGES[name](plan)
        batch, times = changed.step.batch, changed.accumulation
        fields = f"per_device_train_batch_size: {batch}, gradient_accumulation_steps: {times}"
        if changed.step.loss == "chunked" and CHUNKED not in words:  # "auto" might choose another for that batch
            fields += f", {CHUNKED}"
        words += [] if changed == plan else [fields if name == BATCH else name]
        plan = changed
    return " and ".join(words) if fits(plan) else ""
