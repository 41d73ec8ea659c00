"""`EntropyReport`: the entropies of a model's heads as one object that saves, loads, prints and draws itself."""

import json
import math
from collections import Counter
from dataclasses import MISSING, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import RunError, SettingsError
from ..files import file_hash, json_line, write_json
from ..tables import Table, html, number, shorten
from .entropy import Maximum, bucket_shares, entropy_maximum
from .head_entropies import FEWEST_KEYS, FEWEST_SEQUENCES, HeadEntropies
from .head_statistics import DORMANT, SINK, TITLES

if TYPE_CHECKING:
    from .drawing import NotebookFigure

READING_ERRORS = (
    FileNotFoundError,
    KeyError,
    AttributeError,
    UnicodeDecodeError,
    json.JSONDecodeError,
    SafetensorError,
)


class EntropyReport(HeadEntropies):
    """
    A report prints as text, shows itself in a notebook, and goes to pandas; its fields are those of `HeadEntropies`.

    Example:
        >>> report = AttentionEntropyAnalyzer(model).run(batches)
        >>> report.verdict(), report.plot(), report.to_pandas()
    """

    def save(self, path: str | Path) -> None:
        """
        Write `path` (strict JSON, NaN as null, for people and other tools) and all of it beside as safetensors.

        Both have the name of `path` and a suffix of their own: "qwen-0.5B" and "qwen-0.5B.json" alike give
        qwen-0.5B.json and qwen-0.5B.safetensors.
        """
        path, beside = report_files(path)
        everything = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {key: value.clone() for key, value in everything.items() if isinstance(value, Tensor)}
        about = {"name": self.name, "source": self.source, "metadata": json_line(self.metadata)}
        save_file(tensors, beside, metadata=about)
        shown = {key: value for key, value in everything.items() if not isinstance(value, Tensor) or value.dim() == 2}
        write_json(path, shown | {"summary": self.summary(), "safetensors_sha256": file_hash(beside)})

    @classmethod
    def load(cls, path: str | Path) -> "EntropyReport":
        """
        Raises:
            RunError: one of the two files is missing or something else, or they are of two reports.
        """
        path, beside = report_files(path)
        try:
            values, tensors = read_both(path, beside)
            values = {"kinds": []} | values | tensors
            optional = {f.name for f in fields(cls) if f.default_factory is not MISSING}  # older files lack them
            return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values or f.name not in optional})
        except (*READING_ERRORS, SafetensorError) as error:
            raise RunError(
                f"{path} and {beside.name} beside it are no entropy report: {type(error).__name__} {error}."
            ) from error

    def table(self, maximum: Maximum | float = "causal") -> str:
        """Layers x heads in nats, then buckets, overload and collapse, as plain text."""
        lines = [f"{self.name}: mean attention entropy in nats ({self.source})"]
        width = 7 if self.entropy[self.heads].isfinite().all() else 12  # room for "not finite"
        lines.append("layer " + "".join(f"{f'h{h}':>{width}}" for h in range(self.entropy.shape[1])) + "    mean")
        means = self.layer_means()
        for part, layers in self.parts.items():
            lines += [part] if len(self.parts) > 1 else []
            for layer in layers:
                shown = [number(x, ".2f") if self.heads[layer, h] else "" for h, x in enumerate(self.entropy[layer])]
                mean = number(means[layer], ".2f")
                lines.append(f"{layer:>5} {''.join(f'{text:>{width}}' for text in shown)} {mean:>7}")
        for part, layers in self.parts.items():
            of = f"{part}: " if len(self.parts) > 1 else ""
            heads, top = self.heads[layers], self.maximum(maximum)[layers]
            shares = " / ".join(
                f"{100 * x:.0f}" for x in bucket_shares(self.entropy[layers][heads], top[heads]).tolist()
            )
            nats = f"{span(top[heads])} nats ({self.name_of(maximum, part)})"
            lines.append(f"{of}heads by quarter of {nats}: {shares} %")
        if self.metadata.get("class_token"):
            alone, others = (number(float(x[self.heads].mean()), ".2f") for x in self.first_token)
            lines.append(f"class token {alone} nats, other queries {others} nats")
        collapsed, *_, overloaded = self.format_shares(maximum, digits=1)
        verdict = f"overloaded {overloaded}, collapsed {collapsed}"
        if self.too_short:
            verdict = f"too short for a verdict on heads, which needs queries of {FEWEST_KEYS} keys"
        lines.append(
            f"{verdict}; {int(self.rows.max())} rows of {self.sequences} sequences, up to {self.context_length} keys"
        )
        if len(self.replicates) and self.sequences < FEWEST_SEQUENCES:
            lines.append(f"no intervals: {self.sequences} sequences, {FEWEST_SEQUENCES} are needed")
        if len(self.statistics):
            lines.append(self.format_statistics())
        if lost := self.metadata.get("texts", {}).get("tokens_left_out"):
            texts = self.metadata["texts"]["texts"]
            lines.append(f"{lost} tokens after the last whole windows of {texts} texts were left out")
        if masked := int(self.masked_rows.sum()):
            lines.append(f"{masked} rows that may attend to nothing were left out")
        if lost := int(self.nonfinite_rows.sum()):
            lines.append(f"{lost} rows are not finite: the model has diverged there")
        return "\n".join(lines)

    def format_shares(self, maximum: Maximum | float = "causal", digits: int = 0) -> list[str]:
        """Shares of heads by quarter in per cent, with their 95 % intervals where there are some."""
        texts = []
        for share, (low, high) in zip(self.buckets(maximum), self.bucket_intervals(maximum), strict=True):
            interval = "" if low.isnan() else f" ({100 * low:.{digits}f} to {100 * high:.{digits}f})"
            texts.append(f"{100 * share:.{digits}f} %{interval}")
        return texts

    def format_statistics(self) -> str:
        """In a line: heads with a sink, dormant ones, the largest logit of all."""
        sinks, dormant = (number(100 * x, ".1f") for x in (self.sink_heads(), self.dormant_heads()))
        largest = number(float(self.statistic("largest_logit")[self.heads].max()), ".1f")
        return (
            f"attention sinks in {sinks} % of heads (mass above {SINK}), {dormant} % dormant (output below {DORMANT} "
            f"of their layer's); largest logit {largest}"
        )

    def statistics_by_layer(self) -> Table:
        """Of every layer: the largest logit, and means over heads of the other statistics."""
        rows = []
        for layer, name in enumerate(self.layer_names):
            largest, *means = (values[layer][self.heads[layer]] for values in self.statistics)
            shown = [float(largest.max()), *(float(mean.mean()) for mean in means)]
            rows.append([name, *(number(x, ".3g") for x in shown)])
        return Table(["layer", *TITLES], rows)

    def format_maximum(self, maximum: Maximum | float = "causal") -> str:
        """The maximum in nats; from the lowest to the highest where heads differ in it."""
        return span(self.maximum(maximum)[self.heads])

    def verdict(self, maximum: Maximum | float = "causal") -> str:
        """In a sentence: how many heads are overloaded and how many collapsed, or why that cannot be told."""
        found = Counter(flag.kind for flag in self.flags(maximum))
        heads, top = int(self.heads.sum()), self.name_of(maximum)
        said = (
            f"{self.name}: {found['overloaded']} of {heads} heads are overloaded (above 3/4 of the {top} maximum), "
            f"{found['collapsed']} collapsed (at most 1/4)."
        )
        if self.too_short:
            said = (
                f"{self.name}: too short for a verdict on {heads} heads. It needs queries of {FEWEST_KEYS} keys; "
                f"the longest here have {self.context_length}."
            )
        if lost := found["not finite"]:
            said += f" {lost} of {heads} heads have rows that are not finite: the model has diverged there."
        return said

    def of_sequence(self, index: int) -> "EntropyReport":
        """
        The same with the entropies and bounds of one of the first sequences, which have no standard errors; everything
        else is of all sequences.

        Raises:
            SettingsError: the report does not have that sequence by itself.
        """
        if not 0 <= index < len(self.sequence_entropy):
            raise SettingsError(f"Sequence {index}: the report has {len(self.sequence_entropy)} by themselves, from 0.")
        entropy, bound = self.sequence_entropy[index], self.sequence_bound[index]
        return replace(self, entropy=entropy, bound=bound, standard_error=torch.full_like(entropy, math.nan))

    def plot(self, *others: "EntropyReport", columns: int = 2) -> "NotebookFigure":
        """
        Heat map of the mean entropy of every head in nats, a matplotlib `Figure`.

        Args:
            others: reports that are drawn beside this one, all on one colour scale from 0 to the largest bound.
            columns: how many of them stand side by side.
        """
        from .drawing import Grid, heatmaps

        reports = (self, *others)
        top = max(float(r.bound[r.heads].max()) for r in reports) or 1.0  # sequences of one token
        grids = [Grid(r.title, r.entropy, r.heads, rows=r.layer_names if len(r.parts) > 1 else None) for r in reports]
        return heatmaps(grids, "viridis", 0.0, top, ".2f", "mean attention entropy (nats)", columns)

    @property
    def title(self) -> str:
        """Of its panel in a picture."""
        return f"{shorten(self.name)} ({self.source})"

    def to_pandas(self) -> Any:
        """
        A `pandas.DataFrame` with one line for each layer and head.

        Its columns: layer, head, entropy (nats), bound (nats), share (entropy / bound), standard_error (nats), and
        flag, one of the kinds of `HeadFlag`, or "".

        Raises:
            SettingsError: pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ImportError as error:
            raise SettingsError(f"to_pandas needs pandas: pip install pandas ({error}).") from error
        flags = {(flag.layer, flag.head): flag.kind for flag in self.flags()}
        places = self.heads.nonzero().tolist()
        columns = {"layer": [layer for layer, _ in places], "head": [head for _, head in places]}
        for name in ("entropy", "bound", "share", "standard_error"):
            columns[name] = getattr(self, name)[self.heads].tolist()
        return DataFrame(columns | {"flag": [flags.get((layer, head), "") for layer, head in places]})

    def by_layer(self, maximum: Maximum | float = "causal") -> Table:
        """Of every layer: mean entropy, bound, and how many heads are overloaded or collapsed."""
        found = Counter((flag.layer, flag.kind) for flag in self.flags(maximum))
        several, class_token = len(self.parts) > 1, bool(self.metadata.get("class_token"))
        alone = self.first_token[0] if class_token else None
        rows = []
        for part, layers in self.parts.items():
            for layer in layers:
                heads = self.heads[layer]
                means = (float(x[layer][heads].mean()) for x in (self.entropy, self.bound))
                share = number(100 * float(self.share[layer][heads].mean()), ".0f")
                counts = (f"{found[layer, kind]} of {int(heads.sum())}" for kind in ("overloaded", "collapsed"))
                texts = [str(layer), *(number(x, ".2f") for x in means), f"{share} %", *counts]
                texts += [] if alone is None else [number(float(alone[layer][heads].mean()), ".2f")]
                rows.append([part, *texts] if several else texts)
        header = ["layer", "mean (nats)", "bound (nats)", "of the bound", "overloaded", "collapsed"]
        header += ["class token (nats)"] * class_token
        return Table(["part", *header] if several else header, rows)

    def __repr__(self) -> str:
        return f"<EntropyReport {self.verdict()}>"

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        return html(self.by_layer(), self.verdict())


def report_files(path: str | Path) -> tuple[Path, Path]:
    """The JSON file and the safetensors file of a report that is called `path`, with ".json" or without."""
    path = Path(path)
    stem = path.name.removesuffix(".json")
    return path.with_name(f"{stem}.json"), path.with_name(f"{stem}.safetensors")


def read_both(path: Path, beside: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """
    What the JSON file and the safetensors file of a report hold; READING_ERRORS for what is not one.

    Raises:
        RunError: they are of two reports.
    """
    values = json.loads(path.read_text())
    if values.get("safetensors_sha256", found := file_hash(beside)) != found:  # older files lack it
        raise RunError(f"{beside} is not the file that {path.name} was written with: another report, or damaged.")
    return values, load_file(beside)


def span(values: Tensor) -> str:
    """The lowest to the highest of some numbers, one number where they look alike."""
    return " to ".join(dict.fromkeys((f"{values.min():.2f}", f"{values.max():.2f}")))


PAPER_RESULTS: dict[str, Any] = json.loads((files(__package__) / "data" / "paper_results.json").read_text())


def published_reports() -> dict[str, EntropyReport]:
    """The head-entropy heatmaps printed for GPT-2 small at T=128 (arXiv 2410.09637, 2501.03489), by variant."""
    length = PAPER_RESULTS["setting"]["context_length"]
    return {row: _published(row, heatmap, length) for row, heatmap in PAPER_RESULTS["heatmaps"].items()}


def _published(row: str, heatmap: list[list[float]], length: int) -> EntropyReport:
    """Means alone were printed: everything else is NaN, or empty."""
    entropy = torch.tensor(heatmap, dtype=torch.float64)
    unknown, none = torch.full_like(entropy, math.nan), torch.zeros_like(entropy, dtype=torch.long)
    means = ("standard_error", "normalized", "row_variance", "row_minimum", "row_maximum")
    empty = ("histogram", "strata_entropy", "strata_bound", "strata_rows")
    return EntropyReport(
        name=row,
        modules=[f"h.{layer}.attn" for layer in range(len(entropy))],
        entropy=entropy,
        bound=torch.full_like(entropy, entropy_maximum(entropy, "causal", length)),
        **dict.fromkeys(means, unknown),
        **dict.fromkeys(("rows", "masked_rows", "nonfinite_rows"), none),
        **dict.fromkeys(empty, entropy.new_zeros(*entropy.shape, 0)),
        replicates=entropy.new_zeros(0, *entropy.shape),
        sequences=0,
        context_length=length,
        kinds=["causal"] * len(entropy),
        source="published",
        metadata={"citation": PAPER_RESULTS["source"], **PAPER_RESULTS["setting"]},
    )
