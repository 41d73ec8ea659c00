"""A direct logit attribution as JSON, picture and page, with its certificate."""

from pathlib import Path
from typing import Any

from ..analysis.linearity import Attribution
from ..files import json_text, write_json
from ..provenance import command, environment
from ..tables import Table, number
from .plots import attribution_grid, save
from .report import Picture, Section, write_report


def certificate(attribution: Attribution) -> list[str]:
    """What the numbers show, in sentences."""
    sentences = [
        "The components add up to the logits with a largest error of "
        f"{number(attribution.largest_error, '.1e')} over the whole vocabulary and all positions."
    ]
    if attribution.linear:
        return [*sentences, "No norm divides before the logits: these are the direct effects themselves."]
    errors = attribution.frozen_error(-1), attribution.frozen_error()
    here, everywhere = (number(100 * error["relative"], ".1f") for error in errors)
    return [
        *sentences,
        "The final norm was frozen at its scale. Against the logits without a component, where the norm is computed "
        f"anew, frozen attributions are off by {here} % here (root mean square over the components; up to "
        f"{number(errors[0]['largest'], '.2g')}) and by {everywhere} % over all positions.",
    ]


def attribution_table(attribution: Attribution, top: int) -> Table:
    """The components with the largest shares in the logit of the last position."""
    rows = [
        [name, number(direct, "+.4f"), "" if removed != removed else number(removed, "+.4f")]
        for name, direct, removed in attribution.at()[:top]
    ]
    total = number(attribution.logits[0, -1].item(), "+.4f")
    return Table(["component", "adds to the logit", "logit lost without it"], [*rows, ["all together", total, ""]])


def write_attribution(folder: Path, attribution: Attribution, model: str, prompt: str, target: str, top: int) -> None:
    """`attribution.json`, `.svg`, `.png` and `report.html` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "target": target,
        "logit": attribution.logits[0, -1].item(),
        "largest_error": attribution.largest_error,
        "linear": attribution.linear,
        "frozen_error": {"here": attribution.frozen_error(-1), "everywhere": attribution.frozen_error()},
        "components": [
            {"name": name, "direct": direct, "removed": removed} for name, direct, removed in attribution.at()
        ],
        "environment": environment(),
        "command": command(),
    }
    write_json(folder / "attribution.json", values)
    figure = attribution_grid(*attribution.grid(), f"logit of {target!r}")
    save(figure, folder / "attribution")
    section = Section(
        f"After {prompt!r}",
        paragraphs=certificate(attribution),
        tables=[attribution_table(attribution, top)],
        figures=[Picture(figure, f"What each head, MLP and bias adds to the logit of {target!r}.")],
        details={"Environment": json_text(values["environment"] | {"command": values["command"]})},
    )
    write_report(folder / "report.html", "Direct logit attribution", model, [section])
