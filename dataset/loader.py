"""What feeds a training step: threads that read ahead, straight into the (pinned) tensors that the step is given.

Threads and not processes: positioned reads and Pillow release the GIL, nothing is forked once CUDA runs, and no pixel
passes through a pipe.
"""

import hashlib
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset.images import ImageDataset
from dataset.latents import available_memory, cache_files, missing_part
from dataset.order import SampleOrder
from dataset.shards import INDEX_NAME, PackedReader, read_index
from errors import UserError
from files import checksum, remove_leftovers, whole_file


class BatchSource(Protocol):
    """What batches are made of: a few arrays for each item. ``dataset.latents.LatentDataset`` is one."""

    has_flipped: bool

    @property
    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of each array of an item."""

    def read_arrays(self, items: np.ndarray, flips: np.ndarray | None, out: Mapping[str, np.ndarray]) -> None:
        """Read n items into the arrays ``[n, …]`` that are there, those in ``flips`` mirrored.

        Several threads may call it at once.
        """

    def batch(self, tensors: Mapping[str, Tensor]) -> Any:
        """What is handed out for a (micro-)batch of such arrays."""


class ImageSource:
    """A :class:`BatchSource` of images alone: a batch is a uint8 tensor ``[n, 3, H, W]``."""

    has_flipped = True

    def __init__(self, dataset: ImageDataset) -> None:
        self._dataset = dataset

    @property
    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"images": ((3, self._dataset.resolution, self._dataset.resolution), torch.uint8)}

    def read_arrays(self, items: np.ndarray, flips: np.ndarray | None, out: Mapping[str, np.ndarray]) -> None:
        pixels = out["images"]
        self._dataset.read_into(items, pixels)
        if flips is not None:
            pixels[flips] = pixels[flips, :, :, ::-1]

    def batch(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["images"]


class ImageBatch(NamedTuple):
    """uint8 ``images`` ``[n, 3, H, W]`` and their classes ``labels``, int64 ``[n]``.

    ``features`` are VFMs' of the images where they came with them (``dataset.latents.LatentBatch``), else None.
    """

    images: Tensor
    labels: Tensor
    features: tuple[Tensor, ...] | None = None


class LabelledImages(ImageSource):
    """A :class:`BatchSource` of images with their classes: a batch is an :class:`ImageBatch`."""

    def __init__(self, dataset: ImageDataset) -> None:
        super().__init__(dataset)
        self.labels = dataset.labels

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return super().layout | {"labels": ((), torch.int64)}

    def read_arrays(self, items: np.ndarray, flips: np.ndarray | None, out: Mapping[str, np.ndarray]) -> None:
        super().read_arrays(items, flips, out)
        out["labels"][:] = self.labels[items]

    def batch(self, tensors: Mapping[str, Tensor]) -> ImageBatch:
        return ImageBatch(tensors["images"], tensors["labels"])


class BatchLoader:
    """This rank's part of every global batch from ``start_step`` on, forever.

    Global batch ``k`` is ``order.indices(k * batch_size, batch_size)``; rank ``r`` takes the ``r``-th of ``world_size``
    equal parts and splits it into ``accumulation`` micro-batches. What comes out depends on nothing else, neither on
    the number of workers nor on how far they read ahead.

    ``next(loader)`` gives a list of ``accumulation`` micro-batches of ``b = batch_size / world_size / accumulation``
    items: uint8 tensors ``[b, 3, H, W]``, 0…255, for images, a ``LatentBatch`` for latents. An error of a worker is
    raised there.

    Args:
        dataset: the images or latents.
        order: the stream that the batches are cut from.
        batch_size: images in a global batch, over all ranks and micro-batches.
        rank: of this process.
        world_size: number of processes.
        accumulation: micro-batches in a step.
        start_step: the first ``k``.
        num_workers: threads; 0 reads in the caller's.
        prefetch: batches read ahead.
        pin_memory: page-locked tensors, for ``to(device, non_blocking=True)``.
        hflip: mirror half of the items, by a coin per (seed, epoch, item).
        unread: arrays of the dataset's layout that batch ``k`` does without.

    Attributes:
        step: the ``k`` of the next batch.
        wait_seconds: time that the caller has spent waiting for batches.

    Raises:
        UserError: the batch cannot be split evenly, or the latents have no mirrored copy.
    """

    def __init__(
        self,
        dataset: ImageDataset | BatchSource,
        order: SampleOrder,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        start_step: int = 0,
        num_workers: int = 4,
        prefetch: int = 2,
        pin_memory: bool = False,
        hflip: bool = False,
        unread: Callable[[int], Collection[str]] = lambda step: (),
    ) -> None:
        if batch_size < 1 or batch_size % (world_size * accumulation):
            raise UserError(
                f"batch size {batch_size} cannot be split over {world_size} processes x {accumulation} accumulation "
                f"steps; take a multiple of {world_size * accumulation}"
            )
        self.step = start_step
        self.wait_seconds = 0.0
        self._order = order
        self._batch_size = batch_size
        self._local_size = batch_size // world_size
        self._rank = rank
        self._accumulation = accumulation
        self._hflip = hflip
        self._unread = unread
        self._source = _as_source(dataset)
        if hflip and not self._source.has_flipped:
            raise UserError("--hflip needs the latents' mirrored copy: run cache_latents.py again with --hflip")
        self._prefetch = prefetch if num_workers else 0
        self._check_memory()
        self._reader = _BatchReader(self._source, num_workers, pin_memory)
        self._ahead: deque[_PendingBatch] = deque()

    def __iter__(self) -> "BatchLoader":
        return self

    def __next__(self) -> list:
        begin = time.perf_counter()
        while len(self._ahead) <= self._prefetch:
            self._ahead.append(self._start(self.step + len(self._ahead)))
        tensors = self._ahead.popleft().result()
        self.wait_seconds += time.perf_counter() - begin
        self.step += 1
        parts = zip(*(tensor.chunk(self._accumulation) for tensor in tensors.values()), strict=True)
        return [self._source.batch(dict(zip(tensors, part, strict=True))) for part in parts]

    def close(self) -> None:
        """Stop reading ahead; waits for the reads in progress."""
        self._ahead.clear()
        self._reader.close()

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _check_memory(self) -> None:
        """What is read ahead must fit: a slip of the finger would else fill the machine, slowly."""
        item = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self._source.layout.values())
        needed, available = item * self._local_size * (self._prefetch + 1), available_memory()
        if needed > available:
            raise UserError(
                f"batches of {self._local_size} items a process, {self._prefetch + 1} of them read ahead, need "
                f"{needed / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are available: take a smaller "
                "--batch-size or --prefetch"
            )

    def _start(self, step: int) -> "_PendingBatch":
        first = step * self._batch_size + self._rank * self._local_size
        flips = self._order.flips(first, self._local_size) if self._hflip else None
        return self._reader.start(self._order.indices(first, self._local_size), flips, self._unread(step))


def sequential_batches(
    dataset: ImageDataset | BatchSource,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
    flips: np.ndarray | None = None,
) -> Iterator[tuple[np.ndarray, Any]]:
    """Go once over a dataset, for validation: rank ``r`` gets items ``r, r + world_size, …``.

    Args:
        dataset: the images or latents.
        batch_size: items in a batch of this rank; the last may be shorter.
        rank: of this process.
        world_size: number of processes.
        num_workers: threads that read one batch ahead; 0 reads in the caller's.
        pin_memory: page-locked tensors.
        flips: bool ``[N]``, which items to mirror, e.g. of ``dataset.order.flip_mask``.

    Yields:
        item numbers int64 ``[n]`` and images uint8 ``[n, 3, H, W]``, 0…255, or a ``LatentBatch``.
    """
    items = np.arange(rank, len(dataset), world_size, dtype=np.int64)
    batches = [items[first : first + batch_size] for first in range(0, len(items), batch_size)]
    read = read_batches(dataset, batches, num_workers=num_workers, pin_memory=pin_memory, flips=flips)
    yield from zip(batches, read, strict=True)


def read_batches(
    dataset: ImageDataset | BatchSource,
    batches: Sequence[np.ndarray],
    *,
    num_workers: int = 0,
    prefetch: int = 1,
    pin_memory: bool = False,
    flips: np.ndarray | None = None,
) -> Iterator[Any]:
    """Read given batches, in order; arguments as of :func:`sequential_batches`, ``prefetch`` batches ahead."""
    source = _as_source(dataset)
    reader = _BatchReader(source, num_workers, pin_memory)
    ahead: deque[_PendingBatch] = deque()
    try:
        for number in range(len(batches)):
            wanted = batches[number + len(ahead) : number + 1 + (prefetch if num_workers else 0)]
            ahead.extend(reader.start(items, None if flips is None else flips[items]) for items in wanted)
            yield source.batch(ahead.popleft().result())
    finally:
        reader.close()


def _as_source(dataset: ImageDataset | BatchSource) -> BatchSource:
    return dataset if hasattr(dataset, "read_arrays") else ImageSource(dataset)


class _PendingBatch:
    def __init__(self, tensors: dict[str, Tensor], parts: list[Future]) -> None:
        self._tensors = tensors
        self._parts = parts

    def result(self) -> dict[str, Tensor]:
        for part in self._parts:
            part.result()
        return self._tensors


class _BatchReader:
    """Reads batches by parts, each in one of its threads, into memory that torch hands out.

    Fresh memory each time: torch keeps pinned blocks and knows when the copy to the device has left them, which a ring
    of our own would not.
    """

    def __init__(self, source: BatchSource, num_workers: int, pin_memory: bool) -> None:
        self._source = source
        self._pin_memory = pin_memory
        self._num_workers = num_workers
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="reader") if num_workers else None

    def start(self, items: np.ndarray, flips: np.ndarray | None, unread: Collection[str] = ()) -> _PendingBatch:
        tensors = {
            name: torch.empty((len(items), *shape), dtype=dtype, pin_memory=self._pin_memory)
            for name, (shape, dtype) in self._source.layout.items()
            if name not in unread
        }
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        if self._pool is None:
            self._source.read_arrays(items, flips, arrays)
            return _PendingBatch(tensors, [])
        # Several parts a thread: photographs differ in size, and a thread that is done takes the next part.
        size = max(4, -(-len(items) // (4 * self._num_workers)))
        parts = [slice(first, first + size) for first in range(0, len(items), size)]
        return _PendingBatch(
            tensors,
            [
                self._pool.submit(
                    self._source.read_arrays,
                    items[part],
                    None if flips is None else flips[part],
                    {name: array[part] for name, array in arrays.items()},
                )
                for part in parts
            ],
        )

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def stage_dataset(
    path: str | os.PathLike, stage_dir: str | os.PathLike, *, kind: str = "images", parts: Sequence[str] | None = None
) -> Path:
    """Copy a packed dataset to a local disk and return where it lies there.

    Files that are there already are not copied again, so an interrupted copy continues. One process a machine calls
    this, the others wait for it and then call it too: for them nothing is left to copy.

    Args:
        path: the dataset.
        stage_dir: folder on the local disk.
        kind: ``"images"``, or ``"latents"`` for a cache, whose VAE and statistics come along.
        parts: of a cache, the sub-folders in use (``dataset.latents.FLIPPED_NAME``, ``features_name(...)``); by default
            all that are complete.

    Raises:
        UserError: no packed dataset, no such part, or not enough space.
    """
    path = Path(path)
    PackedReader(path, kind)  # complete, and of that kind
    folders, others = cache_files(path, parts) if kind == "latents" else (["."], [])
    sizes = {name: (path / name).stat().st_size for name in others}
    digests: dict[str, str] = {}
    version = hashlib.sha256()
    for folder in folders:
        index = read_index(path / folder)
        if index is None:
            raise UserError(missing_part(path, folder))
        files = {
            os.path.normpath(f"{folder}/{name}"): file
            for files in (*(shard["files"] for shard in index["shards"]), index["labels"])
            for name, file in files.items()
        }
        sizes |= {name: file["bytes"] for name, file in files.items()}
        digests |= {name: file["sha256"] for name, file in files.items()}
        index_name = os.path.normpath(f"{folder}/{INDEX_NAME}")  # the last: without it the copy is not a dataset
        sizes[index_name] = (path / index_name).stat().st_size
        version.update((path / folder / INDEX_NAME).read_bytes())
    target = Path(stage_dir) / f"{path.resolve().name}-{version.hexdigest()[:12]}"
    target.mkdir(parents=True, exist_ok=True)
    missing = {name: size for name, size in sizes.items() if not _has_size(target / name, size)}
    _check_space(target, sum(missing.values()))
    with tqdm(total=sum(missing.values()), unit="B", unit_scale=True, desc="staging", disable=not missing) as progress:
        for name, size in missing.items():
            copy = target / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(copy.parent, copy.name)
            with whole_file(copy) as temporary:  # another job may be staging the same
                shutil.copyfile(path / name, temporary)
                if (copied := temporary.stat().st_size) != size:
                    raise UserError(
                        f"{path / name} has {copied} bytes instead of {size}; if it changed while it was copied, run "
                        "the same command again, else make or copy the dataset again"
                    )
                if name in digests and checksum(temporary)["sha256"] != digests[name]:
                    raise UserError(
                        f"{path / name} is damaged (it differs from its checksum): make or copy the dataset again"
                    )
            progress.update(size)
    return target


def _has_size(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size == size


def _check_space(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target).free
    if needed > free:
        raise UserError(
            f"staging needs {needed / 1e9:.1f} GB in {target}, where {free / 1e9:.1f} GB are free; "
            "free some or stage elsewhere"
        )
