"""What transformers decides by the name of a class, told to it for ours; it travels with a checkpoint."""

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def is_causal_lm(head: type) -> type:
    """
    A class decorator: under `label_smoothing_factor`, Trainer shifts labels for the class names that this table holds.

    The table's keys are model types of transformers; the name itself is none, so nothing else finds the entry.
    """
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[head.__name__] = head.__name__
    return head
