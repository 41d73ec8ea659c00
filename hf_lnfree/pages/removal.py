"""report.html of a norm removal: losses around every removal, against plain fine-tuning."""

import math
from pathlib import Path

from ..files import json_text
from ..removal.results import RemovalSummary
from ..tables import Table, number
from .heads import MOST_LISTED
from .plots import curves, save
from .report import Block, Fold, Listing, Picture, Section, Verdict, write_report

CURVES = {"removal": "norms removed", "plain": "plain fine-tuning"}


def loss_table(summary: RemovalSummary) -> Table:
    """Held-out losses at the ends, and of images accuracies."""
    ends = {"before": ("before", summary.loss_before), "after": ("after, norms removed and folded", summary.loss_after)}
    if summary.loss_plain is not None:
        ends["plain"] = ("after as many steps of plain fine-tuning", summary.loss_plain)
    accuracy = summary.accuracy
    header = ["model", f"held-out loss ({summary.unit})"] + (["held-out accuracy"] if accuracy else [])
    rows = [
        [says, number(value, ".4f"), *([number(accuracy[name], ".4f")] if accuracy else [])]
        for name, (says, value) in ends.items()
    ]
    if summary.gap is not None:
        cost = [number(accuracy["after"] - accuracy["plain"], "+.4f")] if accuracy else []
        rows.append(["gap", number(summary.gap, "+.4f"), *cost])
    return Table(header, rows)


def event_table(summary: RemovalSummary) -> Table:
    """A line for each removal: its step, its norm, and the held-out losses before and after."""
    rows = [
        [str(event["step"]), event["norm"], event["part"], *(loss(event[key]) for key in ("loss_before", "loss_after"))]
        for event in summary.events
    ]
    note = "On the windows of --removal-windows; a gradual removal has its second loss where its gate is 1."
    return Table(["step", "norm", "part", "loss before", "loss after"], rows, note)


def loss(value: float | None) -> str:
    """A held-out loss as text; nothing for one that was not measured."""
    return "" if value is None else number(value, ".4f")


def write_removal_report(folder: Path, summary: RemovalSummary) -> None:
    """`report.html` and `loss.svg`, `loss.png` in the folder of the run."""
    lines = {CURVES[name]: points for name, points in summary.curves.items()}
    windows = summary.arguments["removal_windows"]
    around = [
        (event["step"], event[key])
        for event in summary.events
        for key in ("loss_before", "loss_after")
        if event[key] is not None
    ]
    named = lines | {f"before and after each removal ({windows} windows)": around}
    figure = curves(named, "step", f"held-out loss ({summary.unit})")
    save(figure, folder / "loss")
    rests_on = {
        "Settings": summary.arguments,
        "Data": summary.data,
        "Scales": summary.sigma,
        "Environment": summary.environment | {"command": summary.command},
    }
    alt = f"Curves of the held-out loss over steps: {', '.join(named)}."
    sections = [
        Section(
            "Verdict",
            [verdict(summary), Picture(figure, "Held-out loss over fine-tuning.", alt), loss_table(summary)],
        ),
        Section("Every removal", removals(summary)),
        Section("What this rests on", [Fold(name, [Listing(json_text(value))]) for name, value in rests_on.items()]),
    ]
    lead = f"{summary.model}, {summary.steps} steps, {summary.tokens:,} tokens, seed {summary.seed}."
    write_report(folder / "report.html", "Norms removed by fine-tuning", lead, sections)


def verdict(summary: RemovalSummary) -> Verdict:
    """What taking the norms out cost, and what one run cannot say of it."""
    after, before = number(summary.loss_after, ".4f"), number(summary.loss_before, ".4f")
    limits = "One run with one seed: no interval tells this from chance."
    if summary.norms_left != "none":
        limits = f"Norms are left in the model ({summary.norms_left}). {limits}"
    if summary.diverged:
        limits = f"The run diverged at step {summary.diverged_at}. {limits}"
    if summary.gap is None or summary.loss_plain is None:
        said = f"The held-out loss went from {before} to {after} {summary.unit} while norms were taken out."
        return Verdict(said, f"What that cost cannot be told without as many steps of plain fine-tuning. {limits}")
    if not math.isfinite(summary.gap):
        said = f"What taking norms out cost cannot be told: a loss is not finite ({after} {summary.unit} after it, "
        return Verdict(f"{said}{number(summary.loss_plain, '.4f')} after plain fine-tuning).", limits)
    side = "higher" if summary.gap > 0 else "lower"
    said = (
        f"With its norms taken out the model's held-out loss is {abs(summary.gap):.4f} {summary.unit} {side} than "
        f"after as many steps of plain fine-tuning: {after} against {summary.loss_plain:.4f}; it was {before} before."
    )
    return Verdict(said, limits)


def removals(summary: RemovalSummary) -> list[Block]:
    """The removals that cost most at once, the others folded."""
    table = event_table(summary)
    if len(table.rows) <= MOST_LISTED:
        return [table]

    def jump(index: int) -> float:
        """By how much the loss rose; a loss that is not finite first, one that was not measured last."""
        before, after = (summary.events[index][key] for key in ("loss_before", "loss_after"))
        if before is None or after is None:
            return -math.inf
        return rise if math.isfinite(rise := after - before) else math.inf

    order = sorted(range(len(table.rows)), key=jump, reverse=True)[:MOST_LISTED]
    note = f"The {MOST_LISTED} of {len(table.rows)} removals after which the loss rose most."
    shown = Table(table.header, [table.rows[index] for index in order], note)
    return [shown, Fold(f"All {len(table.rows)} removals", [table])]
