"""Checkpoints of transformers, read a shard at a time, so that memory holds one of them."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from ..errors import listed
from ..loading import find, reading, shards_of
from .beside import BESIDE, CODE


class Checkpoint:
    """
    The weights of a folder or a Hub repository, of which one shard at a time is read.

    Args:
        source: a folder, or the name of a repository.
        revision: of the repository.

    Raises:
        ModelError: there is no such folder or repository, or its configuration cannot be read.
        OSError: no configuration or no weights there, a shard that the index names and that is missing or damaged.
    """

    def __init__(self, source: str | Path, revision: str | None = None):
        self.source = str(source)
        weights = ("*.safetensors", "*.safetensors.index.json")
        folder = Path(find(source))
        if not folder.is_dir():
            patterns = ["config.json", *weights, *BESIDE, CODE]
            with reading(source):
                folder = Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
                if not any(folder.glob("*.safetensors")):
                    snapshot_download(str(source), revision=revision, allow_patterns=["pytorch_model*"])
        self.folder = folder
        if not (folder / "config.json").is_file():
            adapter = (folder / "adapter_config.json").is_file()
            hint = " It holds an adapter: merge it into its model and save that." if adapter else ""
            raise OSError(f"{source} holds no config.json: it is no checkpoint of transformers.{hint}")
        with reading(source, "its config.json "):
            self.config: dict[str, Any] = dict(json.loads((folder / "config.json").read_text()))
        self.files = self._files()

    def _files(self) -> list[str]:
        for index, single in ((SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME), (WEIGHTS_INDEX_NAME, WEIGHTS_NAME)):
            if (self.folder / index).is_file():
                names = shards_of(self.folder / index)
                if missing := [name for name in names if not (self.folder / name).is_file()]:
                    raise OSError(f"{self.source}: {index} names shards that are not there: {listed(missing)}.")
                return names
            if (self.folder / single).is_file():
                return [single]
        raise OSError(f"{self.source} holds no weights: no {SAFE_WEIGHTS_NAME}, no {WEIGHTS_NAME}, no index of shards.")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor; with safetensors only the headers are read."""
        return {name: shape for name, (_, shape) in self._places.items()}

    @functools.cached_property
    def _places(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name of a tensor -> its file and its shape."""
        return {name: (file, shape) for file in self.files for name, shape in self._shapes(file)}

    def _shapes(self, file: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        if not file.endswith(".safetensors"):
            yield from ((name, tuple(tensor.shape)) for name, tensor in self.shard(file).items())
            return
        with self.opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                yield name, tuple(tensors.get_slice(name).get_shape())

    def opened(self, file: str) -> Any:
        """A safetensors file, open; OSError if it is damaged."""
        try:
            return safe_open(self.folder / file, framework="pt")
        except SafetensorError as error:
            raise OSError(f"{self.folder / file} is damaged ({error}). Copy or download it again.") from error

    def shard(self, file: str) -> dict[str, Tensor]:
        """Every tensor of one file, by its name there."""
        if file.endswith(".safetensors"):
            with self.opened(file) as tensors:
                return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        with reading(self.source):
            return torch.load(self.folder / file, map_location="cpu", weights_only=True, mmap=True)

    def tensor(self, name: str) -> Tensor:
        """One tensor by its name in the files."""
        file, _ = self._places[name]
        if not file.endswith(".safetensors"):
            return self.shard(file)[name]
        with self.opened(file) as tensors:
            return tensors.get_tensor(name)
