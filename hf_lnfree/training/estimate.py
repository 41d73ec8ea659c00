"""What a training will take before it is begun: memory of each device, FLOPs, time; and the batch that still fits."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..errors import SettingsError
from .flops import Flops, flops_a_token
from .memory import loss_bytes, peak_bytes, saved_bytes
from .plans import Plan

# Of a device; its context, workspaces of kernels and what fragments take the rest.
USABLE = 0.9
LARGEST_BATCH = 2**16
# An H100 SXM: dense FLOP/s by bytes of what is multiplied.
H100 = {2: 989e12, 4: 67e12, 8: 67e12}
DAY = 24 * 60 * 60


@dataclass(frozen=True)
class Optimiser:
    """
    What an optimiser holds for each weight.

    Args:
        copies: numbers in the dtype of the weight.
        other: bytes besides, of what it holds in a dtype of its own.
        all_at_once: numbers for each weight, while it steps.
        largest: float32 numbers for each weight of the largest tensor, while it steps; two more, copies of the tensor
            and its gradient, if these are narrower.
    """

    copies: int = 0
    other: float = 0.0
    all_at_once: int = 0
    largest: int = 0

    def stepping(self, weight: int, own: int, largest: int) -> int:
        """Bytes while it steps on `own` weights of `weight` bytes, of which the largest tensor has `largest`."""
        floats = self.largest + 2 * (weight < 4) if self.largest else 0
        return weight * self.all_at_once * own + 4 * floats * largest


BLOCKWISE = 1 + 4 / 256  # bytes of a number in 8 bits, with one scale for each 256
ADAM_8BIT, ADAM_32BIT = Optimiser(other=2 * BLOCKWISE), Optimiser(other=8)
OPTIMISERS = {
    "adamw_torch_fused": Optimiser(copies=2),
    "adamw_torch": Optimiser(copies=2, all_at_once=1),
    **dict.fromkeys(("adamw_torch_8bit", "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"), ADAM_8BIT),
    "paged_adamw_32bit": ADAM_32BIT,
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit"), Optimiser(other=4)),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit"), Optimiser(other=BLOCKWISE)),
    "adafactor": Optimiser(largest=2),  # a row and a column of a matrix are less than a hundredth of it
    "sgd": Optimiser(),
}


@dataclass(frozen=True)
class Estimate:
    """
    Bytes on each device, FLOPs and days.

    Args:
        logits: what the loss takes at its widest, logits and their gradients included.
        communication: buckets of DDP, or what FSDP gathers of two blocks and of all outside them.
        peak: the most that is held at once; parts need not be there together.
        largest_batch: windows of a micro-batch that still fit; 0 if not even one does.
        flops: of a token.
        peak_flops: of a device; None for a CPU of which it is not given.
        days: None without that or a number of tokens.
    """

    weights: int
    gradients: int
    moments: int
    activations: int
    logits: int
    communication: int
    peak: int
    memory: float
    largest_batch: int
    flops: Flops
    tokens: int | None
    peak_flops: float | None
    mfu: float
    days: float | None

    @property
    def fits(self) -> bool:
        return self.peak <= USABLE * self.memory

    def to_dict(self, plan: Plan) -> dict[str, Any]:
        """For JSON, with what it was asked for."""
        found = dataclasses.asdict(self) | {"fits": self.fits, "flops_a_token": dataclasses.asdict(self.flops)}
        found.pop("flops")
        asked = dataclasses.asdict(plan)
        asked.pop("shape")
        return asked | {"estimate": found}


def estimate(plan: Plan) -> Estimate:
    """
    Everything about a plan.

    Raises:
        SettingsError: an optimiser or a sharding that is not known.
    """
    step, shape, devices = plan.step, plan.shape, plan.devices
    parts = memory_parts(plan)
    flops = flops_a_token(shape, step.length, step.fused, step.checkpointing)
    peak_flops = devices.peak_flops or (None if devices.cpu else H100[step.product])
    days = None
    if plan.tokens is not None and peak_flops is not None:
        days = plan.tokens * flops.executed / (devices.count * peak_flops * devices.mfu) / DAY
    return Estimate(
        **parts,
        activations=saved_bytes(shape, step),
        logits=max(loss_bytes(shape, step)),
        memory=devices.memory,
        largest_batch=largest_batch(plan),
        flops=flops,
        tokens=plan.tokens,
        peak_flops=peak_flops,
        mfu=devices.mfu,
        days=days,
    )


def memory_parts(plan: Plan) -> dict[str, int]:
    """
    Bytes of weights, gradients, moments and communication, and the peak of all together.

    DDP copies all gradients into buckets. FSDP shards the three, and gathers two blocks (the one that is computed and
    the next) and what lies outside them, in the dtype of products, with their gradients; there autocast copies nothing.
    """
    if plan.optim not in OPTIMISERS:
        raise SettingsError(f"There is no estimate for optim={plan.optim!r}; there is for {', '.join(OPTIMISERS)}.")
    devices, step, optimiser = plan.devices, plan.step, OPTIMISERS[plan.optim]
    if devices.fsdp and not plan.shardable:
        raise SettingsError("slope_scope='global' is one slope for all blocks, which FSDP cannot shard: leave it out.")
    shards = devices.count if devices.fsdp else 1
    own = -(-plan.parameters // shards)
    weights = step.weight * own
    moments = int((step.weight * optimiser.copies + optimiser.other) * own)
    stepping = optimiser.stepping(step.weight, own, plan.shape.head // shards)
    communication = 0
    if devices.fsdp:
        block = (plan.parameters - plan.outside) // len(plan.shape.layers)
        communication = 2 * step.product * (2 * block + plan.outside)
        step = dataclasses.replace(step, copied=False)
    elif devices.count > 1:
        communication = weights
    beyond = peak_bytes(plan.shape, step, weights, plan.accumulation > 1, stepping)
    return {
        "weights": weights,
        "gradients": weights,
        "moments": moments,
        "communication": communication,
        "peak": weights + moments + communication + beyond,
    }


def fits(plan: Plan) -> bool:
    """Whether its peak leaves the tenth of a device that is not counted."""
    return memory_parts(plan)["peak"] <= USABLE * plan.devices.memory


def largest_batch(plan: Plan) -> int:
    """Windows of the largest micro-batch that fits; 0 if not even one does."""
    low, high = 0, 1
    while high <= LARGEST_BATCH and fits(plan.with_step(batch=high)):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(plan.with_step(batch=middle)) else (low, middle)
    return low
