"""What entropy reports say of their heads: a verdict in sentences, and the heads that stand out in tables."""

import math
from collections.abc import Sequence

from ..analysis.entropy import Maximum
from ..analysis.entropy_report import EntropyReport
from ..analysis.head_entropies import FEWEST_SEQUENCES, HeadFlag
from ..tables import Table, number
from .report import Block, Fold, Verdict

MOST_LISTED = 10
QUARTERS = ("up to 1/4", "1/4 to 1/2", "1/2 to 3/4", "above 3/4")


def entropy_verdict(reports: Sequence[EntropyReport], maximum: Maximum | float) -> Verdict:
    """How many heads of each model are overloaded or collapsed, and how far that can be trusted."""
    return Verdict(" ".join(report.verdict(maximum) for report in reports), limits(reports, maximum))


def limits(reports: Sequence[EntropyReport], maximum: Maximum | float) -> str:
    """The maxima of the verdict, the intervals of its shares, where they are from, and what they do not cover."""
    judged = [report for report in reports if not report.too_short]
    if not judged:
        return ""
    tops = {report.name: f"{report.format_maximum(maximum)} nats" for report in judged}
    same = len(set(tops.values())) == 1
    of_each = next(iter(tops.values())) if same else ", ".join(f"{top} for {name}" for name, top in tops.items())
    text = f"The maximum is {of_each}."
    measured = [report for report in judged if report.source == "measured"]
    if len(measured) < len(judged):
        text += " Published entropies have no intervals: means alone were printed."
    few = dict.fromkeys(report.name for report in measured if not has_intervals(report))
    if few:
        text += f" No intervals for {', '.join(few)}: they need {FEWEST_SEQUENCES} sequences."
    known = list(filter(has_intervals, measured))
    if known:
        text += (
            " In brackets, 95 % intervals from a bootstrap over the sequences that were read: "
            f"{'; '.join(shares(report, maximum) for report in known)}. They say nothing about other text."
        )
    return text


def has_intervals(report: EntropyReport) -> bool:
    """Whether shares of its heads have intervals."""
    return report.sequences >= FEWEST_SEQUENCES and len(report.replicates) > 0


def shares(report: EntropyReport, maximum: Maximum | float) -> str:
    """The shares of the outer quarters with their intervals."""
    collapsed, *_, overloaded = report.format_shares(maximum)
    return f"of {report.name} {overloaded} overloaded, {collapsed} collapsed"


def flagged_heads(report: EntropyReport, maximum: Maximum | float) -> list[Block]:
    """The heads that stand out most, the others folded; all folded where no verdict is passed on them."""
    flags = report.flags(maximum)
    if not flags:
        return [f"{report.name}: no head is overloaded or collapsed."]
    share = (report.entropy / report.maximum(maximum)).tolist()
    rows = {}
    for flag in flags:
        of_top = "" if flag.kind == "not finite" else f"{100 * share[flag.layer][flag.head]:.0f} %"
        rows[flag] = [str(flag.layer), str(flag.head), flag.kind, of_top, flag.reason]
    header = ["layer", "head", "verdict", "of the maximum", "why"]
    against = f"against the {report.name_of(maximum)} maximum"
    if report.too_short:
        note = f"{report.name}: heads beyond a threshold {against}, on a text that is too short for a verdict."
        return [Fold(f"{report.name}: {counted(flags)} beyond a threshold", [Table(header, [*rows.values()], note)])]

    def extremity(flag: HeadFlag) -> float:
        """What is not finite first, then what is farthest from half of the maximum."""
        return math.inf if flag.kind == "not finite" else abs(share[flag.layer][flag.head] - 0.5)

    first = sorted(rows, key=extremity, reverse=True)
    if len(flags) <= MOST_LISTED:
        return [Table(header, [rows[flag] for flag in first], f"{report.name}: every head flagged {against}.")]
    note = f"{report.name}: the {MOST_LISTED} most extreme of {counted(flags)} flagged {against}."
    return [
        Table(header, [rows[flag] for flag in first[:MOST_LISTED]], note),
        Fold(
            f"{report.name}: all {counted(flags)} that are flagged",
            [Table(header, [*rows.values()], f"{report.name}: every head flagged {against}, by layer.")],
        ),
    ]


def counted(heads: Sequence[object]) -> str:
    """ "1 head" or "3 heads"."""
    return f"{len(heads)} head{'s' * (len(heads) != 1)}"


def bucket_table(reports: Sequence[EntropyReport], maximum: Maximum | float, note: str) -> Table:
    """Shares of heads by quarter of one maximum; with replicates, with their 95 % intervals."""
    rows = [[r.name, *r.format_shares(maximum), r.format_maximum(maximum)] for r in reports]
    return Table(["model", *QUARTERS, "maximum (nats)"], rows, f"Heads by quarter of the maximum entropy; {note}.")


def names(reports: Sequence[EntropyReport], maximum: Maximum | float) -> str:
    """What a maximum is for these reports."""
    return ", ".join(dict.fromkeys(report.name_of(maximum) for report in reports))


def part_table(report: EntropyReport) -> Table:
    """Encoder, decoder and cross-attention apart, each against its own bound."""
    rows = []
    for part in report.parts:
        found = report.part_summary(part)
        collapsed, *_, overloaded = (f"{100 * share:.0f} %" for share in found["shares"].tolist())
        if report.too_short:
            collapsed = overloaded = "too short"
        share = number(100 * found["mean_normalized"], ".1f")
        mean = number(found["mean_entropy"], ".3f")
        rows.append([part, found["bound"], str(found["heads"]), mean, f"{share} %", collapsed, overloaded])
    header = ["part", "bound", "heads", "mean (nats)", "of the bound", "collapsed", "overloaded"]
    return Table(header, rows, f"{report.name}: its attentions, each against the bound of its own queries.")
