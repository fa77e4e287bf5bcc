"""Images for a probe: which of them, split into training, validation and test, with their classes and attributes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dataset.attributes import TEST, TRAIN, VALIDATION, attributes_kind, read_attributes, split_at_random
from dataset.images import ImageDataset, open_images
from dataset.shards import PackedReader
from dataset.verification import verify
from errors import UserError

VALIDATION_SHARE = 0.1  # of the training images, where a test set is given
PARTS = {"train": TRAIN, "validation": VALIDATION, "test": TEST}


class JoinedImages:
    """Two image datasets of one resolution and the same classes, one after the other."""

    def __init__(self, first: ImageDataset, second: ImageDataset) -> None:
        self._parts, self._border = (first, second), len(first)
        self.resolution, self.class_names = first.resolution, first.class_names
        self.labels = np.concatenate([first.labels, second.labels])
        self.shard_counts = [*first.shard_counts, *second.shard_counts]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, item: int) -> str:
        return self._parts[item >= self._border].name(item - self._border * (item >= self._border))

    @property
    def readers(self) -> list[PackedReader]:
        return [reader for part in self._parts for reader in part.readers]

    def fingerprint(self) -> str:
        return "+".join(part.fingerprint() for part in self._parts)

    def read_into(self, items: Sequence[int] | np.ndarray, out: np.ndarray) -> None:
        items = np.asarray(items)
        for item, pixels in zip(items, out, strict=True):
            second = int(item >= self._border)
            self._parts[second].read_into([int(item) - second * self._border], pixels[None])


@dataclass(frozen=True)
class ProbeData:
    """What is probed.

    Attributes:
        images: of which ``items`` are used.
        items: int64 ``[N]``.
        split: int8 ``[N]``, TRAIN, VALIDATION or TEST.
        labels: classes, int64 ``[N]``.
        attributes: bool ``[N, A]``; None where there are none.
        attribute_names: A of them.
        kind: of the attributes (``dataset.attributes.READERS``); None without.
        splits_as_given: whether the test set is the data set's own.
    """

    images: ImageDataset
    items: np.ndarray
    split: np.ndarray
    labels: np.ndarray
    attributes: np.ndarray | None
    attribute_names: list[str]
    kind: str | None
    splits_as_given: bool

    def part(self, code: int) -> np.ndarray:
        """Places 0…N − 1 of the images of one part of the split."""
        return np.flatnonzero(self.split == code)

    def counts(self) -> dict[str, int]:
        return {name: int((self.split == code).sum()) for name, code in PARTS.items()}


def open_probe_data(
    path: str,
    resolution: int | None,
    *,
    default: int,
    val_path: str | None = None,
    kind: str = "auto",
    needs_attributes: bool = False,
    max_images: int | None = None,
    seed: int = 0,
) -> ProbeData:
    """Open a data set with its classes and, where it has some, its attributes.

    Args:
        path: photographs next to annotation files (``dataset.attributes``), or any images.
        resolution: side in pixels; a packed dataset has its own.
        default: of photographs, where no resolution is asked for.
        val_path: images to test on; else a part of ``path``, the data set's own or a random one.
        kind: of the attributes, ``auto`` to find out.
        needs_attributes: whether it is an error to find none.
        max_images: evenly spread over the set.
        seed: of a random split, and of a validation set where the data's own split has none.

    Raises:
        UserError: nothing usable there, or a part of the split is empty.
    """
    table = None
    if needs_attributes or kind != "auto" or attributes_kind(path):
        table = read_attributes(path, kind)
    if table is not None and val_path is not None and needs_attributes:
        raise UserError("--val-data has no attributes of its own: leave it out, --data is split")
    images = table.images(resolution or default) if table else open_images(path, resolution, default=default)
    given = None if table is None else table.split
    split = split_at_random(len(images), seed) if given is None else given
    if not (split == VALIDATION).any():  # the authors' split knows training and test alone
        split = _with_validation(split, seed)
    attributes = None if table is None else table.values
    if val_path is not None:
        images, split = _with_test_set(images, val_path, seed)
        attributes = None
    count = min(max_images or len(images), len(images))
    items = np.linspace(0, len(images) - 1, count).round().astype(np.int64)
    data = ProbeData(
        images,
        items,
        split[items],
        images.labels[items],
        None if attributes is None else attributes[items],
        [] if attributes is None else table.names,
        None if attributes is None else table.kind,
        val_path is not None or given is not None,
    )
    for name, found in data.counts().items():
        if not found:
            do = "raise --max-images" if max_images else "give more images"
            do = "complete its split" if given is not None and not (given == PARTS[name]).any() else do
            raise UserError(f"{path}: none of {count} images is for {name}; {do}")
    verify([images])
    return data


def _with_test_set(images: ImageDataset, path: str, seed: int) -> tuple[JoinedImages, np.ndarray]:
    test = open_images(path, None, default=images.resolution)
    if test.resolution != images.resolution or test.class_names != images.class_names:
        raise UserError(
            f"--val-data {path} has {len(test.class_names)} classes at {test.resolution} px, --data "
            f"{len(images.class_names)} at {images.resolution} px; both must have the same classes and resolution"
        )
    split = np.repeat(np.array([TRAIN, TEST], np.int8), [len(images), len(test)])
    return JoinedImages(images, test), _with_validation(split, seed)


def _with_validation(split: np.ndarray, seed: int) -> np.ndarray:
    """A share of the training images, drawn by the seed, becomes the validation set: the test set stays unseen."""
    train = np.flatnonzero(split == TRAIN)
    order = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, len(train)]))).permutation(len(train))
    split = split.copy()
    split[train[order[: max(1, int(VALIDATION_SHARE * len(train)))]]] = VALIDATION
    return split
