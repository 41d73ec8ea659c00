"""Which norms go when, and what is trained meanwhile. Light: `hf-lnfree remove-norms --help` reads it."""

from dataclasses import dataclass, field

import yaml

from ..checks import at_least, require_fields


@dataclass
class RemovalArguments:
    """Which norms go when, and what is trained meanwhile."""

    schedule: list | str | None = field(
        default="auto",
        metadata={
            "help": "'auto' (MLPs, queries and keys, values, final norm, first position, all within the first two "
            "fifths of --max-steps), a YAML file, or YAML like '[{norms: mlp, start: 20, every: 2}]'; norms: mlp, "
            "attention, query_key, value, final, first, or the name of a norm."
        },
    )
    gate_steps: int = field(default=0, metadata={"help": "Steps from sigma to the fixed scale; 0 for a switch."})
    residual_norm_weight: float = field(
        default=0.0, metadata={"help": "Weight of the penalty that keeps residual norms at their averages."}
    )
    removal_windows: int = field(
        default=64,
        metadata={"help": "Windows, or images, behind the first averages and the losses around each removal."},
    )
    baseline: bool = field(
        default=True, metadata={"help": "Also fine-tune without removal for as many steps, into the folder plain."}
    )
    lora_rank: int | None = field(default=None, metadata={"help": "Train LoRA adapters of this rank, then merge them."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Scale of the adapters; twice the rank by default."})

    _argument_group_name = "Removal"

    def __post_init__(self) -> None:
        if self.schedule is None:
            self.schedule = "auto"
        if not isinstance(self.schedule, str):  # a YAML file gives a list; its text is what a result file records
            self.schedule = yaml.safe_dump(self.schedule, default_flow_style=True).strip()
        none = dict.fromkeys(("gate_steps", "residual_norm_weight"), at_least(0))
        require_fields(self, none | dict.fromkeys(("removal_windows", "lora_rank", "lora_alpha"), at_least(1)))
