"""Configurations, tokenizers and models as transformers reads them, from a folder or the Hub.

What is wrong with a checkpoint is a ModelError that names it. Code that comes with one runs only when asked for.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .errors import LNFreeError, ModelError, SettingsError, listed
from .files import read_json

logger = logging.getLogger(__name__)

# What transformers raises for the files of a checkpoint: its configuration, then its weights.
FILE_ERRORS = (ValueError, OSError, StrictDataclassError, SafetensorError, UnpicklingError, EOFError)
TORCH_ERRORS = {
    "PytorchStreamReader": "its pytorch_model.bin is damaged. Copy or download it again.",
    "ignore_mismatched_sizes": "its weights have other shapes than its configuration says.",
}
FIXED_DEVIATION = "average_std_buffer"
"""What norms have in training checkpoints of published removals; `conversion.published_removal` reads them."""
SETTINGS_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
LONGEST_REASON = 1000  # characters; transformers may list all of its classes


def load_config(
    name: str | PathLike[str], *, trust_remote_code: bool = False, revision: str | None = None, **overrides: Any
) -> PreTrainedConfig:
    """
    The configuration of a checkpoint, with some of its fields replaced.

    Raises:
        ModelError: there is no such checkpoint, or its configuration cannot be read.
        SettingsError: `overrides` holds something that is no field of it.
    """
    place = find(name)
    with reading(name):
        config, unused = AutoConfig.from_pretrained(
            place, trust_remote_code=trust_remote_code, revision=revision, return_unused_kwargs=True, **overrides
        )
    if unused:
        raise SettingsError(f"The configuration of {name} ({type(config).__name__}) has no {listed(list(unused))}.")
    return config


def load_tokenizer(
    name: str | PathLike[str], *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a checkpoint.

    Raises:
        ModelError: there is none, or its files cannot be read.
    """
    place = find(name)
    with reading(name, "its tokenizer ", Exception):  # the tokenizers library has no class of its own
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, revision=revision)
    if not isinstance(tokenizer.model_max_length, (int, float)):
        raise ModelError(
            f"{name}: its tokenizer has model_max_length={tokenizer.model_max_length!r}, which is no number."
        )
    return tokenizer


