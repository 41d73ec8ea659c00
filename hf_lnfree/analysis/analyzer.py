"""Model + batches -> `EntropyReport`: the attention entropy of every head, with its uncertainty.

Row entropies of one batch are added to sums on the model's device and dropped; one transfer at the end.
"""

import hashlib
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..attention.fused import RowEntropies
from ..errors import DataError
from ..provenance import environment
from .capture import AttentionRecord, Method, record_attention_entropy
from .entropy_report import EntropyReport
from .head_statistics import StatisticsTotals
from .inputs import LABELS, hash_inputs, model_call
from .modes import evaluation
from .parts import CROSS, kind_of
from .texts import TextWindows
from .totals import EntropyTotals

Batch = Mapping[str, Any] | Tensor


class AttentionEntropyAnalyzer:
    r"""
    Attention entropy of every head of a model, over batches.

    A head's entropy is the mean of $H_i = -\sum_j p_{ij} \ln p_{ij}$ (arXiv 2410.09637, eq. 3) over every query that
    is a token; padding counts neither as a query nor as a key. The model runs as it is, in eval mode, without gradient.

    Args:
        model: any model that `record_attention_entropy` can record.
        method: how, see there: "auto", "fused" or "attentions".
        statistics: also measure logits, sinks and the norms of outputs, see `RowStatistics`.
        replicates: bootstrap replicates behind intervals of head shares and paired comparisons; 0 for none.
        seed: of the bootstrap.

    Example:
        >>> report = AttentionEntropyAnalyzer(model).run(batches)
        >>> print(report)
        >>> report = AttentionEntropyAnalyzer(model).run(dataset["text"], tokenizer=tokenizer, context_length=256)
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method = "auto",
        *,
        statistics: bool = False,
        replicates: int = 200,
        seed: int = 0,
    ):
        self.model, self.method, self.statistics = model, method, statistics
        self.replicates, self.seed = replicates, seed

    @torch.no_grad()
    def run(
        self,
        batches: Iterable[Any] | Tensor | str,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_column: str = "text",
        context_length: int = 128,
        batch_size: int = 16,
        name: str = "",
        max_batches: int | None = None,
        progress: bool = False,
    ) -> EntropyReport:
        """
        Args:
            batches: model inputs, or `input_ids` [B, T] alone. With a `tokenizer`: texts, or rows of a
                `datasets.Dataset`. A single one of them is one batch or one text. Padding is what the masks of
                self-attention hide from every query.
            tokenizer: turns texts into batches of `batch_size` windows, see `TextWindows`: a longer text is cut into
                windows of `context_length` tokens, as `hf-lnfree entropy` does; what remains at its end is left out,
                and the report says how much that is.
            text_column: of a dataset's rows.
            name: what the report is called in tables and pictures.
            max_batches: stop after that many.
            progress: show a progress bar.

        Raises:
            DataError: nothing to analyse, or batches that differ in how often they call an attention module.
            AttentionError: a model whose attention cannot be recorded.
        """
        config = getattr(self.model, "config", None)
        positions = getattr(config, "max_position_embeddings", None) or context_length
        if tokenizer is not None and context_length > positions:
            raise DataError(f"context_length={context_length} exceeds the {positions} positions of the model.")
        if isinstance(batches, (str, Mapping)) or (isinstance(batches, Tensor) and batches.dim() == 2):
            batches = [batches]
        windows = None
        if tokenizer is not None:
            batches = windows = TextWindows(batches, tokenizer, text_column, context_length, batch_size)
        totals, kinds = EntropyTotals(self.replicates, self.seed), list[str]()
        statistics = StatisticsTotals() if self.statistics else None
        data = hashlib.sha256()
        total = len(batches) if hasattr(batches, "__len__") else None  # type: ignore[arg-type]
        bar = tqdm(islice(batches, max_batches), desc="attention entropy", total=total, disable=not progress)
        with evaluation(self.model):
            for batch in bar:
                if isinstance(batch, str):
                    raise DataError("Texts need a tokenizer: run(texts, tokenizer=tokenizer).")
                inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
                inputs = {key: value for key, value in inputs.items() if key not in LABELS}
                hash_inputs(data, inputs)
                with record_attention_entropy(self.model, self.method, statistics=self.statistics) as record:
                    self.model(**model_call(self.model, inputs))
                rows = by_depth(record)
                tokens = queries_that_are_tokens(rows)
                totals.add(rows, tokens)
                if statistics is not None:
                    statistics.add(rows, tokens)
                kinds = kinds or [kind_of(*each) for each in zip(rows, rows.values(), tokens, strict=True)]
        if totals.sequences is None or not totals.sequences.any():
            raise DataError("There is nothing to analyse: batches is empty, or holds padding only.")
        return EntropyReport(
            name=name or getattr(config, "name_or_path", "") or type(self.model).__name__,
            **totals.fields() | ({} if statistics is None else statistics.fields()),
            kinds=kinds,
            metadata={
                **({} if windows is None else {"texts": windows.counts()}),
                "data_sha256": data.hexdigest(),
                "bootstrap": {"replicates": self.replicates, "seed": self.seed, "weights": "exponential"},
                "method": self.method,
                **({"class_token": True} if has_class_token(self.model) else {}),
                "attention": getattr(config, "_attn_implementation", None),
                "dtype": str(next(self.model.parameters()).dtype),
                "environment": environment(next(self.model.parameters()).device),
            },
        )


def has_class_token(model: nn.Module) -> bool:
    """Whether a class token of the model's own stands before the tokens, as in ViT."""
    return any(name.rpartition(".")[2] == "cls_token" for name, _ in model.named_parameters())


def queries_that_are_tokens(rows: dict[str, RowEntropies]) -> list[Tensor]:
    """
    For each module, [B, Q] bool: in self-attention, the queries whose key some query may attend to.

    That is what the attention was told, whatever stands before the tokens (a prompt, other patches) and however the
    model shortens its input. Queries of a cross-attention are those of the self-attention before it.
    """
    tokens, latest = [], {}
    for name, row in rows.items():
        (batch, _, queries), keys = row.entropy.shape, row.keys
        if keys is not None and not CROSS.search(name):
            if keys.shape[1] == queries:
                latest[batch, queries] = keys.expand(batch, -1)
            elif keys.shape[1] > queries and (batch, queries) not in latest:  # after a prefix of keys
                latest[batch, queries] = keys[:, -queries:].expand(batch, -1)
        everything = torch.ones(batch, queries, dtype=torch.bool, device=row.entropy.device)
        tokens.append(latest.get((batch, queries), everything))
    return tokens


def by_depth(record: AttentionRecord) -> dict[str, RowEntropies]:
    """The calls of one forward pass, numbered where a module makes several: one a layer (ALBERT), one a picture."""
    return {
        name if len(calls) == 1 else f"{name}#{number}": rows
        for name, calls in record.calls.items()
        for number, rows in enumerate(calls)
    }
