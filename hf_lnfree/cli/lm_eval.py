"""`hf-lnfree lm-eval`: the harness's scores as a table."""

import math
from collections.abc import Mapping

from ..tables import Table, number
from .entropy import display_names


def table(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """A row a model, a column a task: accuracy and its standard error in percent."""
    tasks = list(next(iter(scores.values())))
    rows = [
        [shown, *(cell(by_task[task]) for task in tasks)]
        for shown, by_task in zip(display_names(list(scores)), scores.values(), strict=True)
    ]
    return Table(["accuracy, standard error (%)", *tasks], rows)


def cell(metrics: Mapping[str, float]) -> str:
    """Accuracy and its standard error in percent, or another metric by its name."""
    if "acc" not in metrics:
        return next((f"{name} {number(value, '.4g')}" for name, value in metrics.items()), "")
    error = metrics.get("acc_stderr", math.nan)
    return number(100 * metrics["acc"], ".1f") + (f" ± {100 * error:.1f}" if math.isfinite(error) else "")