def load_model(
    name: str | PathLike[str],
    auto_class: Any = AutoModelForCausalLM,
    *,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    changed: bool = False,
    new_shapes: Sequence[str] = (),
    **options: Any,
) -> PreTrainedModel:
    """
    The model of a checkpoint.

    Args:
        auto_class: one of transformers' Auto classes, or the class of a model.
        device: where its weights go, straight from their files; the CPU by default.
        changed: whether its configuration was changed on purpose, so that tensors may be new or left over.
        new_shapes: parts of it that begin anew where they have another shape, like a head for other classes.
        options: further ones of `from_pretrained`.

    Raises:
        ModelError: there is no such checkpoint, another kind of model, a damaged file, or tensors that are missing,
            unknown, of another shape or not finite: such a model would compute something else than it was trained to.
    """
    place = find(name)
    require_own_files(Path(place))
    if issubclass(auto_class, PreTrainedModel):
        assert not trust_remote_code, "a class that is given needs no other"
    else:
        options["trust_remote_code"] = trust_remote_code
    if device is not None:
        options["device_map"] = str(device)
    with reading(name):
        model, found = auto_class.from_pretrained(
            place, revision=revision, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    if wrong := sorted(entry for entry in found["mismatched_keys"] if entry[0].split(".")[0] not in new_shapes):
        shapes = [
            f"{key} is {list(one)} in its weights and {list(other)} by its configuration" for key, one, other in wrong
        ]
        raise ModelError(f"{name} cannot be loaded: {listed(shapes)}.")
    if changed:
        tell_changes(name, found)
        found = {"missing_keys": (), "unexpected_keys": ()}
    require_whole(name, model, found, backbone=auto_class is AutoModel)
    return model


def require_whole(name: str | PathLike[str], model: PreTrainedModel, found: dict[str, Any], backbone: bool) -> None:
    """
    Args:
        found: what transformers tells of the tensors.
        backbone: whether the model is loaded without the head that the checkpoint may have; a head's tensors are left
            over then, and a pooler may be new.

    Raises:
        ModelError: tensors that are missing, unknown or not finite.
    """
    missing, unknown = set(found["missing_keys"]), set(found["unexpected_keys"])
    if backbone:
        own = {child for child, _ in model.named_children()} | {model.base_model_prefix}
        unknown = {key for key in unknown if key.split(".")[0] in own}
        missing = {key for key in missing if "pooler" not in key.split(".")}
    spoilt = {
        key for key, p in model.named_parameters() if not p.is_meta and p.is_floating_point() and not all_finite(p)
    }
    for keys, what in ((missing, "has no"), (unknown, "has unknown"), (spoilt, "has NaN or infinities in")):
        if any(key.endswith(FIXED_DEVIATION) for key in keys):
            raise ModelError(
                f"{name} is a training checkpoint of a removal of LayerNorms (arXiv 2507.02559): `hf-lnfree convert` "
                "reads it once the removal is finished. Load what that writes."
            )
        if keys:
            raise ModelError(
                f"{name} cannot be used: it {what} {listed(sorted(keys))}. Its weights do not fit its configuration, "
                "or are damaged."
            )


def tell_changes(name: str | PathLike[str], found: dict[str, Any]) -> None:
    """Log which tensors a changed configuration begins anew, and which it leaves out."""
    for keys, what in ((found["missing_keys"], "begin anew"), (found["unexpected_keys"], "are left out")):
        if keys:
            logger.info("%d tensors of %s %s: %s.", len(keys), name, what, listed(sorted(keys)))


def all_finite(parameter: torch.Tensor) -> bool:
    """Without a mask of the size of the parameter: a sum is finite unless an entry is not, or it overflows."""
    total = parameter.detach().sum(dtype=torch.float64 if parameter.device.type != "mps" else torch.float32)
    return bool(total.isfinite()) or bool(parameter.detach().isfinite().all())


def require_mappings(folder: Path) -> None:
    """Raise ModelError for a file of settings in which there is no JSON mapping: transformers takes it for one."""
    for path in (folder / name for name in SETTINGS_FILES):
        mapping_in(path)


def mapping_in(path: Path) -> dict[str, Any]:
    """
    What a JSON file of a checkpoint holds; nothing where there is none.

    Raises:
        ModelError: it is damaged.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is damaged: {error}. Copy or download it again.") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} is damaged: it holds no mapping. Copy or download it again.")
    return found


def require_own_files(folder: Path) -> None:
    """Raise ModelError for an index of shards that names files elsewhere, or that are not there."""
    for index in sorted(folder.glob("*.index.json")):
        for name in shards_of(index):
            if not (folder / name).is_file():
                raise ModelError(f"{index} names {name!r}, which is no file of its folder.")


def shards_of(index: Path) -> list[str]:
    """The files that an index names; ModelError for one that is none, or names files elsewhere."""
    found = read_json(index)
    names = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(names, dict):
        raise ModelError(f"{index} is no index of shards: it has no weight_map.")
    shards = sorted(set(map(str, names.values())))
    for name in shards:
        if Path(name).name != name:
            raise ModelError(f"{index} names {name!r}, which is no file of its folder.")
    return shards


def find(name: str | PathLike[str]) -> str:
    """
    A folder, or a name to be looked up on the Hub, as transformers takes it.

    Raises:
        ModelError: a path where there is no folder, one whose settings are damaged, or the folder of an unfinished run.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        require_mappings(path)
        checkpoints = sorted(path.glob("checkpoint-*"), key=lambda folder: (len(folder.name), folder.name))
        if checkpoints and not any((path / file).exists() for file in SETTINGS_FILES):
            raise ModelError(f"{name} holds no model yet, but checkpoints of one. The latest: {checkpoints[-1]}.")
        return str(path)
    if path.exists():
        raise ModelError(
            f"{name} is a file: give the folder of a checkpoint, or a Hub name, which looks like owner/name."
        )
    if not is_hub_name(str(name)):
        raise ModelError(f"{name}: no such file or folder; a Hub name looks like owner/name.")
    return str(name)


def is_hub_name(name: str) -> bool:
    """Whether the Hub could have something of that name; anything else is a path."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def find_device(name: str | None = None) -> torch.device:
    """
    The device of that name; without a name the accelerator, or the CPU where there is none.

    Raises:
        SettingsError: torch does not know it, or this machine does not have it.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    there = ["cpu"]
    if accelerator is not None:
        there += [accelerator.type, *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()))]
    if name is None:
        return torch.device((there[1:] or there)[0])
    if name not in there:
        raise SettingsError(f"There is no device {name!r} here. Allowed: {', '.join(there)}.")
    return torch.device(name)


@contextmanager
def reading(name: str | PathLike[str], part: str = "", *errors: type[Exception]) -> Iterator[None]:
    """What the files of a checkpoint raise inside, as a ModelError that names it; defects stay what they are."""
    expected: tuple[type[Exception], ...] = (*FILE_ERRORS, *errors)
    try:
        yield
    except LNFreeError:
        raise
    except SafetensorError as error:
        raise ModelError(f"{damaged_file(name)} is damaged ({error}). Copy or download it again.") from error
    except expected as error:
        raise ModelError(f"{name}: {part}cannot be loaded: {reason(error)}") from error
    except RuntimeError as error:
        for words, meaning in TORCH_ERRORS.items():
            if words in str(error):
                raise ModelError(f"{name} cannot be loaded: {meaning}") from error
        raise


def damaged_file(name: str | PathLike[str]) -> str:
    """The file of a folder that safetensors cannot open."""
    for path in sorted(Path(name).expanduser().glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError:
            return str(path)
    return f"A file of {name}"


def reason(error: Exception) -> str:
    """In one line: all of a message, or its first sentences."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "trust_remote_code" in text:
        return "it comes with code of its own, which runs only with --trust-remote-code (trust_remote_code=True)."
    if len(text) <= LONGEST_REASON:
        return text
    end = text.rfind(". ", 0, LONGEST_REASON)
    return text[: end + 1] if end > 0 else f"{text[:LONGEST_REASON]} ..."
