"""Of studies that sampled the geometry of MLPs: is it lost where heads are overloaded, and which comes first?

Layers are matched by the recorder's names: the MLP and the attention of a block. Shapes: P probes, L layers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..analysis.head_entropies import OVERLOADED
from ..training.log import layer_curves
from .cells import Cell
from .statistics import Estimate, estimate

SPECIALISATION, BETWEEN, WITHIN = "specialisation", "between_share", "within_selectivity"
CLASSES = ("next_token", "label")  # by which units are told apart, of text and of images
OTHERS = ("frequency", "alignment/inputs", "row_participation_ratio_post")
ENTROPY = "entropy"
SETTLED = 5  # probes at the end whose mean is where a curve arrives


@dataclass(frozen=True)
class Probes:
    """
    What the recorder saw of one cell.

    Args:
        steps: [P] of the probes.
        values: metric -> [P, L]; "entropy" is the mean entropy of the layer's heads as a share of its bound.
    """

    steps: Tensor
    values: dict[str, Tensor]

    @classmethod
    def of(cls, cell: Cell) -> "Probes | None":
        """None of a cell without samples of geometry, or of a model of several parts, whose layers do not match."""
        found = {metric: layer_curves(cell.log, metric) for metric in (ENTROPY, *metrics_of(cell))}
        if len(found) == 1 or cell.entropy is None or any(list(curves) != [""] for curves in found.values()):
            return None
        steps = [step for step, _ in found[SPECIALISATION][""][0]]
        values = {}
        for metric, curves in found.items():
            points = [dict(line) for line in curves[""]]
            values[metric] = torch.tensor([[line.get(s, math.nan) for line in points] for s in steps]).double()
        values[ENTROPY] /= cell.entropy.part_bounds[""]
        return cls(torch.tensor(steps), values)

    @property
    def end(self) -> dict[str, Tensor]:
        """[L] where each metric arrives: its mean over the last probes."""
        return {metric: of_metric[-SETTLED:].mean(0) for metric, of_metric in self.values.items()}


def metrics_of(cell: Cell) -> list[str]:
    """The metrics that are asked about, of those that its log has."""
    asked = [SPECIALISATION, *(f"{key}/{kind}" for key in (BETWEEN, WITHIN) for kind in CLASSES), *OTHERS]
    return [metric for metric in asked if any(f"{metric}/layer_00" in entry for entry in cell.log)]


def probes_of(rows: Mapping[str, Sequence[Cell]]) -> dict[str, dict[int, Probes]]:
    """Row -> seed -> probes, of finite cells."""
    found = {
        row: {cell.seed: probes for cell in cells if (probes := Probes.of(cell)) is not None and not diverged(cell)}
        for row, cells in rows.items()
    }
    return {row: of_row for row, of_row in found.items() if of_row}


def diverged(cell: Cell) -> bool:
    """Whether its loss stopped being finite."""
    return cell.results is not None and cell.results.diverged


def differences(one: Mapping[int, Probes], other: Mapping[int, Probes], metric: str) -> list[Estimate]:
    """Of every layer, `one` minus `other` at the end, paired by seed."""
    pairs = [(one[seed].end[metric] - other[seed].end[metric]).tolist() for seed in one if seed in other]
    return [estimate(layer) for layer in zip(*pairs, strict=True)]


def correlation(rows: Sequence[Mapping[int, Probes]], metric: str, *, within_layers: bool = False) -> Estimate | None:
    """
    Pearson's r of the entropy of a layer's heads (as a share of its bound) with a metric of its MLP at the end, over
    layers and rows; its mean over seeds with the interval of a t statistic. None with no seed in all rows.

    Args:
        within_layers: after the mean over rows is taken off each layer, so that what depth does to both is left out.
    """
    seeds = [seed for seed in rows[0] if all(seed in row for row in rows)]
    found = []
    for seed in seeds:
        x, y = (torch.stack([row[seed].end[key] for row in rows]) for key in (ENTROPY, metric))  # rows, L
        if within_layers:
            x, y = x - x.mean(0), y - y.mean(0)
        found.append(float(torch.corrcoef(torch.stack((x.flatten(), y.flatten())))[0, 1]))
    return estimate(found) if found else None


def onset(difference: Tensor, steps: Tensor) -> Tensor:
    """
    [L] the first step from which a difference [P, L] stays beyond half of where it arrives; NaN where it never does.
    """
    arrives = difference[-SETTLED:].mean(0)
    beyond = difference * arrives.sign() >= arrives.abs() / 2
    stays = beyond.flip(0).cumprod(0).flip(0).bool()
    first = steps[stays.int().argmax(0)].double()
    return first.where(stays.any(0), math.nan)


def onsets(one: Mapping[int, Probes], other: Mapping[int, Probes], metric: str) -> list[Estimate | None]:
    """Of every layer the `onset` of the difference, over seeds; None where its interval at the end holds none."""
    found = zip(
        *(
            onset(one[seed].values[metric] - other[seed].values[metric], one[seed].steps).tolist()
            for seed in one
            if seed in other
        ),
        strict=True,
    )
    told = [abs(end.mean) > end.half_width for end in differences(one, other, metric)]
    return [estimate(layer) if is_told else None for layer, is_told in zip(found, told, strict=True)]


def leaving_overload(row: Mapping[int, Probes]) -> list[list[int | None]]:
    """Of every layer and seed the first step from which the mean of its heads is not overloaded; None if it stays."""
    found = []
    for probes in row.values():
        below = probes.values[ENTROPY] <= OVERLOADED  # P L
        stays = below.flip(0).cumprod(0).flip(0).bool()
        first = probes.steps[stays.int().argmax(0)].tolist()
        found.append([step if any_ else None for step, any_ in zip(first, stays.any(0).tolist(), strict=True)])
    return [list(layer) for layer in zip(*found, strict=True)]


def geometry_summary(rows: Mapping[str, Sequence[Cell]], pairs: Sequence[Sequence[str]]) -> dict[str, Any]:
    """
    For `summary.json`: of each pair of rows the differences by layer and their onsets, when heads leave overload, and
    over all rows without norms the correlation with entropy; {} where nothing was sampled.
    """
    probed = probes_of(rows)
    if not probed:
        return {}
    metrics = [metric for metric in next(iter(next(iter(probed.values())).values())).values if metric != ENTROPY]
    bare = [of_row for row, of_row in probed.items() if not has_norms(rows[row])]
    leaving = {row: leaving_overload(of_row) for row, of_row in probed.items()}
    found: dict[str, Any] = {"leaves_overload": leaving, "pairs": [], "correlation": {}}
    for one, other in pairs:
        if one in probed and other in probed:
            both = probed[one], probed[other]
            found["pairs"].append(
                {
                    "rows": [one, other],
                    "difference": {key: list(map(asdict, differences(*both, key))) for key in (ENTROPY, *metrics)},
                    "onset": {key: list(map(as_dict, onsets(*both, key))) for key in (ENTROPY, *metrics)},
                }
            )
    if len(bare) > 1:
        for metric in metrics:
            found["correlation"][metric] = {
                "over_layers_and_rows": as_dict(correlation(bare, metric)),
                "within_layers": as_dict(correlation(bare, metric, within_layers=True)),
            }
    return found


def as_dict(found: Estimate | None) -> dict[str, Any] | None:
    """For JSON."""
    return None if found is None else asdict(found)


def has_norms(cells: Sequence[Cell]) -> bool:
    """Whether the blocks of a row have norms."""
    config = next(cell.results.model for cell in cells if cell.results is not None)
    return config.get("norm") != "none"


def over_training(cell: Cell) -> dict[str, Any]:
    """For `summary.json`: what the recorder saw of one cell, to four digits."""
    probes = Probes.of(cell)
    if probes is None:
        return {}
    values = {key: [[rounded(x) for x in layer] for layer in of_key.tolist()] for key, of_key in probes.values.items()}
    return {"geometry": {"steps": probes.steps.tolist(), **values}}


def rounded(value: float) -> float:
    """To four significant digits."""
    return float(f"{value:.4g}")
