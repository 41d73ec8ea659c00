"""When which norm is removed: stages as data, expanded over the norms that a model has."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import PreTrainedModel

from ..conversion.norm_sites import norm_sites
from ..errors import SettingsError, listed
from ..models.removal import RemovalNorm

Part = Literal["all", "query_key", "value", "first"]
GROUPS = ("mlp", "attention", "query_key", "value", "final", "first")
# In the manner of arXiv 2507.02559 for GPT-2 small: of 300 steps the first norm goes at 20, each next one a few later,
# and from 116 on the model recovers.
AUTO = {"mlp": (20, 42), "query_key": (44, 66), "value": (68, 101), "final": (104, 104), "first": (116, 116)}
AUTO_STEPS = 300
BRANCHES = ("attention", "cross_attention", "mlp", "final")


@dataclass(frozen=True)
class Removal:
    """One norm, or a part of it, that begins to be removed at a step."""

    step: int
    norm: str
    """Its name; "*" for all norms at once, at the first position."""
    part: Part


def read_schedule(text: str) -> list[dict[str, Any]] | Literal["auto"]:
    """
    "auto", a YAML file, or YAML itself: a list of stages like `{norms: mlp, start: 20, every: 2}`.

    `norms` is one of "mlp", "attention", "query_key", "value", "final", "first" (the first position gives up the scale
    of its own), or the name of a norm, where `*` stands for anything. A stage removes its norms from the first layer to
    the last, the first of them at step `start`, each `every` (1) steps after the one before.

    Raises:
        SettingsError: no such file, or something else in it.
    """
    if text == "auto":
        return "auto"
    if "\n" not in text and not text.lstrip().startswith(("[", "{", "-")):
        if not Path(text).is_file():
            raise SettingsError(
                f"The schedule {text!r} is neither 'auto' nor a file nor a list like '[{{norms: mlp, ...}}]'."
            )
        text = Path(text).read_text()
    try:
        stages = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"The schedule is not YAML: {error}") from error
    stages = stages.get("stages") if isinstance(stages, dict) else stages
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise SettingsError(f"A schedule is a list of stages like {{norms: mlp, start: 20, every: 2}}, got {stages!r}.")
    for stage in stages:
        check_stage(stage)
    return stages


def check_stage(stage: Mapping[str, Any]) -> None:
    """Raise SettingsError for a stage that is none."""
    if unknown := set(stage) - {"norms", "start", "every"}:
        raise SettingsError(f"A stage has norms, start and every; {sorted(unknown)} is not known.")
    if not isinstance(stage.get("norms"), str):
        raise SettingsError(f"A stage names its norms ({', '.join(GROUPS)}, or the name of a norm), got {dict(stage)}.")
    for key, least in (("start", 0), ("every", 0)):
        value = stage.get(key, 1)
        if (
            not isinstance(value, int)
            or isinstance(value, bool)
            or value < least
            or (key == "start" and key not in stage)
        ):
            raise SettingsError(f"{key} of a stage is a whole number of steps from {least} on, got {stage.get(key)!r}.")


def expand(
    schedule: Sequence[Mapping[str, Any]] | Literal["auto"], model: PreTrainedModel, steps: int, gate_steps: int = 0
) -> list[Removal]:
    """
    What is removed at which step, earliest first.

    Args:
        model: one whose norms are of the class [`RemovalNorm`].
        steps: of the whole training.
        gate_steps: that one removal takes.

    Raises:
        SettingsError: a norm that does not exist, is named twice, or is not gone before the training ends.
    """
    groups = norm_groups(model)
    if schedule == "auto":
        removals = list(automatic(groups, steps))
    else:
        removals = []
        for stage in schedule:
            for index, (norm, part) in enumerate(chosen(stage["norms"], groups)):
                removals.append(Removal(stage["start"] + index * stage.get("every", 1), norm, part))
    gone: set[tuple[str, str]] = set()
    for removal in removals:
        for half in ("query_key", "value") if removal.part == "all" else (removal.part,):
            if (removal.norm, half) in gone:
                raise SettingsError(f"The schedule removes {removal.norm} ({half}) twice.")
            gone.add((removal.norm, half))
        if removal.step + max(1, gate_steps) > steps:
            over = f" over {gate_steps} steps" if gate_steps > 1 else ""
            raise SettingsError(
                f"The schedule removes {removal.norm} at step {removal.step}{over}, and training ends after {steps}. "
                "Raise --max-steps, or let the stage start earlier."
            )
    return sorted(removals, key=lambda removal: removal.step)


def norm_groups(model: PreTrainedModel) -> dict[str, list[tuple[str, Part]]]:
    """Every name that a stage may use for several norms -> these norms, first layer to last."""
    living = [site for site in norm_sites(model) if isinstance(site.norm, RemovalNorm)]
    names = {branch: [s.name for s in living if s.branch == branch] for branch in BRANCHES}
    # Keys and values of cross-attention are made of another stream: its norm is one of queries.
    queries: list[tuple[str, Part]] = [(name, "all") for name in names["cross_attention"]]
    return {
        "mlp": [(name, "all") for name in names["mlp"]],
        "attention": [*((name, "all") for name in names["attention"]), *queries],
        "query_key": [*((name, "query_key") for name in names["attention"]), *queries],
        "value": [(name, "value") for name in names["attention"]],
        "final": [(name, "all") for name in names["final"]],
        "first": [("*", "first")],
    }


def chosen(name: str, groups: Mapping[str, list[tuple[str, Part]]]) -> list[tuple[str, Part]]:
    """
    Raises:
        SettingsError: nothing has that name.
    """
    norms = [norm for group in ("attention", "mlp", "final") for norm, _ in groups[group]]
    matching: list[tuple[str, Part]] = [(norm, "all") for norm in norms if fnmatchcase(norm, name)]
    found = groups.get(name, matching)
    if not found:
        raise SettingsError(
            f"The schedule names {name!r}, and the model has no such norm to remove. It has: {', '.join(GROUPS)}; by "
            f"name {listed(norms) or 'none'}."
        )
    return found


def automatic(groups: Mapping[str, list[tuple[str, Part]]], steps: int) -> Iterator[Removal]:
    """Every group spread over the share of the training that it has in `AUTO`."""
    for group, (start, end) in AUTO.items():
        names = groups[group]
        for index, (norm, part) in enumerate(names):
            at = start if len(names) < 2 else start + (end - start) * index / (len(names) - 1)
            yield Removal(round(at * steps / AUTO_STEPS), norm, part)
