"""What the explorer tells of a text: entropies of heads, the map of one of them, next tokens and their attribution.

Shapes: Q queries, K keys.
"""

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..analysis.analyzer import AttentionEntropyAnalyzer
from ..analysis.entropy_report import FEWEST_KEYS, EntropyReport
from ..analysis.head_map import record_head_map
from ..analysis.linearity import Attribution, attribute
from ..analysis.modes import evaluation, execution_device
from ..analysis.texts import model_inputs
from ..errors import ModelError, SettingsError

NEXT_TOKENS = 10
LONGEST_MAP = 2048  # tokens
LOCK = threading.Lock()  # one model runs at a time: recording attention is not thread-safe


@dataclass
class Reading:
    """
    What a model makes of a text.

    Args:
        tokens: the pieces of the text, as they are written on axes.
        report: of this text alone, without intervals.
        next_tokens: the most probable ones with their probabilities, the first the most probable; none where the model
            predicts no next token.
        attribution: of the logit of the first of them; None where it would not be exact.
        notes: what is missing or means little, and why, in sentences.
    """

    text: str
    inputs: dict[str, Any]
    tokens: list[str]
    report: EntropyReport
    next_tokens: list[tuple[str, float]]
    attribution: Attribution | None
    notes: list[str]


@dataclass
class Explorer:
    """
    A model with its tokenizer, and what it made of the last text.

    Args:
        name: what the model is called.
        model: causal language model, or a model without a head.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    last: Reading | None = field(default=None, repr=False)

    def read(self, text: str) -> Reading:
        """
        Everything about a text but maps; the last text is not read again.

        Raises:
            SettingsError: the text is empty, or longer than the model has positions for.
            AttentionError: the attention of the model cannot be recorded.
        """
        with LOCK:
            if self.last is None or self.last.text != text:
                self.last = self._read(text)
            return self.last

    def head_map(self, text: str, layer: int, head: int) -> Tensor:
        """
        [Q, K] probabilities of one head, on the CPU.

        Args:
            layer: number of the attention in `report.modules`.

        Raises:
            SettingsError: as `read`; there is no such layer or head; the text is too long for a map.
            AttentionError: the map cannot be read.
        """
        reading = self.read(text)
        heads = reading.report.heads
        if layer not in range(len(heads)):
            raise SettingsError(f"{self.name} has no layer {layer}: its layers are 0 to {len(heads) - 1}.")
        count = int(heads[layer].sum())
        if head not in range(count):
            raise SettingsError(f"{self.name} has no head {head} in layer {layer}: its heads are 0 to {count - 1}.")
        if len(reading.tokens) > LONGEST_MAP:
            raise SettingsError(f"The text has {len(reading.tokens)} tokens; a map is made of up to {LONGEST_MAP}.")
        with LOCK, evaluation(self.model), record_head_map(self.model, reading.report.modules[layer], head) as found:
            self._run(reading.inputs)
        assert found.weights is not None
        return found.weights[0].cpu()

    def _read(self, text: str) -> Reading:
        ids = self._ids(text)
        inputs = model_inputs(self.model, ids)
        report = AttentionEntropyAnalyzer(self.model, replicates=0).run(inputs, name=self.name)
        notes = []
        if report.too_short:
            notes.append(
                f"{report.context_length} keys at most: too short for a verdict on heads, which needs queries of "
                f"{FEWEST_KEYS} keys."
            )
        next_tokens = self._next_tokens(inputs, report)
        if not next_tokens:
            notes.append(f"{self.name} is no causal language model: it predicts no next token.")
        attribution = self._attribution(inputs) if next_tokens else None
        if next_tokens and attribution is None:
            notes.append("No exact attribution, which needs a model of this package without a final norm.")
        tokens = [printable(str(self.tokenizer.decode([token]))) for token in ids[0].tolist()]
        return Reading(text, inputs, tokens, report, next_tokens, attribution, notes)

    def _ids(self, text: str) -> Tensor:
        if not text.strip():
            raise SettingsError("The text is empty.")
        found = self.tokenizer(text, verbose=False)["input_ids"]
        if not found:
            raise SettingsError("The text holds no token.")
        longest = positions(self.model)
        if longest is not None and len(found) > longest:
            raise SettingsError(f"The text has {len(found)} tokens; {self.name} takes {longest}.")
        return torch.tensor([found], device=execution_device(self.model))

    def _next_tokens(self, inputs: dict[str, Any], report: EntropyReport) -> list[tuple[str, float]]:
        if self.model.get_output_embeddings() is None or "bidirectional" in report.kinds:
            return []
        with torch.no_grad(), evaluation(self.model):
            logits = self._run(inputs).logits[0, -1].cpu()
        probabilities, ids = logits.double().softmax(-1).topk(min(NEXT_TOKENS, len(logits)))
        texts = [repr(self.tokenizer.decode([token])) for token in ids.tolist()]
        return list(zip(texts, probabilities.tolist(), strict=True))

    def _attribution(self, inputs: dict[str, Any]) -> Attribution | None:
        try:
            found = attribute(self.model, **inputs, position=-1)
        except ModelError:
            return None
        return found if found.linear else None

    def _run(self, inputs: dict[str, Any]) -> Any:
        return self.model(**inputs, **({"use_cache": False} if hasattr(self.model.config, "use_cache") else {}))


def positions(model: PreTrainedModel) -> int | None:
    """How many tokens a model takes; None where nothing limits them."""
    count = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(count, int) or count < 1:
        return None
    for name, module in model.named_modules():
        # RoBERTa and its like count positions from the one after that of padding.
        learned = isinstance(module, nn.Embedding) and "position" in name and module.num_embeddings == count
        if learned and module.padding_idx is not None:
            return count - module.padding_idx - 1
    return count


def printable(text: str) -> str:
    """A token with its line breaks and control characters as they are written in Python."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
