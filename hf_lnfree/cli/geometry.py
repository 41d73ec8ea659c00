"""`hf-lnfree geometry`: load models, read whole documents or images, run the analyzer on each."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..analysis.geometry import GeometryAnalyzer, text_columns
from ..analysis.geometry_report import GeometryReport
from ..analysis.row_classes import TOKEN_KIND
from ..analysis.texts import TextWindows, model_inputs
from ..analysis.token_kinds import token_kinds
from ..data.arguments import DataArguments
from ..data.documents import document_hash
from ..data.splits import load_splits, whole_corpus
from ..data.windows import evenly
from ..errors import DataError
from ..files import require_own
from ..loading import find_device, load_tokenizer
from ..pages.geometry import comparable, write_geometry_page
from .entropy import display_names, headless_model, other_inputs

TEXT_CLASSES = ("next_token", "position")
MOST_DOCUMENTS = 20_000  # that are read
CHOSEN_FROM = 4  # times as many windows, so that those chosen are spread over more documents


def geometry_command(
    models: Sequence[str],
    data: str,
    text_column: str | None,
    context_length: int,
    max_windows: int,
    batch_size: int,
    classes: Sequence[str] | None,
    groups: int,
    only: str,
    out: Path | None,
    device: str | None,
    access: dict[str, Any],
) -> list[GeometryReport]:
    """The reports of the models, written into the folder `out` if there is one."""
    if out is not None:
        require_own(out, "geometry report", ["geometry-*.json"])
    place = find_device(device)
    arguments = DataArguments(data=data, text_column=text_column, context_length=context_length)

    def measure(name: str, shown: str) -> GeometryReport:
        """The report of one model, which is gone from memory after this."""
        model = headless_model(name, context_length, device=place, **access)
        wanted = classes
        if (found := other_inputs(model, name, arguments, max_windows, batch_size, access)) is not None:
            batches, _ = found
        else:
            wanted = TEXT_CLASSES if classes is None else classes
            tokenizer = load_tokenizer(name, **access)
            kinds = TOKEN_KIND in wanted
            batches = document_batches(model, tokenizer, arguments, max_windows, batch_size, kinds)
        analyzer = GeometryAnalyzer(model, groups, wanted, only=only)
        report = analyzer.run(batches, name=shown, progress=True)
        report.metadata["data"] = data
        return report

    reports = list(map(measure, models, display_names(models)))
    if out is not None:
        write_geometry_page(out, reports)
    return reports


def document_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    arguments: DataArguments,
    max_windows: int,
    batch_size: int,
    kinds: bool,
) -> list[dict[str, Any]]:
    """
    Windows of documents as the model takes them, spread evenly over documents that come in the order of their hashes.

    Args:
        kinds: whether the kinds of Python tokens are wanted too.

    Raises:
        DataError: there is no text, or kinds are wanted of a tokenizer that does not tell where its tokens lie.
    """
    if kinds and not tokenizer.is_fast:
        raise DataError(f"--classes token_kind needs a fast tokenizer, got {type(tokenizer).__name__}.")
    everything = Path(arguments.data).expanduser().is_file()
    corpus = whole_corpus(arguments) if everything else load_splits(arguments)[1]
    documents = sorted(islice(corpus.texts, MOST_DOCUMENTS), key=document_hash)
    length = arguments.context_length
    windows = TextWindows(documents, tokenizer, "", length, batch_size, token_kinds if kinds else None)
    found = list(islice(windows.cut(), CHOSEN_FROM * max_windows))
    if not found:
        raise DataError(f"{arguments.data!r} holds no text. Give a file or a folder of text.")
    chosen = [found[index] for index in evenly(len(found), max_windows)]
    batches = []
    for start in range(0, len(chosen), batch_size):
        part = chosen[start : start + batch_size]
        inputs = windows.together(part)
        both = model_inputs(model, inputs["input_ids"]) | inputs
        if "decoder_input_ids" in both:
            both["decoder_attention_mask"] = inputs["attention_mask"]
        batches.append(both | text_columns(part))
    return batches


def lines(reports: Sequence[GeometryReport]) -> Iterator[str]:
    """What the terminal shows: each table, then each model against the first."""
    for report in reports:
        yield report.table() + "\n"
    for comparison in comparable(reports):
        yield comparison.table() + "\n"
