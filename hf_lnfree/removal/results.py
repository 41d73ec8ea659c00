"""What a removal came to: `removal.json`, beside the `results.json` of its two runs."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from ..data.objectives import objective_of
from ..records import Record


@dataclass(kw_only=True)
class RemovalSummary(Record):
    """
    `removal.json`: a removal of norms against as many steps of plain fine-tuning. The fields are the keys of the file.

    Losses are means in nats a token over held-out windows, or in nats an image; what is not finite is null in the file
    and NaN here.

    Args:
        model: folder or Hub name of the model with norms.
        loss_before: before the first step, on all held-out windows.
        loss_after: of the model that was saved, folded.
        loss_plain: of the plain fine-tuning; None if there was none.
        objective: what the model is trained to predict, see `DataArguments`; None, of earlier versions, for "causal".
        accuracy: of images, by "before", "after" and "plain" the share of those held out whose label is the likeliest.
        gap: `loss_after - loss_plain`; None if there was none.
        norms_left: the kind of norm that is left, "none" when all are gone, "mixed" for several kinds.
        events: every removal: `step`, `norm` (its name), `part`, and on the windows of `removal_windows` `loss_before`
            and `loss_after` (when its gate was 1; None if that did not come).
        curves: for "removal" and "plain" the held-out losses as (step, loss).
        steps: optimiser steps of each run.
        tokens: trained on in each run.
        sigma: by norm its scale: of the first position of a sequence, and of the others.
        arguments: fields of `RemovalArguments`.
        seed, data, environment, command, diverged_at: those of the run with removals (`RunResults`).
    """

    file: ClassVar[str] = "removal.json"

    model: str
    loss_before: float
    loss_after: float
    loss_plain: float | None
    gap: float | None
    norms_left: str
    events: list[dict[str, Any]]
    curves: dict[str, list[tuple[float, float]]]
    steps: int
    tokens: int
    sigma: dict[str, list[float]]
    arguments: dict[str, Any]
    seed: int
    data: dict[str, dict[str, Any]]
    environment: dict[str, Any]
    command: str
    diverged_at: int | None
    objective: str | None = None
    accuracy: dict[str, float] | None = None

    def __post_init__(self) -> None:
        # null of the file stands for both: a loss that is not finite, and one that was not asked for
        self.curves = {
            name: [(step, math.nan if loss is None else loss) for step, loss in points]
            for name, points in self.curves.items()
        }
        if "plain" not in self.curves:
            self.loss_plain = self.gap = None

    @property
    def unit(self) -> str:
        """Of losses."""
        return "nats an image" if objective_of(self.objective).example == "image" else "nats a token"

    @property
    def diverged(self) -> bool:
        return self.diverged_at is not None
