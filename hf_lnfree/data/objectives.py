"""What a model is trained to predict. Nothing heavy is imported here: `hf-lnfree train --help` reads it."""

from dataclasses import dataclass

from ..errors import SettingsError


@dataclass(frozen=True)
class Objective:
    """
    Args:
        name: as files and flags have it.
        says: what it is, for help.
        auto_class: the Auto class of transformers whose models are trained so.
        metric: what the model is judged by, beside the loss: "perplexity" or "accuracy".
        example: what one example is called: "window", "pair", "image" or "recording".
        head: the last part of the names of classes that are trained so.
    """

    name: str
    says: str
    auto_class: str
    metric: str
    example: str
    head: str


PERPLEXITY, SEQ2SEQ = "perplexity", "AutoModelForSeq2SeqLM"
KINDS = (
    ("causal", "the next token", "AutoModelForCausalLM", PERPLEXITY, "window", "ForCausalLM"),
    ("masked", "masked tokens (BERT)", "AutoModelForMaskedLM", PERPLEXITY, "window", "ForMaskedLM"),
    ("span", "spans that were cut out (T5)", SEQ2SEQ, PERPLEXITY, "window", "ForConditionalGeneration"),
    ("pairs", "a target from its source (T5)", SEQ2SEQ, PERPLEXITY, "pair", "ForSeq2SeqLM"),
    (
        "image",
        "the label of an image (ViT)",
        "AutoModelForImageClassification",
        "accuracy",
        "image",
        "ForImageClassification",
    ),
    ("speech", "what is said (Whisper)", "AutoModelForSpeechSeq2Seq", PERPLEXITY, "recording", "ForSpeechSeq2Seq"),
)
OBJECTIVES = {kind[0]: Objective(*kind) for kind in KINDS}
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
    """What models of a class are trained for, by its name; predicting the next token for others."""
    if "Whisper" in name or "Speech" in name:
        return OBJECTIVES["speech"]
    return next((found for found in OBJECTIVES.values() if name.endswith(found.head)), CAUSAL)
