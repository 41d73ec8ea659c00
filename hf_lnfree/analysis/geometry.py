"""Model + batches -> `GeometryReport`: what the units of every MLP do, with standard errors over documents.

Rows go into sums as they come and are dropped; memory does not grow with the number of tokens.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..errors import DataError, SettingsError
from ..provenance import environment
from .geometry_report import GeometryReport
from .inputs import LABELS, hash_inputs, model_call
from .mlp_capture import MLPRows, record_mlp
from .mlp_sums import MLPMetrics, MLPSums, metrics
from .modes import evaluation
from .moments import standard_error
from .row_classes import (
    LABEL,
    NEXT_TOKEN,
    POSITION,
    TOKEN_KIND,
    BatchClasses,
    columns_of,
    most_frequent,
)
from .texts import TextWindows, Window
from .token_kinds import KINDS, token_kinds

DOCUMENT = "document"
NOTHING = (
    "There is nothing to analyse: batches is empty, or holds padding only, or no MLP has the name that only= asks for."
)


@dataclass
class GeometrySums:
    """
    What a `GeometryReport` is made of. Sums of several processes, each over documents of its own, can be added.

    Args:
        mlps: name of an MLP -> its sums.
        documents: how many were read.
        about: what the report says of data and model.
    """

    mlps: dict[str, MLPSums] = field(default_factory=dict)
    documents: int = 0
    about: dict[str, Any] = field(default_factory=dict)

    def __add__(self, other: "GeometrySums") -> "GeometrySums":
        for key in ("groups", "next_tokens"):
            if self.about.get(key) != other.about.get(key):
                raise SettingsError(
                    f"Sums with other {key} cannot be added: {self.about.get(key)} and {other.about.get(key)}."
                )
        names = list(dict.fromkeys([*self.mlps, *other.mlps]))
        both = {name: [sums.mlps[name] for sums in (self, other) if name in sums.mlps] for name in names}
        mlps = {name: parts[0] if len(parts) == 1 else parts[0] + parts[1] for name, parts in both.items()}
        hashes = sorted(str(sums.about.get("data_sha256")) for sums in (self, other))
        data = hashlib.sha256("".join(hashes).encode()).hexdigest()
        return GeometrySums(mlps, self.documents + other.documents, {**self.about, "data_sha256": data})

    def report(self, name: str = "", spectra: bool = True) -> GeometryReport:
        """
        The metrics of every MLP.

        Args:
            spectra: whether to find eigenvalues, which takes longest where units are many; else what needs them is NaN.

        Raises:
            DataError: no row was read.
        """
        if not self.mlps:
            raise DataError(NOTHING)
        return report_of(
            name or str(self.about.get("model", "")), self, [metrics(sums, spectra) for sums in self.mlps.values()]
        )


class GeometryAnalyzer:
    r"""
    Spectra, firing, selectivity and alignment of the units of every MLP of a model, over batches.

    The model runs as it is, in eval mode, without gradient; padding does not count. Documents are dealt to groups in
    turn, and standard errors are those of a jackknife that leaves out one group at a time.

    Args:
        model: any model that `record_mlp` can record.
        groups: of documents, 2 or more; 1 for no standard errors. An MLP of F units takes about 20 F^2 bytes a group.
        classes: what tokens are told apart by: "next_token" (the `next_tokens` most frequent), "position" (1, 2, 3-4,
            5-8, ...), "token_kind" (what kind of Python a token is; needs texts and a fast tokenizer), "label" (that of
            an image), or any column of the batches with whole numbers [batch] or [batch, tokens], negative for none.
            By default what the batches have of next token and position, or of the label.
        next_tokens: how many, or which token ids; needed to add up what several processes read.
        only: a pattern that the names of MLPs must hold, to record some of them.

    Example:
        >>> report = GeometryAnalyzer(model).run(texts, tokenizer=tokenizer, context_length=256)
        >>> print(report)
    """

    def __init__(
        self,
        model: nn.Module,
        groups: int = 10,
        classes: Sequence[str] | None = None,
        *,
        next_tokens: int | Sequence[int] = 32,
        only: str = "",
    ):
        if groups < 1:
            raise SettingsError(f"groups={groups}: give 2 or more, or 1 for no standard errors.")
        self.model, self.groups, self.classes, self.next_tokens = model, groups, classes, next_tokens
        self.only = re.compile(only)

    def run(self, batches: Iterable[Any] | Tensor | str, *, name: str = "", **options: Any) -> GeometryReport:
        """
        Args:
            batches: as of `sums`, which takes all other options.
            name: what the report is called in tables and pictures.

        Raises:
            DataError: nothing to analyse, or a column that is missing.
            ModelError: a model whose MLPs cannot be recorded.
        """
        return self.sums(batches, **options).report(name)

    @torch.no_grad()
    def sums(
        self,
        batches: Iterable[Any] | Tensor | str,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_column: str = "text",
        context_length: int = 128,
        batch_size: int = 16,
        first_document: int = 0,
        max_batches: int | None = None,
        progress: bool = False,
    ) -> GeometrySums:
        """
        Args:
            batches: model inputs, or `input_ids` [B, T] alone; a column `document` [B] says which sequences are of one
                document, else each is one. With a `tokenizer`: texts, or rows of a `datasets.Dataset`, whose windows
                stay together. They are gone through twice where the most frequent next tokens must be found.
            tokenizer, text_column, context_length, batch_size: as of `AttentionEntropyAnalyzer.run`.
            first_document: number of the first document, where other processes read those before.
            max_batches: stop after that many.
            progress: show a progress bar.
        """
        total = len(batches) if isinstance(batches, list) and tokenizer is None else None
        windows = (tokenizer, text_column, context_length, batch_size, first_document)
        rest = islice(self._batches(batches, *windows), max_batches)
        begin = list(islice(rest, 1))
        if not begin:
            raise DataError(NOTHING)
        found: Iterable[dict[str, Any]] = chain(begin, rest)
        classes = self.classes if self.classes is not None else default_classes(begin[0])
        tokens = [] if isinstance(self.next_tokens, int) else list(self.next_tokens)
        if NEXT_TOKEN in classes and isinstance(self.next_tokens, int):
            found = list(found)
            tokens = most_frequent(found, self.next_tokens)
        config: Any = getattr(self.model, "config", None)
        sums, data = GeometrySums(), hashlib.sha256()
        numbers: dict[int, None] = {}
        with evaluation(self.model):
            for batch in tqdm(found, desc="geometry", total=total, disable=not progress):
                inputs = dict(batch)
                hash_inputs(data, inputs)
                columns = columns_of(inputs, classes)
                inputs = {key: value for key, value in inputs.items() if key not in LABELS}
                documents = self._documents(inputs, first_document + len(numbers))
                numbers |= dict.fromkeys(documents.tolist())
                kinds = BatchClasses(classes, inputs, columns, tokens)
                self._add(sums, inputs, documents % self.groups, kinds)
        parameter = next(self.model.parameters())
        sums.documents = len(numbers)
        sums.about = {
            "model": getattr(config, "name_or_path", "") or type(self.model).__name__,
            "data_sha256": data.hexdigest(),
            "groups": self.groups,
            "classes": list(classes),
            "next_tokens": tokens,
            **({"token_kinds": list(KINDS)} if TOKEN_KIND in classes else {}),
            "dtype": str(parameter.dtype),
            "environment": environment(parameter.device),
        }
        return sums

    def _add(self, sums: GeometrySums, inputs: dict[str, Any], groups: Tensor, classes: BatchClasses) -> None:
        """What the MLPs do with one batch."""
        sides = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)

        def each(rows: MLPRows) -> None:
            if not self.only.search(rows.name) or not len(rows.token):
                return
            if int(rows.sequence.max()) >= len(groups):
                raise DataError(
                    f"{rows.name} reads {int(rows.sequence.max()) + 1} sequences, and the batch has {len(groups)}: "
                    "which document each belongs to cannot be told. Choose other MLPs with only=..."
                )
            if rows.name not in sums.mlps:
                sums.mlps[rows.name] = MLPSums.like(rows, self.groups)
            labels = classes.of(rows, sides and "decoder" in rows.name.split("."))
            sums.mlps[rows.name].add(rows, groups.to(rows.token.device)[rows.sequence], labels)

        with record_mlp(self.model, each):
            self.model(**model_call(self.model, inputs))

    def _batches(
        self, batches: Any, tokenizer: PreTrainedTokenizerBase | None, column: str, length: int, size: int, first: int
    ) -> Iterator[dict[str, Any]]:
        """As dicts, with a column of documents where they are known."""
        if isinstance(batches, (str, Mapping)) or (isinstance(batches, Tensor) and batches.dim() == 2):
            batches = [batches]
        if tokenizer is None:
            for batch in batches:
                if isinstance(batch, str):
                    raise DataError("Texts need a tokenizer: run(texts, tokenizer=tokenizer).")
                yield {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
            return
        wants_kinds = self.classes is not None and TOKEN_KIND in self.classes
        if wants_kinds and not tokenizer.is_fast:
            raise DataError(f"classes='token_kind' needs a fast tokenizer, got {type(tokenizer).__name__}.")
        windows = TextWindows(batches, tokenizer, column, length, size, token_kinds if wants_kinds else None)
        for part in windows.batches():
            yield windows.together(part) | text_columns(part, first)

    @staticmethod
    def _documents(inputs: dict[str, Any], number: int) -> Tensor:
        """[B] the number of the document of each sequence; takes its column out of a batch."""
        given = inputs.pop(DOCUMENT, None)
        first = next(value for value in inputs.values() if isinstance(value, Tensor))
        return torch.arange(number, number + len(first)) if given is None else torch.as_tensor(given).long().cpu()


def text_columns(windows: Sequence[Window], first: int = 0) -> dict[str, Tensor]:
    """The document of each window, numbered from `first`, and the kinds of its tokens, -1 for padding."""
    columns = {DOCUMENT: torch.tensor([first + window.text for window in windows])}
    kinds = [torch.tensor(window.kinds) for window in windows if window.kinds is not None]
    if kinds:
        columns[TOKEN_KIND] = nn.utils.rnn.pad_sequence(kinds, batch_first=True, padding_value=-1)
    return columns


def default_classes(batch: Mapping[str, Any]) -> tuple[str, ...]:
    """What a batch of texts has, or one of images."""
    if "input_ids" in batch:
        return (NEXT_TOKEN, POSITION)
    labels = batch.get("labels")
    return (LABEL,) if isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point() else ()


def report_of(name: str, sums: GeometrySums, found: Sequence[MLPMetrics]) -> GeometryReport:
    """The metrics of all MLPs in one; what one of them lacks is NaN."""
    names = list(dict.fromkeys(metric for each in found for metric in each.values))
    widths = [part.width for part in sums.mlps.values()]
    unknown = torch.full((int(sums.about["groups"]),), torch.nan, dtype=torch.float64)
    left = {metric: torch.stack([each.left.get(metric, unknown) for each in found], 1) for metric in names}
    values = {metric: [each.values.get(metric, torch.nan) for each in found] for metric in names}
    return GeometryReport(
        name=name,
        modules=list(sums.mlps),
        values={metric: torch.tensor(numbers, dtype=torch.float64) for metric, numbers in values.items()},
        standard_errors={metric: standard_error(without) for metric, without in left.items()},
        left_out=left,
        units={key: padded([each.units[key] for each in found]) for key in found[0].units},
        rows=torch.tensor([part.rows for part in sums.mlps.values()]),
        widths=torch.tensor(widths),
        documents=sums.documents,
        metadata={key: value for key, value in sums.about.items() if key != "model"},
    )


def padded(values: Sequence[Tensor]) -> Tensor:
    """[L, F] of the widest; what others lack is NaN."""
    return nn.utils.rnn.pad_sequence(list(values), batch_first=True, padding_value=torch.nan)
