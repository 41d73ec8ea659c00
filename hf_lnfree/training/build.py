"""The model that a run begins with."""

from dataclasses import replace

from transformers import AutoModelForCausalLM, PreTrainedModel

from ..data.arguments import DataArguments
from ..data.splits import TextData, load_data
from ..errors import SettingsError
from ..loading import load_model
from .arguments import ModelArguments


def load_run_data(model_args: ModelArguments, data_args: DataArguments) -> TextData:
    """The data of a run; without a tokenizer of its own, a checkpoint's is taken.

    Raises:
        DataError, ModelError: as `load_data`.
    """
    name = data_args.tokenizer or model_args.model_name_or_path
    return load_data(replace(data_args, tokenizer=name), **model_args.access(name))


def build_model(model_args: ModelArguments, data_args: DataArguments, data: TextData) -> PreTrainedModel:
    """
    A new model of a row, or a checkpoint.

    Raises:
        SettingsError: the tokenizer or the windows do not fit it.
        ModelError: a checkpoint that cannot be loaded.
    """
    tokenizer = data.tokenizer
    config = model_args.config(
        data_args.context_length,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if config.vocab_size < len(tokenizer):
        raise SettingsError(
            f"The tokenizer has {len(tokenizer)} entries and the model's vocabulary {config.vocab_size}. "
            + ("Leave vocab_size out." if model_args.model_name_or_path is None else "Use its own (--tokenizer).")
        )
    if model_args.model_name_or_path is not None:
        access = model_args.access(model_args.model_name_or_path)
        return load_model(model_args.model_name_or_path, config=config, changed=bool(model_args.overrides), **access)
    return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
