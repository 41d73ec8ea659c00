"""What a checkpoint has beside its weights: a tokenizer, with the code that it needs, or a processor of images, how it
generates, a licence."""

import shutil
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from ..errors import ModelError, listed
from ..loading import mapping_in

BESIDE = ["tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*"]
BESIDE += ["preprocessor_config.json", "processor_config.json", "generation_config.json", "LICENSE*"]
CODE = "*.py"


def copy_beside(source: Path, folder: Path) -> None:
    """
    Copy it all as it is.

    Raises:
        ModelError: code of the tokenizer is not there, or has the name of a file that our models need.
    """
    for pattern in BESIDE:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    for file in tokenizer_code(source):
        if (folder / file.name).exists():
            raise ModelError(
                f"{source}: the tokenizer's {file.name} has the name of a file that comes with the model. Rename it."
            )
        shutil.copyfile(file, folder / file.name)


def tokenizer_code(source: Path) -> list[Path]:
    """The files with a tokenizer's own classes, and what they import; those of another repository are found there."""
    named = mapping_in(source / "tokenizer_config.json").get("auto_map") or {}
    classes = named.get("AutoTokenizer") if isinstance(named, dict) else named
    references = [classes] if isinstance(classes, str) else list(classes or ())
    own = {str(name).rpartition(".")[0] for name in references if name is not None and "--" not in str(name)}
    files: set[Path] = set()
    for file in sorted(source / f"{module}.py" for module in own):
        if not file.is_file():
            raise ModelError(f"{source}: its tokenizer has code of its own in {file.name}, which is not there.")
        files |= {file, *map(Path, get_relative_import_files(file))}
    return sorted(files)


def require_tokenizer_fits(source: Path, vocab_size: int | None) -> list[str]:
    """
    Compare the tokenizer's files, as far as they are there, with the size of the model's vocabulary, if it is said.

    Returns:
        What is to be said of added tokens, like one for padding, that the model has no embedding for.

    Raises:
        ModelError: the vocabulary itself is larger, or a file is damaged.
    """
    state, words, more = (mapping_in(source / name) for name in ("tokenizer.json", "vocab.json", "added_tokens.json"))
    model = state.get("model")
    vocab = (model.get("vocab") if isinstance(model, dict) else None) or words
    ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    largest = max((number for number in ids if isinstance(number, int)), default=-1)
    if vocab_size is None:
        return []
    if largest >= vocab_size:
        raise ModelError(
            f"{source}: its tokenizer has ids up to {largest}, and the model a vocabulary of {vocab_size}. It is that "
            "of another model: give each its own."
        )
    of_state = [(t.get("content"), t.get("id")) for t in state.get("added_tokens") or () if isinstance(t, dict)]
    added: dict[Any, Any] = more | dict(of_state)
    beyond = [str(token) for token, number in added.items() if isinstance(number, int) and number >= vocab_size]
    if not beyond:
        return []
    return [f"The tokenizer has tokens beyond the model's vocabulary of {vocab_size}: {listed(beyond)}."]
