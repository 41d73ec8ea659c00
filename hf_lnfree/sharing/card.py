"""A model card out of what a run recorded; what is not known is left out."""

import html
import json
import math
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..data.arguments import DIGITS, STDLIB
from ..data.objectives import objective_of
from ..errors import RunError
from ..files import read_json, write_text
from ..removal.results import RemovalSummary
from ..tables import number
from ..training.checkpoints import has_weights
from ..training.results import ENTROPY, RunResults

TEMPLATE = files("hf_lnfree") / "sharing" / "templates" / "model_card.md"
EVALUATION = "evaluation.json"  # of `hf-lnfree evaluate --out RUN/evaluation.json`
CARD = "README.md"
OWN = {STDLIB: "Python's standard library", DIGITS: "scikit-learn's handwritten digits"}
TASKS = {
    "causal": "text-generation",
    "masked": "fill-mask",
    "span": "text2text-generation",
    "pairs": "text2text-generation",
    "image": "image-classification",
    "speech": "automatic-speech-recognition",
}
"""Objective -> what the Hub calls the task."""
SETTINGS = ("learning_rate", "weight_decay", "lr_scheduler_type", "max_grad_norm", "seed", "bf16", "fp16")


def write_card(run: Path, repo_id: str | None = None) -> Path:
    """
    Write `README.md` into the folder of a finished run.

    Args:
        run: output folder of `train`, `study` (one cell) or `remove-norms`.
        repo_id: what the example in the card loads; the folder by default.

    Raises:
        RunError: no finished run there, a file of it is damaged, or a repo id that is not allowed.
    """
    try:
        validate_repo_id(repo_id or "owner/name")
    except HFValidationError as error:
        raise RunError(str(error)) from error
    results = RunResults.load(run)
    config = optional(run / "config.json") or results.model  # a run that diverged may have saved no model
    title = f"{results.name}{' without LayerNorm' * (results.removal is not None)}, seed {results.seed}"
    events = results.nonfinite_events
    partly_trained = results.removal is None and results.trainable_parameters != results.parameters
    architecture = (config.get("architectures") or [config.get("model_type")])[0]
    activation = config.get("activation_function", config.get("hidden_act"))
    kind = objective_of(results.objective).name
    card = ModelCard.from_template(
        card_data(run, results, repo_id.rpartition("/")[2] if repo_id else title),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        title=plain(title),
        saved=has_weights(run),
        kind={"image": "An image classifier", "speech": "A model of speech"}.get(kind, "A language model"),
        auto_class=objective_of(results.objective).auto_class,
        processor="AutoImageProcessor" if kind == "image" else "AutoTokenizer",
        loaded=json.dumps(repo_id or (run.resolve().name if run.is_absolute() else run.as_posix())),
        architecture=plain(architecture),
        norms=plain(norms(config)),
        activation=plain(activation),
        parameters=f"{results.parameters:,}",
        # Of a removal they are those before folding, which changes their number.
        trained=f"{results.trainable_parameters:,}" if partly_trained else None,
        measured=[tuple(map(plain, row)) for row in measured(run, results)],
        picture="entropy.svg" if (run / "entropy.svg").is_file() else None,
        events=plain(events[-1]["verdict"]) if events else None,
        made_from=[tuple(map(plain, row)) for row in made_from(results)],
        entropy_file=(run / ENTROPY).is_file(),
    )
    write_text(run / CARD, str(card))
    return run / CARD


def plain(text: Any) -> str | None:
    """A text as Markdown that shows it, in one line: no tags, no cells of a table."""
    return None if text is None else html.escape(" ".join(str(text).split()), quote=False).replace("|", "\\|")


def optional(path: Path) -> dict[str, Any]:
    """What a JSON file holds, if it is there."""
    return read_json(path) if path.is_file() else {}


def norms(config: Mapping[str, Any]) -> str | None:
    """Which norms a model has, in words; None where the configuration does not say."""
    if "norm" not in config:
        return None
    blocks = "by layer" if config.get("layer_norms") else config["norm"]
    return f"norm {blocks} in the blocks and {config.get('final_norm')} after the last"


def card_data(run: Path, results: RunResults, model_name: str) -> ModelCardData:
    """The card's metadata, with what was measured as a model index."""
    dataset = results.hub_dataset
    name, shown = dataset_names(results)
    evaluated = [
        EvalResult(
            task_type=TASKS[objective_of(results.objective).name],
            dataset_type=name,
            dataset_name=f"{shown}, held out",
            metric_type=metric,
            metric_value=value,
            metric_name=label,
        )
        for metric, label, value in metrics(run, results)
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=TASKS[objective_of(results.objective).name],
        tags=["lnfree", "layernorm-free"],
        base_model=results.base_model,
        datasets=[dataset] if dataset else None,
        eval_results=evaluated or None,
        model_name=model_name,
    )


def dataset_names(results: RunResults) -> tuple[str, str]:
    """For the index, and to be read; a folder of somebody's machine is not named."""
    data = results.arguments["data"]
    given = data.get("data", data.get("dataset"))  # as runs called it before
    if given in OWN:
        return given, OWN[given]
    name = results.hub_dataset
    return (name, name) if name else ("local", "local files")


def metrics(run: Path, results: RunResults) -> Iterator[tuple[str, str, float]]:
    """(type, name, value) of everything that was measured and is finite."""
    evaluation = optional(run / EVALUATION)
    found = {
        (results.measure, results.measure): results.score,
        ("bits_per_byte", "bits per byte"): evaluation.get("bits_per_byte", {}).get("bits_per_byte"),
        ("overloaded_heads", "share of heads above 3/4 of the maximum entropy"): results.overloaded_heads,
        ("collapsed_heads", "share of heads below 1/4 of the maximum entropy"): results.collapsed_heads,
    }
    for (metric, name), value in found.items():
        if value is not None and math.isfinite(value):
            yield metric, name, value


def measured(run: Path, results: RunResults) -> Iterator[tuple[str, str]]:
    """(name, value as text) of everything that was measured."""
    for _, name, value in metrics(run, results):
        yield name, f"{100 * value:.0f} %" if name.startswith("share") else f"{value:.4g}"
    if (run / RemovalSummary.file).is_file():
        removal = RemovalSummary.load(run)
        yield "held-out loss before norms were removed", f"{number(removal.loss_before, '.4f')} nats a token"
        yield "after, norms removed and folded", f"{number(removal.loss_after, '.4f')} nats a token"
        if removal.gap is not None:
            yield "difference to as many steps of plain fine-tuning", f"{number(removal.gap, '+.4f')} nats a token"


def made_from(results: RunResults) -> Iterator[tuple[str, str]]:
    """(name, value as text) of data, settings and versions."""
    training = results.arguments["training"]
    yield "data", dataset_names(results)[1]
    example = objective_of(results.objective).example
    length = results.data["train"].get("context_length")
    yield "tokens", f"{results.tokens:,} in {results.steps:,} steps, {example}s" + (f" of {length}" if length else "")
    for split in ("train", "validation"):
        yield (
            f"sha256 of the {split} {'images' if example == 'image' else 'tokens'}",
            f"`{results.data[split]['sha256']}`",
        )
    for name in SETTINGS:
        if training.get(name) not in (None, False):
            yield name.replace("_", " "), str(training[name])
    packages = ("hf_lnfree", "python", "torch", "transformers", "device")
    yield "versions", ", ".join(f"{name} {results.environment[name]}" for name in packages)
