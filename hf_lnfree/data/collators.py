"""What makes a batch of examples, by objective; transformers' own collators where there is one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase, default_data_collator

from .objectives import Objective

IGNORED = -100  # a label that does not count


def collator_of(objective: Objective, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Any:
    """
    Args:
        tokenizer: of the texts of a sequence-to-sequence model; others need none.
        model: which makes the decoder's inputs of labels.
    """
    if objective.auto_class == "AutoModelForSeq2SeqLM":
        return Seq2SeqBatch(DataCollatorForSeq2Seq(tokenizer, model))
    if objective.name == "speech":
        return SpeechBatch(model)
    return default_data_collator


@dataclass
class Seq2SeqBatch:
    """[`DataCollatorForSeq2Seq`] with labels as lists: of tensors it warns that it reads them slowly."""

    collator: DataCollatorForSeq2Seq

    def __call__(self, examples: Sequence[dict[str, Any]]) -> Any:
        return self.collator([example | {"labels": example["labels"].tolist()} for example in examples])


@dataclass
class SpeechBatch:
    """Features of recordings, which all have one length, and labels filled up with -100."""

    model: PreTrainedModel

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        from transformers.models.whisper.modeling_whisper import shift_tokens_right  # else at every start of a run

        batch = {"input_features": torch.stack([example["input_features"] for example in examples])}
        labels = pad_sequence([example["labels"] for example in examples], batch_first=True, padding_value=IGNORED)
        config: Any = self.model.config
        decoded = shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)
        return batch | {"labels": labels, "decoder_input_ids": decoded}
