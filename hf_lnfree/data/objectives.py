"""What a model is trained to predict. Nothing heavy is imported here: `hf-lnfree train --help` reads it."""

from dataclasses import dataclass
from typing import Literal

from ..errors import SettingsError


@dataclass(frozen=True)
class Objective:
    """
    Args:
        name: as files and flags have it.
        says: what it is, for help.
        auto_class: the Auto class of transformers whose models are trained so.
        metric: what the model is judged by, beside the loss.
        example: what one example is called.
        head: the last part of the names of classes that are trained so.
    """

    name: str
    says: str
    auto_class: str
    metric: Literal["perplexity", "accuracy"]
    example: Literal["window", "pair", "image"]
    head: str


OBJECTIVES = {
    objective.name: objective
    for objective in (
        Objective("causal", "the next token", "AutoModelForCausalLM", "perplexity", "window", "CausalLM"),
        Objective("masked", "masked tokens (BERT)", "AutoModelForMaskedLM", "perplexity", "window", "MaskedLM"),
        Objective(
            "span", "spans that were cut out (T5)", "AutoModelForSeq2SeqLM", "perplexity", "window",
            "ConditionalGeneration",
        ),
        Objective("pairs", "a target from its source", "AutoModelForSeq2SeqLM", "perplexity", "pair", "Seq2SeqLM"),
        Objective(
            "image", "the label of an image", "AutoModelForImageClassification", "accuracy", "image",
            "ImageClassification",
        ),
    )
}  # fmt: skip
"""Name -> objective."""
CAUSAL = OBJECTIVES["causal"]


def objective_of(name: str | None) -> Objective:
    """
    The objective of that name; predicting the next token for None.

    Raises:
        SettingsError: there is none of that name.
    """
    if name is None:
        return CAUSAL
    if name not in OBJECTIVES:
        raise SettingsError(f"objective={name!r} is not known. Allowed: {', '.join(map(repr, OBJECTIVES))}.")
    return OBJECTIVES[name]


def objective_of_class(name: str) -> Objective:
    """What models of a class are trained for, by the end of its name; predicting the next token for others."""
    return next((found for found in OBJECTIVES.values() if name.endswith(found.head)), CAUSAL)
