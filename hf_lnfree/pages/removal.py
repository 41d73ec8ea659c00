"""report.html of a norm removal: losses around every removal, against plain fine-tuning."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..tables import Table
from .plots import curves, save
from .report import Picture, Section, write_report

CURVES = {"removal": "norms removed", "plain": "plain fine-tuning"}


def loss_table(summary: Mapping[str, Any]) -> Table:
    """Held-out losses at the ends, in nats a token."""
    rows = [
        ["before", f"{summary['loss_before']:.4f}"],
        ["after, norms removed and folded", f"{summary['loss_after']:.4f}"],
    ]
    if summary["gap"] is not None:
        rows.append(["after as many steps of plain fine-tuning", f"{summary['loss_plain']:.4f}"])
        rows.append(["gap", f"{summary['gap']:+.4f}"])
    return Table(["held-out loss (nats a token)", ""], rows)


def event_table(summary: Mapping[str, Any]) -> Table:
    rows = [
        [str(event["step"]), event["norm"], event["part"], number(event["loss_before"]), number(event["loss_after"])]
        for event in summary["events"]
    ]
    note = "On the windows of --removal-windows; a gradual removal has its second loss where its gate is 1."
    return Table(["step", "norm", "part", "loss before", "loss after"], rows, note)


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def write_removal_report(folder: Path, summary: Mapping[str, Any]) -> None:
    """`report.html` and `loss.svg`, `loss.png` in the folder of the run."""
    lines = {CURVES[name]: points for name, points in summary["curves"].items()}
    windows = summary["arguments"]["removal_windows"]
    around = [
        (event["step"], event[key])
        for event in summary["events"]
        for key in ("loss_before", "loss_after")
        if event[key] is not None
    ]
    named = lines | {f"before and after each removal ({windows} windows)": around}
    figure = curves(named, "step", "held-out loss (nats a token)")
    save(figure, folder / "loss")
    sections = [
        Section("Losses", tables=[loss_table(summary)], figures=[Picture(figure, "Held-out loss over fine-tuning.")]),
        Section("Every removal", tables=[event_table(summary)]),
        Section(
            "What this rests on",
            details={
                "Settings": json.dumps(summary["arguments"], indent=1),
                "Data": json.dumps(summary["data"], indent=1),
                "Scales": json.dumps(summary["sigma"], indent=1),
                "Environment": json.dumps(summary["environment"] | {"command": summary["command"]}, indent=1),
            },
        ),
    ]
    lead = f"{summary['model']}, {summary['steps']} steps, {summary['tokens']:,} tokens, seed {summary['seed']}."
    write_report(folder / "report.html", "LayerNorms removed by fine-tuning", lead, sections)
