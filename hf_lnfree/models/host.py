"""What other libraries decide by the name of a class or a module, told to them for ours; travels with a checkpoint."""

import copy
import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from .errors import ConfigurationError
from .removal import RemovalNorm
from .sites import StackSites

# End of a head's name -> the names of the classes that do the same.
TASK_TABLES: dict[str, dict[str, Any]] = {
    "ForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "ForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "ForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "ForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "ForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "T5ForConditionalGeneration": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "WhisperForConditionalGeneration": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    "ForAudioClassification": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    "ForImageClassification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
}


def name_task(head: type) -> None:
    """
    Enter a class into the table of its task: there Trainer finds whether labels are shifted under
    `label_smoothing_factor`, a pipeline whether it knows the model, and a model card what the model is for.

    The keys of these tables are model types of transformers; the name itself is none, so nothing else finds the entry.
    """
    for end, table in TASK_TABLES.items():
        if head.__name__.endswith(end):
            table[head.__name__] = head.__name__


def norms_of(model: PreTrainedModel, stacks: tuple[StackSites, ...]) -> dict[str, nn.Module]:
    """What stands where the stock model has its norms, by the name of the module, the final one last."""
    base = model.base_model
    found = {}
    for stack in stacks:
        for index, block in enumerate(stack.block_list(base)):
            for branch in stack.branches(block).values():
                found[f"{stack.blocks}.{index}.{branch.norm}"] = branch.norm_module(block)
        if stack.final_norm is not None:
            found[stack.final_norm] = base.get_submodule(stack.final_norm)
    prefix = "" if base is model else f"{model.base_model_prefix}."
    return {prefix + name: norm for name, norm in found.items()}


def norms_to_tune(model: PreTrainedModel, stacks: tuple[StackSites, ...], asked: Any) -> Any:
    """
    The `LNTuningConfig` that PEFT needs for a model some of whose norms have nothing to train: these are excluded.

    Args:
        asked: the one that was given; without `target_modules` it means every norm.

    Raises:
        ConfigurationError: the norms that it names have no parameters, or are being removed.
    """
    norms, config = norms_of(model, stacks), copy.deepcopy(asked)
    if config.target_modules is None:
        config.target_modules = {name.rpartition(".")[2] for name in norms}
    named = {name: norm for name, norm in norms.items() if targets(config.target_modules, name)}
    bare = {name for name, norm in named.items() if not any(True for _ in norm.parameters())}
    kinds = (
        f"norm={model.config.norm!r}, layer_norms={model.config.layer_norms!r}, final_norm={model.config.final_norm!r}"
    )
    if named and bare == set(named):
        raise ConfigurationError(
            f"LNTuning trains norms, and none of {', '.join(sorted(named))} has parameters ({kinds}). Take another "
            "method, such as LoRA, or name a norm that is there in target_modules."
        )
    for name, norm in named.items():
        if any(isinstance(module, RemovalNorm) and not module.finished for module in norm.modules()):
            raise ConfigurationError(
                f"{name} is being removed ({kinds}), and a copy of it that is trained would not follow. Finish the "
                "removal, or load the model with norm='layernorm'."
            )
    if isinstance(config.exclude_modules, str):
        config.exclude_modules = "|".join((f"(?:{config.exclude_modules})", *map(re.escape, sorted(bare))))
    elif bare:
        config.exclude_modules = bare | set(config.exclude_modules or ())
    return config


def targets(patterns: Any, name: str) -> bool:
    """Whether PEFT's `target_modules`, a regular expression or the ends of names, mean the module of that name."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(f".{name}".endswith(f".{pattern}") for pattern in patterns)
