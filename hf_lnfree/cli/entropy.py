"""`hf-lnfree entropy`: load models and their tokenizers, cut text into windows, run the analyzer on each."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any, cast

from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase, WhisperFeatureExtractor
from transformers.utils import logging

from ..analysis import AttentionEntropyAnalyzer, EntropyReport
from ..analysis.texts import model_inputs
from ..choices import MAXIMA, Maximum, Method
from ..data.arguments import DIGITS, STDLIB, DataArguments
from ..data.collators import collator_of
from ..data.images import ImageExamples, load_images
from ..data.objectives import OBJECTIVES
from ..data.speech import POSITIONS_A_SECOND, SpeechExamples, load_recordings
from ..data.splits import load_validation
from ..data.windows import batches_of, window_batches
from ..errors import SettingsError
from ..files import require_own
from ..loading import find_device, load_model, load_tokenizer
from ..pages.entropy import comparable, write_entropy_page
from ..redaction import shareable
from ..tables import number

OTHER_INPUTS = {"pixel_values": "image", "input_features": "speech"}
"""What a model reads instead of text -> the objective whose data have it."""


def entropy_command(
    models: Sequence[str],
    data: str,
    text_column: str | None,
    context_length: int,
    max_windows: int,
    batch_size: int,
    method: Method,
    statistics: bool,
    maximum: Maximum | float,
    out: Path | None,
    device: str | None,
    access: dict[str, Any],
) -> list[EntropyReport]:
    """The reports of the models, written into the folder `out` if there is one."""
    if out is not None:
        require_own(out, "entropy report", ["entropy-*.json"])
    place = find_device(device)
    arguments = DataArguments(data=data, text_column=text_column, context_length=context_length)

    def analyzer(model: PreTrainedModel) -> AttentionEntropyAnalyzer:
        return AttentionEntropyAnalyzer(model, method, statistics=statistics)

    def measure(name: str, shown: str) -> EntropyReport:
        """The report of one model, which is gone from memory after this."""
        model = headless_model(name, context_length, device=place, **access)
        if (found := other_inputs(model, name, arguments, max_windows, batch_size, access)) is not None:
            batches, examples_sha256 = found
            report = analyzer(model).run(batches, name=shown, progress=True)
            report.metadata |= {"data": data, "examples_sha256": examples_sha256}
            return report
        tokenizer = load_tokenizer(name, **access)
        held_out = load_validation(arguments, tokenizer, everything=Path(data).expanduser().is_file())
        windows = window_batches(held_out, max_windows, batch_size)
        batches = [model_inputs(model, ids) for ids in windows]
        report = analyzer(model).run(batches, name=shown, progress=True)
        texts = tokenizer.batch_decode([ids for batch in windows for ids in batch][: len(report.sequence_entropy)])
        report.metadata |= {"data": data, "windows_sha256": held_out.sha256, "first_texts": texts}
        return report

    reports = list(map(measure, models, display_names(models)))
    if out is not None:
        write_entropy_page(out, reports, maximum)
    return reports


def other_inputs(
    model: PreTrainedModel,
    name: str,
    arguments: DataArguments,
    count: int,
    batch_size: int,
    access: dict[str, Any],
) -> tuple[list[dict[str, Any]], str] | None:
    """
    Batches of images or recordings for a model that reads these, and the hash of their data; None for one of text.

    Raises:
        SettingsError: data of another kind than the model reads.
    """
    objective = OTHER_INPUTS.get(model.main_input_name)
    if objective is None:
        if arguments.data == DIGITS:
            raise SettingsError(
                f"{name} reads text, and {DIGITS!r} are images. Give 'stdlib', a file or a folder of text."
            )
        return None
    tokenizer = load_tokenizer(name, **access) if objective == "speech" else None
    examples = images(model, arguments) if tokenizer is None else recordings(model, arguments, tokenizer)
    collate = collator_of(OBJECTIVES[objective], cast(Any, tokenizer), model)
    return batches_of(examples, collate, count, batch_size), examples.meta["sha256"]


def recordings(model: PreTrainedModel, arguments: DataArguments, tokenizer: PreTrainedTokenizerBase) -> SpeechExamples:
    """
    Held-out recordings with their texts, which the decoder reads.

    Raises:
        SettingsError: there is no set of that name.
    """
    if arguments.data in (STDLIB, DIGITS):
        raise SettingsError(
            f"{type(model).__name__} reads speech: give --data FOLDER, with WAV files and metadata.jsonl."
        )
    _, found = load_recordings(arguments.data, None, arguments.text_column, arguments.validation_fraction)
    seconds = model.config.max_source_positions // POSITIONS_A_SECOND
    extractor = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins, chunk_length=seconds)
    return SpeechExamples(arguments.data, found, extractor, tokenizer, arguments.context_length)


def images(model: PreTrainedModel, arguments: DataArguments) -> ImageExamples:
    """
    Images of the size that the model takes.

    Raises:
        SettingsError: there is no set of that name, or it has another number of channels.
    """
    if arguments.data == STDLIB:
        raise SettingsError(
            f"{type(model).__name__} reads images: give --data {DIGITS}, a folder with one folder of images for each "
            "label, or a Hub dataset."
        )
    size = getattr(model.config, "image_size", None)
    found = load_images(replace(arguments, objective="image", image_size=size if isinstance(size, int) else None))[1]
    channels, wanted = found.meta["shape"][0], getattr(model.config, "num_channels", None)
    if wanted is not None and channels != wanted:
        raise SettingsError(f"The images of {arguments.data!r} have {channels} channels, and the model takes {wanted}.")
    return found


def display_names(models: Sequence[str]) -> list[str]:
    """What tells several paths apart: without the folders that all of them begin and end with, and the home folder."""
    parts = [PurePath(shareable(name)).parts for name in models]
    if len(set(models)) < 2:
        return ["/".join(p[-2:]) for p in parts]
    while len({p[0] for p in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [p[1:] for p in parts]
    while len({p[-1] for p in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [p[:-1] for p in parts]
    return [str(PurePath(*p)) for p in parts]


def headless_model(name: str, context_length: int = 1, **options: Any) -> PreTrainedModel:
    """Any checkpoint of AutoModel, without its head."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a head that is left out is no news
    try:
        model = load_model(name, AutoModel, **options)
    finally:
        logging.set_verbosity(verbosity)
    positions = getattr(model.config, "max_position_embeddings", None) or context_length
    if context_length > positions:
        raise SettingsError(f"--context-length {context_length} exceeds the {positions} positions of {name}.")
    return model


def parse_maximum(text: str) -> Maximum | float:
    """The name of a maximum, or nats."""
    if text in MAXIMA:
        return text  # type: ignore[return-value]
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise SettingsError(
            f"--maximum must be one of {', '.join(MAXIMA)}, or a positive number of nats; got {text!r}."
        )
    return value


def lines(reports: Sequence[EntropyReport], maximum: Maximum | float) -> Iterator[str]:
    """What the terminal shows: each table, then each model against the first."""
    for report in reports:
        yield report.table(maximum) + "\n"
    first, *others = reports
    compared = {comparison.other.name: comparison for comparison in comparable(reports)}
    for other in others:
        if other.name in compared:
            yield compared[other.name].table() + "\n"
        else:
            change = other.summary()["mean_normalized"] - first.summary()["mean_normalized"]
            moved = number(100 * change, "+.1f")
            yield f"{other.name} against {first.name}: {moved} % of the bound on average; other layers or heads\n"
