"""Entropy reports of one or several models -> a folder: JSON and safetensors, pictures, and one page with all of it."""

import re
from collections.abc import Sequence
from pathlib import Path

from ..analysis.comparison import EntropyComparison, compare_reports
from ..analysis.entropy import MAXIMA, Maximum
from ..analysis.entropy_report import EntropyReport
from ..files import json_text
from ..tables import Table, number
from .plots import bucket_bars, difference_heatmaps, distributions, heatmaps, position_curves, save
from .report import Picture, Section, write_report

LARGEST_FLAG_TABLE = 40


def comparable(reports: Sequence[EntropyReport]) -> list[EntropyComparison]:
    """Every report that has the shape of the first, against the first."""
    first, *others = reports
    return [compare_reports(first, other) for other in others if other.entropy.shape == first.entropy.shape]


def bucket_table(reports: Sequence[EntropyReport], maximum: Maximum | float, note: str) -> Table:
    """Shares of heads by quarter of one maximum; with replicates, with their 95 % intervals."""
    header = ["model", "0..max/4", "max/4..max/2", "max/2..3max/4", "3max/4..max", "max (nats)"]
    rows = [[r.name, *r.format_shares(maximum), r.format_maximum(maximum)] for r in reports]
    return Table(header, rows, f"Share of heads by quarter of the maximum entropy; {note}.")


def names(reports: Sequence[EntropyReport], maximum: Maximum | float) -> str:
    """What a maximum is for these reports."""
    return ", ".join(dict.fromkeys(report.name_of(maximum) for report in reports))


def part_table(report: EntropyReport) -> Table:
    """Encoder, decoder and cross-attention apart, each against its own bound."""
    rows = []
    for part in report.parts:
        found = report.part_summary(part)
        collapsed, *_, overloaded = (f"{100 * share:.0f} %" for share in found["shares"].tolist())
        share = number(100 * found["mean_normalized"], ".1f")
        mean = number(found["mean_entropy"], ".3f")
        rows.append([part, found["bound"], str(found["heads"]), mean, f"{share} %", collapsed, overloaded])
    header = ["part", "bound", "heads", "mean (nats)", "of the bound", "collapsed", "overloaded"]
    return Table(header, rows, f"{report.name}: its attentions, each against the bound of its own rows.")


def file_names(reports: Sequence[EntropyReport]) -> list[str]:
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
        maximum: the entropy that counts as 100 % where heads are flagged.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for report, name in zip(reports, file_names(reports), strict=True):
        report.save(folder / f"entropy-{name}.json")
    figures = {
        "heatmaps": Picture(heatmaps(reports), "Mean entropy of every head, one colour scale for all models."),
        "distributions": Picture(
            distributions(reports),
            "Entropy of rows by layer: median, middle half, 5 % to 95 %. Dotted: ln(context length).",
        ),
        "positions": Picture(
            position_curves(reports),
            "Mean entropy by position; each point stands for the positions up to a power of two.",
        ),
        "buckets": Picture(bucket_bars(reports), "Heads by quarter of three maxima; bars: 95 % bootstrap intervals."),
    }
    comparisons = comparable(reports)
    if comparisons:
        caption = "Framed: the simultaneous 95 % interval over all heads leaves out zero."
        figures["differences"] = Picture(difference_heatmaps(comparisons), caption)
    for name, picture in figures.items():
        save(picture.figure, folder / name)
    sections = [
        Section("Every head", [report_line(r) for r in reports], figures=[figures["heatmaps"]]),
        Section(
            "Heads by quarter",
            ["Overload: above three quarters of the maximum. Collapse: at or below one quarter."],
            [bucket_table(reports, m, f"{names(reports, m)} maximum, 95 % bootstrap intervals") for m in MAXIMA]
            + [part_table(report) for report in reports if len(report.parts) > 1],
            [figures["buckets"]],
        ),
        Section("Rows", figures=[figures["distributions"], figures["positions"]]),
        *([Section("What moved", figures=[figures["differences"]], details=moved(comparisons))] if comparisons else []),
        Section("Flagged heads", tables=[flag_table(r, maximum) for r in reports]),
        Section("Where the numbers are from", details={r.name: json_text(r.metadata) for r in reports}),
    ]
    write_report(folder / "report.html", "Attention entropy", ", ".join(r.name for r in reports), sections)


def moved(comparisons: Sequence[EntropyComparison]) -> dict[str, str]:
    """Of each comparison the heads that moved, by its heading."""
    return {f"{c.other.name} against {c.baseline.name}": c.table(count=40) for c in comparisons}


def report_line(report: EntropyReport) -> str:
    """What a report says in a sentence."""
    summary = report.summary()
    mean, normalized = number(summary["mean_entropy"], ".3f"), number(100 * summary["mean_normalized"], ".1f")
    return (
        f"{report.name} ({report.source}): {mean} nats on average over {summary['heads']} heads, {normalized} % of "
        f"what each row could have; {int(report.rows.max())} rows of {report.sequences} sequences, up to "
        f"{report.context_length} keys; {int(report.nonfinite_rows.sum())} rows not finite, "
        f"{int(report.masked_rows.sum())} left out for having no key."
    )


def flag_table(report: EntropyReport, maximum: Maximum | float) -> Table:
    """The heads that are overloaded, collapsed or not finite, each with its reason."""
    flags = report.flags(maximum)
    rows = [[str(f.layer), str(f.head), f.kind, f.reason] for f in flags[:LARGEST_FLAG_TABLE]]
    more = f"; the first {LARGEST_FLAG_TABLE} of {len(flags)} are shown" if len(flags) > LARGEST_FLAG_TABLE else ""
    note = f"{report.name}: {len(flags)} heads flagged against the {report.name_of(maximum)} maximum{more}."
    return Table(["layer", "head", "flag", "reason"], rows, note)
