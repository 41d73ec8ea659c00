"""Images with labels: scikit-learn's digits, a folder of images, or a dataset on the Hub.

They are decoded once, to one size, and kept as bytes in a memory-mapped file that several processes can share.
Training and validation are told apart by the hash of an image, so one that occurs twice never stands on both sides.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, load_dataset
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetNotFoundError
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..errors import DataError, listed
from ..files import atomic_folder, content_key, file_hash, write_json
from ..loading import is_hub_name, reason
from .arguments import DIGITS, DataArguments
from .corpus import place
from .windows import cache_folder, damaged, evenly

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
MEAN = STD = 0.5
"""Of every channel: bytes become numbers from -1 to 1, as ViT reads them."""

Labelled = tuple[Any, str]
"""An image, or where it lies, and the name of its label."""


class ImageExamples(Dataset):
    """
    Images as `pixel_values` [C, H, W] in -1 to 1, with `labels`.

    Args:
        folder: holds `pixels.bin`, `labels.bin` and `meta.json`, as `build_images` writes them.
        chosen: numbers of the images that count; all of them by default.
    """

    def __init__(self, folder: Path, chosen: np.ndarray | None = None):
        self.meta = json.loads((folder / "meta.json").read_text())
        shape = (self.meta["windows"], *self.meta["shape"])
        self.pixels = np.memmap(folder / "pixels.bin", dtype=np.uint8, mode="r", shape=shape)
        self.labels = np.fromfile(folder / "labels.bin", dtype=np.int64)
        self.chosen = np.arange(len(self.labels)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        where = self.chosen[indices]
        pixels = (torch.from_numpy(self.pixels[where]).float() / 255 - MEAN) / STD
        return [
            {"pixel_values": x, "labels": y} for x, y in zip(pixels, torch.from_numpy(self.labels[where]), strict=True)
        ]

    def part(self, chosen: np.ndarray, name: str) -> "ImageExamples":
        """Some of the images, with a hash of their own."""
        found = object.__new__(ImageExamples)
        vars(found).update(vars(self), chosen=chosen)
        digest = hashlib.sha256(self.pixels[chosen].tobytes() + self.labels[chosen].tobytes()).hexdigest()
        found.meta = self.meta | {"sha256": digest, "windows": len(chosen), "documents": len(chosen), "part": name}
        return found


def load_images(args: DataArguments) -> tuple[ImageExamples, ImageExamples]:
    """
    Images to train on and images to validate on.

    Raises:
        DataError: nothing was found, an image that cannot be read, or other labels on one side than on the other.
    """
    whole = build_images(args.data, args, args.max_documents)
    if args.validation_data is not None:
        validation = build_images(args.validation_data, args, args.max_validation_documents)
        if unknown := sorted(set(validation.meta["labels"]) - set(whole.meta["labels"])):
            raise DataError(f"{args.validation_data!r} has labels that {args.data!r} does not have: {listed(unknown)}.")
        names = {name: number for number, name in enumerate(whole.meta["labels"])}
        validation.labels = np.array([names[name] for name in validation.meta["labels"]])[validation.labels]
        train = whole
    else:
        held_out = np.array([place_of(image) < args.validation_fraction for image in whole.pixels])
        if held_out.all() or not held_out.any():
            raise DataError(
                f"validation_fraction={args.validation_fraction} holds out {int(held_out.sum())} of the {len(whole)} "
                f"images of {args.data!r}. Give more images, or validation_data."
            )
        train = whole.part(np.flatnonzero(~held_out), "train")
        validation = whole.part(np.flatnonzero(held_out), "validation")
    validation.chosen = validation.chosen[evenly(len(validation), args.max_validation_windows)]
    return train, validation


def place_of(image: np.ndarray) -> float:
    """Where the hash of an image lies between 0 and 1; it is held out below the fraction that is."""
    return place(hashlib.sha256(image.tobytes()).hexdigest())


def build_images(data: str, args: DataArguments, limit: int | None) -> ImageExamples:
    """Decode all images of a set into a folder of the cache; found again when nothing changed."""
    source, key = images_of(data, args)
    folder = cache_folder(args) / "images" / content_key(key, args.image_size, limit)
    if not folder.exists():
        with atomic_folder(folder) as partial:
            write_images(data, source, args.image_size, limit, partial)
    found = ImageExamples(folder)
    if file_hash(folder / "pixels.bin") != found.meta["sha256"]:
        raise DataError(damaged(folder, "the hash of pixels.bin is another one than meta.json says"))
    return found


def images_of(data: str, args: DataArguments) -> tuple[Iterator[Labelled], str]:
    """Every image with the name of its label, and a key that changes whenever they do."""
    path = Path(data).expanduser()
    if data == DIGITS:
        return digits(), DIGITS
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if lone := [file.name for file in files if file.parent == path]:
            raise DataError(f"{data!r}: the label of an image is its folder. Not in one: {listed(lone)}.")
        marks = [(file.relative_to(path).as_posix(), (s := file.stat()).st_size, s.st_mtime_ns) for file in files]
        return ((file, file.parent.name) for file in files), content_key(str(path.resolve()), marks)
    return hub_images(data)


def digits() -> Iterator[Labelled]:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, one channel."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(f"The images {DIGITS!r} come with scikit-learn: pip install scikit-learn.") from error
    found = load_digits()
    pixels = np.round(found.images * (255 / 16)).astype(np.uint8)
    return ((image, str(label)) for image, label in zip(pixels, found.target, strict=True))


def hub_images(data: str) -> tuple[Iterator[Labelled], str]:
    """A dataset on the Hub with a column of images and one of labels."""
    name, _, split = data.partition(":")
    if not is_hub_name(name):
        raise DataError(
            f"{data!r}: no such folder. Give {DIGITS!r}, a folder with a folder of images for each label, or the name "
            "of a dataset on the Hub, as owner/name or name:split."
        )
    try:
        rows = load_dataset(name, split=split or "train")
    except (DatasetNotFoundError, ConnectionError, OSError, ValueError) as error:
        raise DataError(f"{data!r} is no folder, and cannot be read from the Hub: {reason(error)}") from error
    images, classes = (
        [name for name, feature in rows.features.items() if isinstance(feature, kind)]
        for kind in (ImageFeature, ClassLabel)
    )
    if len(images) != 1 or len(classes) != 1:
        raise DataError(f"{data!r} needs one column of images and one of class labels; it has {rows.features}.")
    image, label = images[0], classes[0]
    names = rows.features[label].names
    return ((row[image], names[row[label]]) for row in rows if row[label] >= 0), content_key(rows._fingerprint)


def write_images(data: str, source: Iterator[Labelled], size: int | None, limit: int | None, folder: Path) -> None:
    """`pixels.bin`, `labels.bin` and `meta.json`; one channel where all images are grey, else three."""
    labels: list[str] = []
    shapes, grey = set(), True
    with open(folder / "pixels.bin", "wb") as file:
        for image, label in tqdm(itertools.islice(source, limit), desc="images", unit="", leave=False):
            pixels = decoded(image, size)  # C H W
            shapes.add(pixels.shape[1:])
            grey = grey and len(pixels) == 1
            file.write(np.broadcast_to(pixels, (3, *pixels.shape[1:])).tobytes())
            labels.append(label)
    if not labels:
        raise DataError(f"{data!r} holds no images. Suffixes that are read: {', '.join(sorted(SUFFIXES))}.")
    if len(shapes) > 1:
        raise DataError(f"The images of {data!r} have {len(shapes)} sizes. Bring them to one: --image-size.")
    shape = (3, *shapes.pop())
    if grey:
        whole = np.fromfile(folder / "pixels.bin", dtype=np.uint8).reshape(-1, *shape)
        whole[:, 0].tofile(folder / "pixels.bin")
        shape = (1, *shape[1:])
    names = sorted(set(labels))
    np.array([names.index(label) for label in labels], dtype=np.int64).tofile(folder / "labels.bin")
    digest = file_hash(folder / "pixels.bin")
    meta = {
        "sha256": digest,
        "corpus": data,
        "corpus_sha256": hashlib.sha256("\n".join([digest, *labels]).encode()).hexdigest(),
        "documents": len(labels),
        "windows": len(labels),
        "shape": list(shape),
        "labels": names,
    }
    write_json(folder / "meta.json", meta)


def decoded(image: Any, size: int | None) -> np.ndarray:
    """The bytes [1 or 3, H, W] of an array, a file or a picture, brought to `size` x `size` if one is given."""
    from PIL import Image, UnidentifiedImageError

    try:
        picture = Image.open(image) if isinstance(image, Path) else image
        if isinstance(picture, np.ndarray):
            picture = Image.fromarray(picture)
        picture = picture.convert("L" if picture.mode in ("1", "L", "I;16") else "RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{image} cannot be read as an image: {error}.") from error
    if size is not None and picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(picture).reshape(picture.height, picture.width, -1).transpose(2, 0, 1)
