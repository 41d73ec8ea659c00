"""`GeometryReport`: what the units of a model's MLPs do, as one object that saves, loads and prints itself."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import RunError, SettingsError, listed
from ..files import file_hash, json_line, write_json
from ..tables import Table, html, number, shorten
from .entropy_report import READING_ERRORS, read_both, report_files
from .parts import places

NAMES = {
    "spectral_entropy_pre": "spectral entropy before (nats)",
    "spectral_entropy_post": "spectral entropy after (nats)",
    "participation_ratio_pre": "plain participation ratio before",
    "participation_ratio_post": "plain participation ratio after",
    "row_participation_ratio_pre": "participation ratio before",
    "row_participation_ratio_post": "participation ratio after",
    "participation_gain": "participation gain",
    "early_enrichment_pre": "early enrichment before",
    "early_enrichment_post": "early enrichment after",
    "early_enrichment_gain": "early enrichment gain",
    "jensen_shannon": "Jensen-Shannon divergence (nats)",
    "frequency": "firing frequency",
    "dead": "dead units",
    "always_on": "units always on",
    "overlap": "overlap",
    "independent_overlap": "overlap if independent",
    "specialisation": "specialisation",
    "patterns": "effective firing patterns",
    "alignment": "alignment",
    "between_share": "variance between classes",
    "class_selectivity": "class selectivity",
    "within_selectivity": "selectivity within classes",
}
"""Metric -> what tables and pictures call it; "before" and "after" the activation."""
SPECTRA = (
    "row_participation_ratio_pre",
    "row_participation_ratio_post",
    "spectral_entropy_pre",
    "spectral_entropy_post",
    "early_enrichment_pre",
    "early_enrichment_post",
    "jensen_shannon",
)
FIRING = ("frequency", "dead", "always_on", "overlap", "independent_overlap", "specialisation", "patterns")
TENSORS = ("values", "standard_errors", "left_out", "units")


@dataclass
class GeometryReport:
    """
    Shapes: L MLPs, K groups of documents, F units (of the widest MLP; what another lacks is NaN).

    Args:
        name: of the model.
        modules: names of the L MLPs.
        values: metric -> [L]; those of classes and of inputs are called "metric/kind". See `NAMES`.
        standard_errors: metric -> [L], from a jackknife over groups; NaN with fewer than two of them.
        left_out: metric -> [K, L] without each group in turn, NaN for a group without rows.
        units: "frequency" -> [L, F] how often each unit fires; "spectrum_pre", "spectrum_post" -> [L, F] eigenvalues.
        rows, widths: [L] tokens and units of each MLP.
        documents: how many were read.
        metadata: data hash, groups, classes, versions.
    """

    name: str
    modules: list[str]
    values: dict[str, Tensor]
    standard_errors: dict[str, Tensor]
    left_out: dict[str, Tensor]
    units: dict[str, Tensor]
    rows: Tensor
    widths: Tensor
    documents: int
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def few_rows(self) -> Tensor:
        """[L] where there are no more rows than units: spectra are not told, but for the row-corrected ratio."""
        return self.rows <= self.widths

    @property
    def kinds(self) -> list[str]:
        """What units were told apart by, and "inputs"."""
        return list(dict.fromkeys(key.partition("/")[2] for key in self.values if "/" in key))

    @property
    def places(self) -> list[str]:
        """Short names of the MLPs: "layer_00", "encoder/layer_00", ..."""
        return places(self.modules)

    def save(self, path: str | Path) -> None:
        """Write `path` (strict JSON, NaN as null) and all tensors beside it as safetensors, as an `EntropyReport`."""
        path, beside = report_files(path)
        tensors = {
            f"{kind}:{key}": value.contiguous() for kind in TENSORS for key, value in getattr(self, kind).items()
        }
        tensors |= {"rows": self.rows, "widths": self.widths}
        save_file(tensors, beside, metadata={"name": self.name, "metadata": json_line(self.metadata)})
        shown = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("left_out", "units")}
        write_json(path, shown | {"safetensors_sha256": file_hash(beside)})

    @classmethod
    def load(cls, path: str | Path) -> "GeometryReport":
        """
        Raises:
            RunError: one of the two files is missing or something else, or they are of two reports.
        """
        path, beside = report_files(path)
        try:
            values, tensors = read_both(path, beside)
            found: dict[str, Any] = {kind: {} for kind in TENSORS}
            for key, value in tensors.items():
                kind, _, metric = key.partition(":")
                if metric:
                    found[kind][metric] = value
            order = list(values["values"])  # safetensors sorts
            for kind in ("values", "standard_errors", "left_out"):
                found[kind] = {metric: found[kind][metric] for metric in order}
            found |= {"rows": tensors["rows"], "widths": tensors["widths"]}
            return cls(**{f.name: found[f.name] if f.name in found else values[f.name] for f in fields(cls)})
        except (*READING_ERRORS, SafetensorError) as error:
            raise RunError(
                f"{path} and {beside.name} beside it are no geometry report: {type(error).__name__} {error}."
            ) from error

    def format(self, metric: str, layer: int) -> str:
        """A value and its standard error."""
        value, error = (float(x[metric][layer]) for x in (self.values, self.standard_errors))
        if math.isnan(value):
            return "-"
        digits = 1 if abs(value) >= 10 else 3
        return f"{value:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")

    def by_layer(self, metrics: Sequence[str]) -> Table:
        """Of every MLP, its rows and units, and these metrics with their standard errors."""
        header = ["MLP", "rows", "units", *map(title, metrics)]
        rows = [
            [place, str(int(self.rows[layer])), str(int(self.widths[layer])), *(self.format(m, layer) for m in metrics)]
            for layer, place in enumerate(self.places)
        ]
        return Table(header, rows)

    def of_kind(self, kind: str) -> Table:
        """The metrics of one kind of classes, or "inputs"."""
        table = self.by_layer([key for key in self.values if key.endswith(f"/{kind}")])
        return replace(table, header=[text.partition(", ")[0] for text in table.header])

    def notes(self) -> list[str]:
        """What the numbers do not say."""
        said = []
        if few := [place for place, is_few in zip(self.places, self.few_rows.tolist(), strict=True) if is_few]:
            said.append(
                f"No spectra of {listed(few)}: no more rows than units. Give more text. The participation ratio, which "
                "is corrected for few rows, is told from four rows on."
            )
        if self.metadata.get("groups", 1) > self.documents == 1:
            said.append("A single document has no standard errors.")
        elif self.metadata.get("groups", 1) > self.documents:
            said.append(f"{self.documents} documents in {self.metadata['groups']} groups: standard errors are rough.")
        return said

    def table(self) -> str:
        """The metrics of every MLP as plain text."""
        groups = self.metadata.get("groups")
        parts = [
            f"{self.name}: {self.documents} documents, values ± standard errors over {groups} groups of them",
            f"Spectra before and after the activation\n{self.by_layer(SPECTRA)!r}",
            f"Firing\n{self.by_layer(FIRING)!r}",
            *(f"By {kind}\n{self.of_kind(kind)!r}" for kind in self.kinds),
            *self.notes(),
        ]
        return "\n\n".join(parts)

    def to_pandas(self) -> Any:
        """
        A `pandas.DataFrame` with one line for each MLP and metric: module, metric, value, standard_error, rows, units.

        Raises:
            SettingsError: pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ImportError as error:
            raise SettingsError(f"to_pandas needs pandas: pip install pandas ({error}).") from error
        lines = [
            (module, metric, *(float(x[layer]) for x in columns), int(self.rows[layer]), int(self.widths[layer]))
            for metric in self.values
            for columns in [(self.values[metric], self.standard_errors[metric])]
            for layer, module in enumerate(self.modules)
        ]
        return DataFrame(lines, columns=["module", "metric", "value", "standard_error", "rows", "units"])

    def verdict(self) -> str:
        """In a sentence: how many directions and firing patterns units use on average."""
        mean = {
            key: number(float(self.values[key].nanmean()), ".2f") for key in ("participation_gain", "specialisation")
        }
        return (
            f"{shorten(self.name)}: on average over {len(self.modules)} MLPs, the activation multiplies the "
            f"participation ratio by {mean['participation_gain']}; specialisation {mean['specialisation']}."
        )

    def __repr__(self) -> str:
        return f"<GeometryReport {self.verdict()}>"

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        return html(self.by_layer((*SPECTRA[:2], "specialisation", "patterns")), self.verdict())


def title(metric: str) -> str:
    """What a metric is called."""
    name, _, kind = metric.partition("/")
    return f"{NAMES[name]}, {kind}" if kind else NAMES[name]
