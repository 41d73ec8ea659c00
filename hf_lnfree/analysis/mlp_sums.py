"""Everything that is added up of one MLP, and the metrics that follow from it, one function for all rows and for those
without a group."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from .alignment import alignment
from .mlp_capture import MLPRows
from .moments import CrossMoments, Moments, left_out
from .selectivity import ClassSums, between_share, class_selectivity, within_selectivity
from .specialisation import SignSums, firing
from .spectra import (
    early_enrichment,
    jensen_shannon,
    participation_ratio,
    row_participation_ratio,
    spectral_entropy,
    spectrum,
)

FEW_CLASSES = 2
CLASS_METRICS = ("between_share", "class_selectivity", "within_selectivity", "alignment")


@dataclass
class MLPSums:
    """
    Of one MLP, by group of documents. K groups, F hidden units, E inputs, C classes: O(K F (F + E + C)) memory.

    Args:
        pre, post, inputs: sums over rows of each.
        cross: of post- with input features.
        signs: where pre-activations are above 0.
        values: kind of class -> sums over the post-activations in each class.
        fired: the same over max(0, pre-activation), which is never negative.
    """

    pre: Moments
    post: Moments
    inputs: Moments | None
    cross: CrossMoments | None
    signs: SignSums
    values: dict[str, ClassSums] = field(default_factory=dict)
    fired: dict[str, ClassSums] = field(default_factory=dict)

    @classmethod
    def like(cls, rows: MLPRows, groups: int) -> "MLPSums":
        """Of no rows, for rows of that width, where they are."""
        device = torch.device("cpu") if rows.pre.device.type == "mps" else rows.pre.device  # which lacks float64
        width, inputs = rows.pre.shape[1], None if rows.inputs is None else rows.inputs.shape[1]
        return cls(
            Moments.empty(width, groups, device),
            Moments.empty(width, groups, device),
            None if inputs is None else Moments.empty(inputs, groups, device),
            None if inputs is None else CrossMoments.empty(width, inputs, groups, device),
            SignSums.empty(width, groups, device),
        )

    @property
    def width(self) -> int:
        return self.pre.total.shape[1]

    @property
    def rows(self) -> int:
        return int(self.pre.count.sum())

    def add(self, rows: MLPRows, groups: Tensor, labels: Mapping[str, Tensor]) -> None:
        """
        Args:
            groups: [N] the group of each row.
            labels: kind of class -> [N] the class of each row, negative for none.

        Raises:
            DataError: rows of another width than those before.
        """
        device = self.pre.total.device
        groups, labels = groups.to(device), {kind: values.to(device) for kind, values in labels.items()}
        for kind, values in labels.items():
            wanted = max(FEW_CLASSES, int(values.max()) + 1 if len(values) else 0)
            for sums in (self.values, self.fired):
                had = sums.get(kind) or ClassSums.empty(wanted, self.width, len(self.pre.count), device)
                sums[kind] = had.wider(wanted)
        pre, post = rows.pre.to(device), rows.post.to(device)
        inputs = None if rows.inputs is None or self.inputs is None else rows.inputs.to(device)
        if (inputs is None) != (self.inputs is None):
            raise DataError(f"{rows.name} has inputs in one batch and none in another.")
        for group in groups.unique().tolist():
            here = groups == group
            x, y = pre[here], post[here]
            self.pre.add(x, group)
            self.post.add(y, group)
            self.signs.add(x, group)
            if inputs is not None and self.inputs is not None and self.cross is not None:
                self.inputs.add(inputs[here], group)
                self.cross.add(y, inputs[here], group)
            for kind, values in labels.items():
                self.values[kind].add(y, values[here], group)
                self.fired[kind].add(x.relu(), values[here], group)

    def parts(self) -> Iterator[tuple[str, Any]]:
        """Its sums by name; a mapping of sums is one part."""
        yield from vars(self).items()

    def map(self, change: Any, *others: "MLPSums") -> "MLPSums":
        """With every part changed by a function of it and of those of `others`."""

        def changed(part: Any, *more: Any) -> Any:
            if isinstance(part, dict):
                kinds = [kind for kind in part if all(kind in other for other in more)]
                return {kind: change(part[kind], *(other[kind] for other in more)) for kind in kinds}
            return None if any(each is None for each in (part, *more)) else change(part, *more)

        values = {name: changed(part, *(vars(other)[name] for other in others)) for name, part in self.parts()}
        return replace(self, **values)

    def __add__(self, other: "MLPSums") -> "MLPSums":
        return self.map(lambda one, two: one + two, other)

    def whole(self) -> "MLPSums":
        """All groups as one."""
        return self.map(lambda part: part.whole())

    def without(self, group: int) -> "MLPSums":
        """All groups but one, as one."""
        return self.map(lambda part: part.without(group))


@dataclass
class MLPMetrics:
    """
    Args:
        values: name -> a number.
        left: name -> [K] the same without each group in turn, NaN for groups without rows.
        units: "frequency", "spectrum_pre", "spectrum_post" -> [F].
    """

    values: dict[str, float]
    left: dict[str, Tensor]
    units: dict[str, Tensor]


def metrics(sums: MLPSums, spectra: bool = True) -> MLPMetrics:
    """Of all rows, and without each group in turn; without `spectra` what needs eigenvalues is NaN."""
    found, units = metrics_of(sums.whole(), spectra)
    names = list(found)
    left = left_out(lambda part: torch.stack(list(metrics_of(part, spectra)[0].values())), sums.pre.count, sums).cpu()
    left = left.expand(len(left), len(names)) if left.dim() > 1 else left[:, None].expand(-1, len(names))
    return MLPMetrics(
        {name: float(value) for name, value in found.items()},
        dict(zip(names, left.unbind(1), strict=True)),
        {name: value.cpu() for name, value in units.items()},
    )


@torch.no_grad()
def metrics_of(sums: MLPSums, spectra: bool = True) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """
    Every metric of sums that are one group, and what there is of every unit.

    Means of units leave out those where a metric is not defined. What needs the spectrum of a covariance is NaN unless
    there are more rows than units, and without `spectra`.
    """
    count, width = float(sums.pre.count), sums.width
    enough = spectra and count > width
    unknown = torch.full((width,), torch.nan, dtype=torch.float64, device=sums.pre.total.device)
    pre, post = (spectrum(part) if enough else unknown for part in (sums.pre, sums.post))
    row_pre, row_post = map(row_participation_ratio, (sums.pre, sums.post))
    fires = firing(sums.signs.together[0], count)
    found = {
        "spectral_entropy_pre": spectral_entropy(pre),
        "spectral_entropy_post": spectral_entropy(post),
        "participation_ratio_pre": participation_ratio(pre),
        "participation_ratio_post": participation_ratio(post),
        "row_participation_ratio_pre": row_pre,
        "row_participation_ratio_post": row_post,
        "participation_gain": row_post / row_pre,
        "early_enrichment_pre": early_enrichment(pre),
        "early_enrichment_post": early_enrichment(post),
        "early_enrichment_gain": early_enrichment(post) - early_enrichment(pre),
        "jensen_shannon": jensen_shannon(pre, post),
        "frequency": fires.frequency.mean(),
        "dead": fires.dead,
        "always_on": fires.always_on,
        "overlap": fires.overlap,
        "independent_overlap": fires.independent_overlap,
        "specialisation": fires.specialisation,
        "patterns": fires.patterns if enough else unknown[0],
        "alignment/inputs": unknown[0],
    }
    if sums.inputs is not None and sums.cross is not None:
        found["alignment/inputs"] = alignment(sums.post, sums.inputs, sums.cross)
    for kind in sums.values:
        found[f"between_share/{kind}"] = between_share(sums.values[kind]).nanmean()
        found[f"class_selectivity/{kind}"] = class_selectivity(sums.fired[kind]).nanmean()
        found[f"within_selectivity/{kind}"] = within_selectivity(sums.fired[kind]).nanmean()
        found[f"alignment/{kind}"] = alignment(sums.post, *sums.values[kind].one_hot(sums.post))
    units = {"frequency": fires.frequency, "spectrum_pre": pre, "spectrum_post": post}
    return {name: value.double() for name, value in found.items()}, units
