"""A direct logit attribution as JSON, picture and page, with its certificate."""

from pathlib import Path
from typing import Any

from ..analysis.linearity import Attribution
from ..files import json_text, write_json
from ..provenance import command, environment
from ..tables import number
from .plots import attribution_grid, save
from .report import Fold, Listing, Picture, Section, Verdict, write_report


def verdict(attribution: Attribution, prompt: str, target: str) -> Verdict:
    """How likely the token is, and what adds most to its logit."""
    name, direct, _ = attribution.at()[0]
    found = of_target(attribution)
    frozen = "" if attribution.linear else ", with the final norm frozen"
    said = (
        f"After {prompt!r} the model gives {target!r} a probability of {number(found['probability'], '.3g')}, rank "
        f"{found['rank']} of all tokens. The largest part of its logit of {number(found['logits'], '.2f')} is that of "
        f"{name}: {number(direct, '+.2f')}{frozen}."
    )
    return Verdict(said, attribution.certificate())


def of_target(attribution: Attribution) -> dict[str, float]:
    """At the last position: the logit of the target, its probability, and its rank, 1 for the token predicted."""
    return {key: getattr(attribution, key)[0, -1].item() for key in ("logits", "probability", "rank")}


def write_attribution(folder: Path, attribution: Attribution, model: str, prompt: str, target: str, top: int) -> None:
    """`attribution.json`, `.svg`, `.png` and `report.html` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    found = of_target(attribution)
    values: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "target": target,
        "logit": found["logits"],
        "probability": found["probability"],
        "rank": found["rank"],
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
    rests_on = values["environment"] | {"command": values["command"]}
    figure = attribution_grid(*attribution.grid(), f"logit of {target!r}")
    save(figure, folder / "attribution")
    alt = (
        f"A heat map, layers down, heads and the rest of each layer across: what each adds to the logit of {target!r}."
    )
    sections = [
        Section(
            f"After {prompt!r}",
            [
                verdict(attribution, prompt, target),
                Picture(figure, f"What each head, MLP and bias adds to the logit of {target!r}.", alt),
                attribution.largest(top),
            ],
        ),
        Section("Where the numbers are from", [Fold("Environment", [Listing(json_text(rests_on))])]),
    ]
    write_report(folder / "report.html", "Direct logit attribution", model, sections)
