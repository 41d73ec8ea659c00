"""A direct logit attribution as JSON, picture and page, with its certificate."""

import math
from pathlib import Path
from typing import Any

from ..analysis.linearity import Attribution
from ..files import json_text, write_json
from ..provenance import command, environment
from ..tables import Table, number
from .plots import attribution_grid, save
from .report import Fold, Listing, Picture, Section, Verdict, write_report


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
    """
    The components with the largest shares in the logit of the last position, the sum of the others, and the logit.

    What the logit loses without a component has a column where it is something else.
    """
    components = attribution.at()
    rows = [[name, number(direct, "+.4f"), signed(removed)] for name, direct, removed in components[:top]]
    if others := [direct for _, direct, _ in components[top:]]:
        rows.append([f"the other {len(others)}", number(math.fsum(others), "+.4f"), ""])
    rows.append(["all together, the logit", number(attribution.logits[0, -1].item(), "+.4f"), ""])
    columns = 2 if attribution.linear else 3
    header = ["component", "adds to the logit", "logit lost without it"]
    note = "Components by what they add to the logit, the largest first."
    return Table(header[:columns], [row[:columns] for row in rows], note, foot=2 if others else 1)


def signed(removed: float) -> str:
    """With its sign; nothing for a constant, which is not taken away."""
    return "" if math.isnan(removed) else number(removed, "+.4f")


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
    return Verdict(said, " ".join(certificate(attribution)))


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
                attribution_table(attribution, top),
            ],
        ),
        Section("Where the numbers are from", [Fold("Environment", [Listing(json_text(rests_on))])]),
    ]
    write_report(folder / "report.html", "Direct logit attribution", model, sections)
