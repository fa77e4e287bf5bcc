"""What feeds a training step: threads that read ahead, straight into the (pinned) tensors that the step is given.

Threads and not processes: positioned reads and Pillow release the GIL, nothing is forked once CUDA runs, and no pixel
passes through a pipe.
"""

import hashlib
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset.images import ImageDataset
from dataset.order import SampleOrder
from dataset.shards import INDEX_NAME, PackedReader
from errors import UserError


class BatchLoader:
    """This rank's part of every global batch from ``start_step`` on, forever.

    Global batch ``k`` is ``order.indices(k * batch_size, batch_size)``; rank ``r`` takes the ``r``-th of ``world_size``
    equal parts and splits it into ``accumulation`` micro-batches. What comes out depends on nothing else, neither on
    the number of workers nor on how far they read ahead.

    ``next(loader)`` gives a list of ``accumulation`` uint8 tensors ``[b, 3, H, W]``, 0…255, with
    ``b = batch_size / world_size / accumulation``. An error of a worker is raised there.

    Args:
        dataset: the images.
        order: the stream that the batches are cut from.
        batch_size: images in a global batch, over all ranks and micro-batches.
        rank: of this process.
        world_size: number of processes.
        accumulation: micro-batches in a step.
        start_step: the first ``k``.
        num_workers: threads; 0 reads in the caller's.
        prefetch: batches read ahead.
        pin_memory: page-locked tensors, for ``to(device, non_blocking=True)``.
        hflip: mirror half of the images, by a coin per (seed, epoch, item).

    Attributes:
        step: the ``k`` of the next batch.
        wait_seconds: time that the caller has spent waiting for batches.

    Raises:
        UserError: the batch cannot be split evenly.
    """

    def __init__(
        self,
        dataset: ImageDataset,
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
        self._reader = _BatchReader(dataset, num_workers, pin_memory)
        self._prefetch = prefetch if num_workers else 0
        self._ahead: deque[_PendingBatch] = deque()

    def __iter__(self) -> "BatchLoader":
        return self

    def __next__(self) -> list[Tensor]:
        begin = time.perf_counter()
        while len(self._ahead) <= self._prefetch:
            self._ahead.append(self._start(self.step + len(self._ahead)))
        images = self._ahead.popleft().result()
        self.wait_seconds += time.perf_counter() - begin
        self.step += 1
        return list(images.chunk(self._accumulation))

    def close(self) -> None:
        """Stop reading ahead; waits for the reads in progress."""
        self._ahead.clear()
        self._reader.close()

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _start(self, step: int) -> "_PendingBatch":
        first = step * self._batch_size + self._rank * self._local_size
        flips = self._order.flips(first, self._local_size) if self._hflip else None
        return self._reader.start(self._order.indices(first, self._local_size), flips)


def sequential_batches(
    dataset: ImageDataset,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Go once over a dataset, for validation: rank ``r`` gets items ``r, r + world_size, …``.

    Args:
        dataset: the images.
        batch_size: images in a batch of this rank; the last may be shorter.
        rank: of this process.
        world_size: number of processes.
        num_workers: threads that read one batch ahead; 0 reads in the caller's.
        pin_memory: page-locked tensors.

    Yields:
        item numbers int64 ``[n]`` and images uint8 ``[n, 3, H, W]``, 0…255.
    """
    items = np.arange(rank, len(dataset), world_size, dtype=np.int64)
    batches = [items[first : first + batch_size] for first in range(0, len(items), batch_size)]
    reader = _BatchReader(dataset, num_workers, pin_memory)
    try:
        ahead: deque[_PendingBatch] = deque()
        for number, batch in enumerate(batches):
            wanted = batches[number + len(ahead) : number + (2 if num_workers else 1)]
            ahead.extend(reader.start(items, None) for items in wanted)
            yield batch, ahead.popleft().result()
    finally:
        reader.close()


class _PendingBatch:
    def __init__(self, images: Tensor, parts: list[Future]) -> None:
        self._images = images
        self._parts = parts

    def result(self) -> Tensor:
        for part in self._parts:
            part.result()
        return self._images


class _BatchReader:
    """Reads batches by parts, each in one of its threads, into memory that torch hands out.

    Fresh memory each time: torch keeps pinned blocks and knows when the copy to the device has left them, which a ring
    of our own would not.
    """

    def __init__(self, dataset: ImageDataset, num_workers: int, pin_memory: bool) -> None:
        self._dataset = dataset
        self._pin_memory = pin_memory
        self._num_workers = num_workers
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="reader") if num_workers else None

    def start(self, items: np.ndarray, flips: np.ndarray | None) -> _PendingBatch:
        shape = (len(items), 3, self._dataset.resolution, self._dataset.resolution)
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin_memory)
        pixels = images.numpy()
        if self._pool is None:
            self._read(items, flips, pixels)
            return _PendingBatch(images, [])
        # Several parts a thread: photographs differ in size, and a thread that is done takes the next part.
        size = max(4, -(-len(items) // (4 * self._num_workers)))
        parts = [slice(first, first + size) for first in range(0, len(items), size)]
        return _PendingBatch(
            images,
            [
                self._pool.submit(self._read, items[part], None if flips is None else flips[part], pixels[part])
                for part in parts
            ],
        )

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, items: np.ndarray, flips: np.ndarray | None, pixels: np.ndarray) -> None:
        self._dataset.read_into(items, pixels)
        if flips is not None:
            pixels[flips] = pixels[flips, :, :, ::-1]


def stage_dataset(path: str | os.PathLike, stage_dir: str | os.PathLike, *, kind: str = "images") -> Path:
    """Copy a packed dataset to a local disk and return where it lies there.

    Files that are there already are not copied again, so an interrupted copy continues. One process a machine calls
    this, the others wait for it and then call it too: for them nothing is left to copy.

    Raises:
        UserError: no packed dataset, or not enough space.
    """
    path = Path(path)
    index = PackedReader(path, kind).index
    sizes = {name: file["bytes"] for shard in index["shards"] for name, file in shard["files"].items()}
    sizes.update({name: file["bytes"] for name, file in index["labels"].items()})
    sizes[INDEX_NAME] = (path / INDEX_NAME).stat().st_size  # last: without it the copy is no dataset
    version = hashlib.sha256((path / INDEX_NAME).read_bytes()).hexdigest()[:12]
    target = Path(stage_dir) / f"{path.resolve().name}-{version}"
    target.mkdir(parents=True, exist_ok=True)
    missing = {name: size for name, size in sizes.items() if not _has_size(target / name, size)}
    _check_space(target, sum(missing.values()))
    with tqdm(total=sum(missing.values()), unit="B", unit_scale=True, desc="staging", disable=not missing) as progress:
        for name, size in missing.items():
            temporary = target / f"{name}.tmp"
            shutil.copyfile(path / name, temporary)
            if temporary.stat().st_size != size:
                raise UserError(f"{path / name} changed while it was copied; run the same command again")
            os.replace(temporary, target / name)
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
