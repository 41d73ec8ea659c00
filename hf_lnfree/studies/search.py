"""Which activation where: sequential halving over assignments that begin with the layers whose heads are overloaded.

Sequential halving (arXiv 1502.07943): every rung spends as many steps; after each the better half goes on to twice the
steps. Every run of a rung is trained anew with a whole schedule, so what is compared are endpoints.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import SettingsError
from ..files import require_own, write_json
from ..provenance import command, environment
from ..tables import number as shown
from ..training.settings import merge
from .cells import Cell
from .running import STUDY_FILES, Finish, run_study
from .study import Study

SEARCH = "search.json"


def rule(values: Sequence[str]) -> str:
    """["relu", "relu", "gelu"] -> "relu:0-1,gelu:2", as configurations take it."""
    parts, start = [], 0
    for end in range(1, len(values) + 1):
        if end == len(values) or values[end] != values[start]:
            parts.append(f"{values[start]}:{start}" + (f"-{end - 1}" if end - 1 > start else ""))
            start = end
    return ",".join(parts)


def overload(cell: Cell) -> list[float]:
    """Of every layer, the mean entropy of its heads as a share of the largest possible; nothing is known as 0."""
    if cell.entropy is None:
        raise SettingsError(f"{cell.folder} has no entropy report: leave attention_report_windows above 0 in a search.")
    shares = cell.entropy.entropy / cell.entropy.bound
    return torch.nanmean(shares.double(), dim=1).nan_to_num(0.0).tolist()


def search_layers(
    study: Study,
    pair: Sequence[str],
    budget: int,
    seeds: Sequence[int],
    folder: Path,
    announce: Callable[[str], None] = print,
    finish: Finish | None = None,
    jobs: int | Literal["auto"] = 1,
    **local: Any,
) -> dict[str, Any]:
    """
    A good assignment of two activations to layers, for a number of training steps.

    The first rung trains both activations alone. The layers of the second one's model are ordered by how near to the
    largest entropy their heads are; candidates give the first activation to the k most overloaded layers, for every k.

    Args:
        study: one row; its model and data are those of the search, its `max_steps` is not used.
        pair: two activations: for overloaded layers, and for the others, like ("relu", "gelu").
        budget: steps of all runs of one seed together.
        seeds: a candidate's score is its mean loss over these.
        folder: cells are kept there as a study's are, one folder a rung.
        announce, finish, jobs, local: as `run_study`.

    Returns:
        What `search.json` holds: the assignment as a rule for `layer_activations`, the order of the layers, and every
        rung with its losses (in the file null where a run diverged).

    Raises:
        SettingsError: another number of rows or activations, or a budget too small for one step a run.
        RunError: as `run_study`.
    """
    if len(study.rows) != 1 or len(pair) != 2 or pair[0] == pair[1]:
        raise SettingsError(
            f"A search takes one row and two activations, got {len(study.rows)} rows and {', '.join(pair)}. Choose a "
            "row with --rows."
        )
    require_own(folder, "study", STUDY_FILES)
    ((name, settings),) = study.rows.items()
    model, _, _ = study.arguments(name, seeds[0], folder)
    layers = model.config(settings.get("context_length", 128)).num_hidden_layers
    sizes = [layers + 1]
    while sizes[-1] > 2:
        sizes.append(math.ceil(sizes[-1] / 2))
    least = sum(size * 2**number for number, size in enumerate(sizes))
    steps = budget // least
    if steps < 1:
        raise SettingsError(f"{layers + 1} candidates in {len(sizes)} rungs take a budget of {least} or more.")

    def train_rung(number: int, candidates: Sequence[str], steps: int) -> dict[str, list[Cell]]:
        def fields(candidate: str) -> dict[str, Any]:
            return merge(settings, {"max_steps": steps, "config_overrides": {"layer_activations": candidate}})

        rung = replace(study, rows={candidate: fields(candidate) for candidate in candidates}, compare=())
        cells = run_study(rung, seeds, folder / f"rung-{number}", candidates, announce, finish, jobs, **local)
        return {candidate: [cell for cell in cells if cell.row == candidate] for candidate in candidates}

    alone = [rule([value] * layers) for value in pair]
    trained = train_rung(0, alone, steps)
    if any(cell.results is None for cells in trained.values() for cell in cells):
        raise SettingsError(f"Another process trains cells in {folder}: a search is one process's.")
    shares = torch.tensor([overload(cell) for cell in trained[alone[1]]]).mean(0)
    order = shares.argsort(descending=True, stable=True).tolist()
    candidates = [rule([pair[0 if layer in order[:k] else 1] for layer in range(layers)]) for k in range(layers + 1)]
    record: list[dict[str, Any]] = []
    for number, size in enumerate(sizes):
        candidates = candidates[:size]
        trained = train_rung(number, candidates, steps)
        losses = {candidate: mean_loss(cells) for candidate, cells in trained.items()}
        record.append({"steps": steps, "losses": losses})
        candidates = sorted(losses, key=lambda candidate: losses[candidate])
        best = shown(losses[candidates[0]], ".4f")
        announce(f"rung {number}, {steps} steps: {candidates[0]} is ahead with loss {best}")
        steps *= 2
    found = {
        "layer_activations": candidates[0],
        "overload_by_layer": dict(enumerate(shares.tolist())),
        "order": order,
        "rungs": record,
        "seeds": list(seeds),
        "budget": budget,
        "settings": settings,
        "environment": environment(),
        "command": command(),
    }
    write_json(folder / SEARCH, found)
    return found


def mean_loss(cells: Sequence[Cell]) -> float:
    """Over seeds; a run that diverged is behind all others."""
    losses = [cell.results.eval_loss if cell.results else math.nan for cell in cells]
    mean = sum(losses) / len(losses)
    return mean if math.isfinite(mean) else math.inf
