"""Entropy reports of one or several models -> a folder: JSON and safetensors, pictures, and one page with all of it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..analysis.comparison import EntropyComparison, compare_reports
from ..analysis.entropy import MAXIMA, Maximum
from ..analysis.entropy_report import EntropyReport
from ..analysis.geometry_report import GeometryReport
from ..files import json_text
from ..tables import number
from .heads import bucket_table, entropy_verdict, flagged_heads, names, part_table
from .plots import bucket_bars, difference_heatmaps, distributions, heatmaps, position_curves, save
from .report import Block, Choice, Fold, Listing, Picture, Section, write_report

STATISTICS_NOTE = (
    "Over heads and queries: the largest logit; means of the variance of a query's logits, of its attention to the "
    "first key and to the 8 keys that get most of it, and of the norm of the head's output before the projection."
)


def comparable(reports: Sequence[EntropyReport]) -> list[EntropyComparison]:
    """Every report that has the shape of the first, against the first."""
    first, *others = reports
    return [compare_reports(first, other) for other in others if other.entropy.shape == first.entropy.shape]


def file_names(reports: Sequence[EntropyReport | GeometryReport]) -> list[str]:
    """A file name for each report; with their numbers where two are equal, or would be without upper and lower case."""
    stems = [re.sub(r"[^\w.+-]+", "-", report.name).strip("-.") or "model" for report in reports]
    if len({stem.lower() for stem in stems}) == len(stems):
        return stems
    return [f"{stem}-{index}" for index, stem in enumerate(stems)]


def write_entropy_page(
    folder: str | Path, reports: Sequence[EntropyReport], maximum: Maximum | float = "causal"
) -> None:
    """
    Write `entropy-NAME.json` and `.safetensors` of each report, each picture as SVG and PNG, and `report.html`.

    Args:
        folder: made if it is not there.
        reports: the first is what the others are compared with.
        maximum: the entropy that counts as 100 %; the page shows the shares under the others folded.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for report, name in zip(reports, file_names(reports), strict=True):
        report.save(folder / f"entropy-{name}.json")
    labels = ", ".join(report.name for report in reports)
    top = names(reports, maximum)
    figures = {
        "heatmaps": Picture(
            heatmaps(reports, maximum=maximum),
            "Mean entropy of every head, one colour scale for all models. Under the pointer: what each head is.",
            f"Heat maps of the mean attention entropy of every head, layers down, heads across, of {labels}.",
        ),
        "distributions": Picture(
            distributions(reports),
            "Entropy of single queries by layer: median, middle half, 5 % to 95 %. Dotted: ln(context length).",
            f"By layer, the median and spread of the entropies of single queries, of {labels}.",
        ),
        "positions": Picture(
            position_curves(reports),
            "Mean entropy by position; each point stands for the positions up to a power of two.",
            f"By layer, mean entropy over positions in the sequence, below the largest possible, of {labels}.",
        ),
        "buckets": Picture(
            bucket_bars(reports, [maximum]),
            f"Heads by quarter of the {top} maximum; bars: 95 % bootstrap intervals.",
            f"Bars: per cent of heads in each quarter of the {top} maximum, of {labels}; the table gives the numbers.",
        ),
    }
    comparisons = comparable(reports)
    if comparisons:
        figures["differences"] = Picture(
            difference_heatmaps(comparisons),
            "Framed: the simultaneous 95 % interval over all heads leaves out zero.",
            f"Heat maps of how far the mean entropy of every head moved from {reports[0].name} to the other models.",
        )
    for name, picture in figures.items():
        save(picture.figure, folder / name)
    sections = [
        Section("Verdict", [entropy_verdict(reports, maximum), figures["heatmaps"]]),
        Section("Heads that stand out", [block for report in reports for block in flagged_heads(report, maximum)]),
        Section("Heads by quarter", quarters(reports, maximum, figures["buckets"])),
        *changes(comparisons, figures),
        *statistics(reports),
        *text_by_text(reports, maximum),
        Section("Single queries", [figures["distributions"], figures["positions"]]),
        Section(
            "Where the numbers are from",
            [*map(report_line, reports), *(Fold(r.name, [Listing(json_text(r.metadata))]) for r in reports)],
        ),
    ]
    write_report(folder / "report.html", "Attention entropy", labels, sections)


