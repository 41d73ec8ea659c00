"""Classes of tokens that features are told apart by: the next token, the position, the label of an image, a column.

Shapes: B sequences, T tokens, N rows.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from .mlp_capture import MLPRows

NEXT_TOKEN, POSITION, TOKEN_KIND, LABEL = "next_token", "position", "token_kind", "label"


@dataclass
class BatchClasses:
    """
    Of one batch.

    Args:
        kinds: names of the kinds of classes: "next_token", "position", or columns of the batch.
        inputs: what the model is called with.
        columns: name -> classes [B] or [B, T], negative for none.
        tokens: ids of the tokens that are classes of "next_token", in order.
    """

    kinds: Sequence[str]
    inputs: Mapping[str, Any]
    columns: Mapping[str, Tensor]
    tokens: Sequence[int] = ()
    tables: dict[Any, Tensor] = field(default_factory=dict)

    def of(self, rows: MLPRows, decoder: bool) -> dict[str, Tensor]:
        """
        [N] the class of each row, for the kinds that fit: rows that are no tokens of the batch have a position only.

        Args:
            decoder: whether the rows are those of a decoder beside an encoder.
        """
        found = {}
        for kind in self.kinds:
            key = (kind, decoder, rows.length)
            if key not in self.tables:
                self.tables[key] = self._table(kind, decoder, rows).to(rows.token.device)
            table = self.tables[key]
            if table.numel():
                found[kind] = table[rows.token] if table.dim() == 1 else table[rows.sequence, 0]
        return found

    def _table(self, kind: str, decoder: bool, rows: MLPRows) -> Tensor:
        """[B T] of tokens, [B, 1] of sequences, empty where the kind does not fit."""
        prefix = "decoder_" if decoder else ""
        ids, mask = self.inputs.get(f"{prefix}input_ids"), self.inputs.get(f"{prefix}attention_mask")
        nothing = torch.empty(0, dtype=torch.long)
        if kind == POSITION:
            sequences = int(rows.sequence.max()) + 1 if len(rows.token) else 0
            tokens = torch.ones(sequences, rows.length, dtype=torch.long)
            if isinstance(mask, Tensor) and mask.shape[1:] == (rows.length,):
                tokens = mask.long().cpu()
            return position_buckets(tokens).flatten()
        if kind == NEXT_TOKEN:
            if not isinstance(ids, Tensor) or ids.shape[1] != rows.length:
                return nothing
            return next_tokens(ids.cpu(), None if mask is None else mask.cpu(), self.tokens).flatten()
        column = self.columns[kind].long().cpu()
        if column.dim() == 1:
            return column[:, None]
        return column.flatten() if not decoder and column.shape[1] == rows.length else nothing


def position_buckets(tokens: Tensor) -> Tensor:
    """[B, T] of position p, from 1, ceil(log2 p): 1, 2, 3-4, 5-8, ...; padding is not counted."""
    positions = tokens.cumsum(1).clamp_min(1).double()
    return positions.log2().ceil().long()


def next_tokens(ids: Tensor, mask: Tensor | None, tokens: Sequence[int]) -> Tensor:
    """[B, T] where in `tokens` the token after each stands; -1 for others, and before padding or the end."""
    place = torch.full((max(int(ids.max()), *tokens, 0) + 1,), -1)
    place[list(tokens)] = torch.arange(len(tokens))
    found = torch.full_like(ids, -1)
    found[:, :-1] = place[ids[:, 1:]]
    if mask is not None:
        found[:, :-1][mask[:, 1:] == 0] = -1
    return found


def most_frequent(batches: Iterable[Mapping[str, Any]], count: int) -> list[int]:
    """The tokens that follow another most often, the most frequent first."""
    total = torch.zeros(0, dtype=torch.long)
    for inputs in batches:
        for prefix in ("", "decoder_"):
            ids, mask = inputs.get(f"{prefix}input_ids"), inputs.get(f"{prefix}attention_mask")
            if isinstance(ids, Tensor):
                seen = ids[:, 1:] if mask is None else ids[:, 1:][(mask[:, 1:] * mask[:, :-1]).bool()]
                here = torch.bincount(seen.flatten().cpu(), minlength=len(total))
                here[: len(total)] += total
                total = here
    order = total.argsort(descending=True, stable=True)[:count]
    return order[total[order] > 0].tolist()


def columns_of(inputs: dict[str, Any], kinds: Sequence[str]) -> dict[str, Tensor]:
    """
    Takes the columns that are classes out of a batch; "label" is in its `labels`.

    Raises:
        DataError: a column that is not there, or holds no whole numbers [B] or [B, T].
    """
    found = {}
    for kind in kinds:
        if kind in (NEXT_TOKEN, POSITION):
            continue
        column = inputs.get("labels") if kind == LABEL else inputs.pop(kind, None)
        if not isinstance(column, Tensor) or column.is_floating_point() or column.dim() not in (1, 2):
            name = "labels" if kind == LABEL else kind
            have = ", ".join(inputs) or "nothing"
            raise DataError(
                f"classes={kind!r} needs a column {name!r} of whole numbers [batch] or [batch, tokens] in each batch, "
                f"which holds {have}."
            )
        found[kind] = column
    return found
