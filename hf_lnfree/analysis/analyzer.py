"""Model + batches -> `EntropyReport`: mean attention entropy of every head, with its standard error.

The attentions of one batch are reduced to per-sequence sums and dropped; nothing T x T outlives its batch.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .entropy import attention_entropy, normalized_entropy, row_support
from .entropy_report import EntropyReport

Batch = Mapping[str, Tensor] | Tensor


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Eager attention and eval mode inside, what was there before outside, also after an exception."""
    implementation = model.config._attn_implementation
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        model.set_attn_implementation(implementation)
        for module, mode in training.items():
            module.training = mode


class AttentionEntropyAnalyzer:
    """
    Mean attention entropy of every head of a model with self-attention, over batches.

    A head's entropy is the mean of $H_i = -\\sum_j p_{ij} \\ln p_{ij}$ over every query that is a token; its standard
    error treats sequences, not rows, as independent (ratio estimator). The normalised entropy is the mean of
    $H_i / \\ln n_i$ over queries with $n_i > 1$ keys.

    Args:
        model: any transformers model whose eager attentions are returned as [B, H, T, T].

    Example:
        >>> report = AttentionEntropyAnalyzer(model).run(batches)
        >>> print(report)
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model

    @torch.no_grad()
    def run(
        self, batches: Iterable[Batch], *, name: str = "", max_batches: int | None = None, progress: bool = False
    ) -> EntropyReport:
        """
        Args:
            batches: model inputs, or `input_ids` [B, T] alone. Padding is told by `attention_mask` and does not count.
            name: what the report is called in tables and pictures.
            max_batches: stop after that many.
            progress: show a progress bar.

        Raises:
            ValueError: no batches, or a model that returns no [B, H, T, T] attentions.
        """
        totals = _Totals()
        with eager_attention(self.model):
            for index, batch in enumerate(tqdm(batches, desc="attention entropy", disable=not progress)):
                if max_batches is not None and index >= max_batches:
                    break
                self._add(totals, {"input_ids": batch} if isinstance(batch, Tensor) else batch)
        if not totals.sequences:
            raise ValueError("There is nothing to analyse: batches is empty, or holds padding only.")
        return totals.report(name or self.model.config.name_or_path or type(self.model).__name__)

    def _add(self, totals: "_Totals", batch: Mapping[str, Tensor]) -> None:
        inputs = {k: v.to(self.model.device) for k, v in batch.items() if k != "labels"}
        attentions = self.model(**inputs, output_attentions=True, **self._no_cache()).attentions
        if not attentions or any(a is None or a.dim() != 4 for a in attentions):
            raise ValueError(
                f"{type(self.model).__name__} returned no attention maps of shape [batch, heads, queries, keys]; "
                "the analyzer needs a model with self-attention whose eager implementation returns them."
            )
        shape = attentions[0].shape
        mask = inputs.get("attention_mask")
        if mask is None:
            mask = torch.ones(shape[0], shape[-1], dtype=torch.long, device=attentions[0].device)
        # Rows of padding attend anywhere, and a NaN above the diagonal says nothing about causality.
        tokens = mask[:, None].bool()  # B 1 T
        causal = not any((a.nan_to_num(0.0).triu(1).any(-1) & tokens).any() for a in attentions)
        entropy = torch.stack([attention_entropy(a) for a in attentions])  # L B H T
        totals.add(entropy.cpu().double(), row_support(mask, causal).cpu())

    def _no_cache(self) -> dict[str, Any]:
        return {"use_cache": False} if hasattr(self.model.config, "use_cache") else {}


class _Totals:
    """Streaming sums over sequences, from which mean and standard error of every head follow."""

    def __init__(self) -> None:
        self.sequences = self.rows = self.length = 0
        self.sums: dict[str, Tensor | float] = {}

    def add(self, entropy: Tensor, support: Tensor) -> None:
        """
        Args:
            entropy: [L, B, H, T], float64.
            support: [B, T].
        """
        tokens, choice = support > 0, support > 1  # B T
        kept = tokens.any(dim=-1)
        n = tokens.sum(-1).double()  # rows of each sequence, [B]
        s = entropy.where(tokens[:, None], 0.0).sum(-1)  # L B H
        share = normalized_entropy(entropy, support[:, None]).where(choice[:, None], 0.0).sum((1, 3))  # L H
        for key, value in {
            "s": s.sum(1),
            "ss": s.square().sum(1),
            "sn": (s * n[None, :, None]).sum(1),
            "n": n.sum(),
            "nn": n.square().sum(),
            "share": share,
            "choice": choice.sum(),
            "bound": support.double().log().where(tokens, 0.0).sum(),
            "nonfinite": (~entropy.isfinite() & tokens[:, None]).sum((1, 3)),
        }.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
        self.sequences += int(kept.sum())
        self.rows += int(tokens.sum())
        self.length = max(self.length, int(support.max()))

    def report(self, name: str) -> EntropyReport:
        t: dict[str, Any] = self.sums
        mean = t["s"] / t["n"]
        # Var of a ratio of sums over clusters: sum_b (s_b - mean n_b)^2 / n^2, with the small-sample factor B/(B-1).
        residual = (t["ss"] - 2 * mean * t["sn"] + mean.square() * t["nn"]).clamp_min(0)
        clusters = self.sequences
        factor = clusters / (clusters - 1) if clusters > 1 else torch.nan
        return EntropyReport(
            name=name,
            entropy=mean,
            standard_error=(factor * residual).sqrt() / t["n"],
            normalized=t["share"] / t["choice"],
            nonfinite_rows=t["nonfinite"],
            rows=self.rows,
            sequences=clusters,
            context_length=self.length,
            bound=float(t["bound"] / t["n"]),
        )