def changes(comparisons: Sequence[EntropyComparison], figures: Mapping[str, Picture]) -> list[Section]:
    """What moved between the models; no section for one alone."""
    if not comparisons:
        return []
    said = [block for comparison in comparisons for block in moved(comparison)]
    return [Section("What moved", [*said, figures["differences"]])]


def statistics(reports: Sequence[EntropyReport]) -> list[Section]:
    """Logits, sinks and norms of outputs by layer; no section where they were not measured."""
    blocks: list[Block] = []
    for report in reports:
        if len(report.statistics):
            table = report.statistics_by_layer()
            blocks += [f"{report.name}: {report.format_statistics()}.", replace(table, note=STATISTICS_NOTE)]
    return [Section("Logits, sinks and outputs", blocks)] if blocks else []


def text_by_text(reports: Sequence[EntropyReport], maximum: Maximum | float) -> list[Section]:
    """
    A heat map for each of the first texts, to choose from, of the reports on the same data as the first one; no section
    for a single text.
    """
    first = reports[0]
    alike = [r for r in reports if r.metadata.get("data_sha256") == first.metadata.get("data_sha256")]
    count = min(len(report.sequence_entropy) for report in alike)
    texts, labels = first.metadata.get("first_texts", []), ", ".join(report.name for report in alike)
    options: dict[str, list[Block]] = {}
    for index in range(count):
        shown = [report.of_sequence(index) for report in alike]
        if not all(report.heads.any() for report in shown):  # nothing but padding
            continue
        picture = Picture(
            heatmaps(shown, maximum=maximum),
            "Mean entropy of every head on this text alone.",
            f"Heat maps of the mean attention entropy of every head on text {index} alone, of {labels}.",
        )
        options[str(index)] = [*(Listing(beginning(text)) for text in texts[index : index + 1]), picture]
    if len(options) < 2:
        return []
    said = f"The first {len(options)} texts, each by itself. One text alone says little about a head."
    return [Section("Text by text", [said, Choice("text", options)])]


def beginning(text: str, length: int = 400) -> str:
    """Of a text that is long."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def quarters(reports: Sequence[EntropyReport], maximum: Maximum | float, bars: Picture) -> list[Block]:
    """Shares of heads by quarter of the maximum that was asked for; of the others folded."""
    tables = {
        top: bucket_table(reports, top, f"{names(reports, top)} maximum, in brackets 95 % bootstrap intervals")
        for top in (maximum, *MAXIMA)
    }
    others = [table for top, table in tables.items() if top != maximum]
    parts = [part_table(report) for report in reports if len(report.parts) > 1]
    return [tables[maximum], *parts, bars, Fold("The same by other maxima", others)]


def moved(comparison: EntropyComparison) -> list[Block]:
    """How many heads moved, and folded which."""
    count, *heads = comparison.table(count=comparison.difference.numel()).splitlines()
    return [f"{count}.", *([Fold("The heads that moved", [Listing("\n".join(heads))])] if heads else [])]


def report_line(report: EntropyReport) -> str:
    """What a report says in a sentence."""
    summary = report.summary()
    mean, normalized = number(summary["mean_entropy"], ".3f"), number(100 * summary["mean_normalized"], ".1f")
    return (
        f"{report.name} ({report.source}): {mean} nats on average over {summary['heads']} heads, {normalized} % of "
        f"what each query could have; {int(report.rows.max())} queries of {report.sequences} sequences, up to "
        f"{report.context_length} keys. Over all heads {int(report.nonfinite_rows.sum())} entropies are not finite; "
        f"{int(report.masked_rows.sum())} queries were left out for having no key."
    )
