"""Images by number, whatever they lie in: a packed dataset, or photographs that are cropped on the fly."""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from dataset.layouts import open_source
from dataset.packing import images_per_shard
from dataset.shards import PackedReader, is_unfinished, read_index
from dataset.sources import Source
from dataset.transforms import BadImageError, decode_png, load_image
from dataset.trees import describe_left_out
from errors import UserError, one_line
from runtime.log import logger

DEFAULT_RESOLUTION = 256  # pixels, of photographs that are cropped on the fly


class ImageDataset(Protocol):
    """Square images with class labels.

    Attributes:
        resolution: side of the images in pixels.
        labels: int64 ``[N]``.
        class_names: label ``c`` means ``class_names[c]``.
        shard_counts: images in each of its shards, or in each of those that what is made from it should have.
    """

    resolution: int
    labels: np.ndarray
    class_names: list[str]
    shard_counts: list[int]

    def __len__(self) -> int: ...

    def name(self, item: int) -> str:
        """What to call an item in a message."""

    def fingerprint(self) -> str:
        """The same for the same images in the same order, on any machine; cheap."""

    @property
    def readers(self) -> list[PackedReader]:
        """Packed files that can be compared with their checksums."""

    def read_into(self, items: Sequence[int] | np.ndarray, out: np.ndarray) -> None:
        """Read n items into ``out``, uint8 ``[n, 3, H, W]``, contiguous. Several threads may call it at once."""


class PackedImages:
    """An :class:`ImageDataset` made by preprocessing.py, of either codec."""

    def __init__(self, path: Path) -> None:
        self._reader = PackedReader(path, kind="images")
        shape, dtype = self._reader.spec.shape, self._reader.spec.dtype
        if len(shape) != 3 or shape[0] != 3 or shape[1] != shape[2] or dtype != "uint8":
            raise UserError(f"{path} says that its images are {shape} of {dtype}: its index is damaged, copy it again")
        self.resolution: int = self._reader.spec.shape[-1]
        self.labels = self._reader.labels
        self.class_names = self._reader.class_names
        self.shard_counts: list[int] = [shard["count"] for shard in self._reader.index["shards"]]

    def __len__(self) -> int:
        return len(self._reader)

    def name(self, item: int) -> str:
        shard, place = self._reader.locate(item)
        return f"{self._reader.spec.file_name(shard)}[{place}]"

    def fingerprint(self) -> str:
        return f"packed:{self._reader.fingerprint()}"

    @property
    def readers(self) -> list[PackedReader]:
        return [self._reader]

    def read_into(self, items: Sequence[int] | np.ndarray, out: np.ndarray) -> None:
        if self._reader.spec.codec == "raw":
            for item, pixels in zip(items, out, strict=True):
                self._reader.read_into(int(item), pixels)
        else:
            for item, pixels in zip(items, out, strict=True):
                encoded = self._reader.read_bytes(int(item))
                try:
                    decode_png(encoded, pixels)
                except (OSError, ValueError, SyntaxError, zlib.error) as error:  # what Pillow says of broken files
                    raise UserError(
                        f"{self._reader.folder}: {self.name(int(item))} is damaged ({one_line(error)}); copy the "
                        "dataset again, or run preprocessing into an empty folder"
                    ) from error


class SourceImages:
    """An :class:`ImageDataset` over photographs as they are, decoded and cropped at each use."""

    def __init__(self, source: Source, resolution: int) -> None:
        self._source = source
        self.resolution = resolution
        self.labels = source.labels
        self.class_names = source.classes
        size = images_per_shard(resolution)
        self.shard_counts = [min(size, len(source) - first) for first in range(0, len(source), size)]

    def __len__(self) -> int:
        return len(self._source)

    def name(self, item: int) -> str:
        return self._source.names[item]

    def fingerprint(self) -> str:
        return f"photographs:{self.resolution}:{self._source.fingerprint()}"

    @property
    def readers(self) -> list[PackedReader]:
        return []

    def read_into(self, items: Sequence[int] | np.ndarray, out: np.ndarray) -> None:
        for item, pixels in zip(items, out, strict=True):
            try:
                pixels[...] = load_image(self._source.read(int(item)), self.resolution)
            except (BadImageError, OSError) as error:
                raise UserError(
                    f"{self._source.path / self.name(int(item))} cannot be used ({error}); remove it, or run "
                    "preprocessing.py, which leaves such files out and lists them"
                ) from error


def open_images(path: str | os.PathLike, resolution: int | None = None, *, default: int | None = None) -> ImageDataset:
    """Open a packed dataset, or photographs in class folders, with a dataset.json or in a zip.

    Args:
        path: the folder or zip.
        resolution: side in pixels; a packed dataset has its own.
        default: of photographs, where no resolution is asked for.

    Raises:
        UserError: nothing usable there, or a packed dataset of another resolution.
    """
    path = Path(path)
    if read_index(path) is not None:
        images = PackedImages(path)
        if resolution not in (None, images.resolution):
            raise UserError(
                f"{path} was packed at {images.resolution} px, but {resolution} px was asked for; "
                f"ask for {images.resolution}, or run preprocessing.py with --resolution {resolution}"
            )
        if not len(images):
            raise UserError(f"{path} holds no images; run preprocessing.py on other photographs")
        return images
    if path.is_dir() and is_unfinished(path):
        raise UserError(f"{path} is not finished; run the same preprocessing.py command again, it continues")
    source = open_source(path)
    if source.kind == "parquet":
        raise UserError(
            f"{path} holds .parquet files, which cannot be read at random; run preprocessing.py on it first"
        )
    for line in describe_left_out(entry for entry in source.left_out if entry.is_image):
        logger.warning("%s: %s", path, line)
    resolution = resolution or default
    if resolution is None:
        raise UserError(f"{path} holds photographs of any size; give the resolution, or run preprocessing.py first")
    return SourceImages(source, resolution)
