"""report.html of a norm removal: losses around every removal, against plain fine-tuning."""

from pathlib import Path

from ..files import json_text
from ..removal.results import RemovalSummary
from ..tables import Table, number
from .plots import curves, save
from .report import Picture, Section, write_report

CURVES = {"removal": "norms removed", "plain": "plain fine-tuning"}


def loss_table(summary: RemovalSummary) -> Table:
    """Held-out losses at the ends, in nats a token."""
    rows = [
        ["before", number(summary.loss_before, ".4f")],
        ["after, norms removed and folded", number(summary.loss_after, ".4f")],
    ]
    if summary.loss_plain is not None and summary.gap is not None:
        rows.append(["after as many steps of plain fine-tuning", number(summary.loss_plain, ".4f")])
        rows.append(["gap", number(summary.gap, "+.4f")])
    return Table(["held-out loss (nats a token)", ""], rows)


def event_table(summary: RemovalSummary) -> Table:
    """A row a removal: its step, its norm, and the held-out losses before and after."""
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
    figure = curves(named, "step", "held-out loss (nats a token)")
    save(figure, folder / "loss")
    rests_on = {
        "Settings": summary.arguments,
        "Data": summary.data,
        "Scales": summary.sigma,
        "Environment": summary.environment | {"command": summary.command},
    }
    sections = [
        Section("Losses", tables=[loss_table(summary)], figures=[Picture(figure, "Held-out loss over fine-tuning.")]),
        Section("Every removal", tables=[event_table(summary)]),
        Section("What this rests on", details={name: json_text(value) for name, value in rests_on.items()}),
    ]
    lead = f"{summary.model}, {summary.steps} steps, {summary.tokens:,} tokens, seed {summary.seed}."
    write_report(folder / "report.html", "LayerNorms removed by fine-tuning", lead, sections)
