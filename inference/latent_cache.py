"""Making a latent cache: images are read ahead, encoded, and written behind, by independent processes.

The bytes depend neither on the batch nor on the number of processes. Convolutions and matrix products may give other
last bits for another batch or another number of threads, so images are encoded in chunks of a fixed size whose
composition follows from the place in the shard alone (the last is padded), and on a CPU each chunk by one thread,
several chunks at a time. What remains is the hardware: a CPU of another kind, or another GPU, may differ in last bits.
"""

import errno
import hashlib
import os
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset.images import ImageDataset
from dataset.latents import STATISTICS_NAME, VAE_NAME
from dataset.loader import read_batches
from dataset.packing import PackingJob
from dataset.shards import PackedReader, ShardSpec, ShardWriter
from errors import UserError
from files import whole_file, write_atomically, write_safetensors_file
from models.encoders import Encoder
from models.latent_statistics import LatentStatistics, mean_and_variance
from models.tokenizers import Tokenizer

WRITES_BEHIND = 3  # batches that are encoded or encoding, but not yet written
FINISHES_BEHIND = 2  # shards whose checksum is being made
FLOAT16_MAX = 65504.0
_DIGEST_BYTES = 32
# A file system without hard links, another one, or somebody else's files.
_NO_LINKS = frozenset({errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS})


def chunk_size(resolution: int, device: torch.device) -> int:
    """Images that are encoded at once: enough to fill the device, a few GB of activations."""
    most, at_256 = (128, 32) if device.type == "cuda" else (8, 2)
    return max(1, min(most, at_256 * 256**2 // resolution**2))


@dataclass(frozen=True, eq=False)
class Target:
    """One packed folder of the cache.

    Args:
        name: for messages.
        packing: the folder and what must agree.
        encode: uint8 images ``[n, 3, H, W]`` → items ``[n, …]`` of the folder's type, or what has them; targets that
            share it run it once.
        flipped: whether it sees the images mirrored.
        class_names: of the dataset.
        before_index: see :meth:`PackingJob.finish`.
        after_shard: called when a shard is complete, with its number.
        part: what of the encoded is an item; None: all.
    """

    name: str
    packing: PackingJob
    encode: Callable[[Tensor], Tensor]
    flipped: bool
    class_names: Sequence[str]
    before_index: Callable[[], None] | None = None
    after_shard: Callable[[int], object] | None = None
    part: int | slice | None = None

    def finish(self, shards: int) -> bool:
        """Complete the folder if all shards are there; whether it is complete."""
        return self.packing.finish(shards, self.class_names, self.before_index)


def latents_encoder(tokenizer: Tokenizer, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """uint8 images → what the tokenizer stores of them, ``[n, S, h, w]``."""
    return lambda images: tokenizer.encode(images).stored().to(dtype)


def features_encoder(encoder: Encoder, dtype: torch.dtype, class_token: bool = False) -> Callable[[Tensor], Tensor]:
    """uint8 images → VFM features ``[n, N, D]``; with the class token in front ``[n, 1 + N, D]``."""
    return lambda images: encoder(images, class_token).to(dtype)


def same_files(spec: ShardSpec, images: ImageDataset) -> PackedReader | None:
    """The dataset's files, if those of a cache of images, of ``spec``, would be the same byte for byte."""
    return next((reader for reader in images.readers if replace(reader.spec, kind=spec.kind) == spec), None)


def linkable_files(target: Target, images: ImageDataset, report: Callable[[str], object]) -> PackedReader | None:
    """:func:`same_files`, if the folder of the cache, which is there, may have other names (hard links) of them."""
    reader, folder = same_files(target.packing.spec, images), target.packing.folder
    if reader is None:
        return None
    path, trial = reader.shard_file(0)[0], folder / f".{uuid.uuid4().hex}.tmp"
    is_allowed = _link(lambda: os.link(path.resolve(), trial), path, folder, report)
    trial.unlink(missing_ok=True)  # another process may have tidied up
    return reader if is_allowed else None


def link_shards(
    target: Target, reader: PackedReader, shards: Sequence[int], report: Callable[[str], object]
) -> list[int]:
    """Make shards of :func:`linkable_files` until one cannot be; returns those that no other process had made."""
    labels, folder = np.split(reader.labels, reader.shard_starts[1:-1]), target.packing.folder
    linked: list[int] = []
    for number in shards:
        path, entry = reader.shard_file(number)
        with target.packing.shard(number) as writer:
            if writer is None:
                continue
            if not _link(partial(writer.link, path, entry, labels[number]), path, folder, report):
                break  # a file that lies elsewhere, behind a link of its own
            linked.append(number)
    return linked


def _link(link: Callable[[], object], path: Path, folder: Path, report: Callable[[str], object]) -> bool:
    """Whether a link could be made; why not is reported, unless the disk has failed."""
    try:
        link()
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        report(f"{folder} holds copies of the images: {path} cannot be linked into it ({error.strerror})")
        return False
    return True


class ChunkEncoder:
    """Encodes batches in fixed chunks, each by one thread on a CPU; results are had later, on the host.

    Args:
        device: where the networks lie.
        chunk: images at once; a shorter rest is padded.
        threads: chunks at a time, on a CPU.
        autocast: the precision, a new context each time.
    """

    def __init__(
        self, device: torch.device, chunk: int, threads: int, autocast: Callable[[], AbstractContextManager]
    ) -> None:
        self.chunk = chunk
        self._device = device
        self._autocast = autocast
        self._pool = ThreadPoolExecutor(threads, "encoder") if device.type == "cpu" else None

    def start(self, images: Tensor, targets: Sequence[Target]) -> Callable[[], list[np.ndarray]]:
        """Begin to encode uint8 images ``[n, 3, H, W]``; the answer waits and gives an array for each target."""
        chunks = images.split(self.chunk) if len(images) else ()
        if self._pool is not None:
            futures = [self._pool.submit(self._encode, part, targets) for part in chunks]
            return lambda: _joined([future.result() for future in futures])
        images = images.to(self._device, non_blocking=True)
        parts = [self._encode(part, targets) for part in images.split(self.chunk)] if len(images) else []
        hosts = [_to_host(torch.cat(column)) for column in zip(*parts, strict=True)]
        copied = torch.cuda.Event(blocking=True)  # the writer sleeps instead of spinning
        copied.record()

        def wait() -> list[np.ndarray]:
            copied.synchronize()
            return [host.numpy() for host in hosts]

        return wait

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    @torch.inference_mode()
    def _encode(self, images: Tensor, targets: Sequence[Target]) -> list[Tensor]:
        count = len(images)
        if count < self.chunk:
            images = torch.cat([images, images[-1:].expand(self.chunk - count, -1, -1, -1)])
        flipped = images.flip(3) if any(target.flipped for target in targets) else None
        with self._autocast():
            wanted = dict.fromkeys((target.encode, target.flipped) for target in targets)
            made = {(encode, flip): encode(flipped if flip else images)[:count] for encode, flip in wanted}
        results = [(target.part, made[target.encode, target.flipped]) for target in targets]
        return [(result if part is None else result[:, part]).contiguous() for part, result in results]


class Cacher:
    """Makes shards: a reader ahead, a thread that writes, a thread that finishes shards.

    Args:
        images: the dataset.
        targets: the folders; of each shard those are made that lack it.
        encoder: the networks' side.
        batch_size: images that are read and written at once, rounded up to whole chunks.
        num_workers: reading threads.
        pin_memory: for the copies to and from a GPU.
    """

    def __init__(
        self,
        images: ImageDataset,
        targets: Sequence[Target],
        encoder: ChunkEncoder,
        *,
        batch_size: int,
        num_workers: int,
        pin_memory: bool,
    ) -> None:
        self._images = images
        self._targets = targets
        self._encoder = encoder
        self._batch_size = -(-batch_size // encoder.chunk) * encoder.chunk
        self._num_workers = num_workers
        self._pin_memory = pin_memory
        self._starts = np.cumsum([0, *images.shard_counts]).tolist()

    def run(self, shards: Sequence[int], progress: tqdm) -> None:
        """Make these shards in all targets that lack them."""
        batches = [batch for shard in shards for batch in self._batches(shard)]
        reading = read_batches(
            self._images,
            [items for _, _, items in batches],
            num_workers=self._num_workers,
            prefetch=2,
            pin_memory=self._pin_memory,
        )
        with ExitStack() as stack:
            stack.callback(reading.close)
            stack.callback(self._encoder.close)
            behind = stack.enter_context(_Behind())
            current: _OpenShard | None = None
            for (shard, place, items), images in zip(batches, reading, strict=True):
                if place == 0:
                    current = behind.open(_OpenShard(shard, len(self._items(shard)), self._targets, self._images))
                if current.writers:
                    arrays = self._encoder.start(images, list(current.writers))
                    behind.write(current, place, items, arrays, progress)
                if place + len(items) == current.count:
                    behind.finish(current)

    def _items(self, shard: int) -> range:
        return range(self._starts[shard], self._starts[shard + 1])

    def _batches(self, shard: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """(shard, place of the first in it, item numbers); one empty batch of a shard without items."""
        items = np.asarray(self._items(shard), np.int64)
        for place in range(0, max(1, len(items)), self._batch_size):
            yield shard, place, items[place : place + self._batch_size]


class _OpenShard:
    """One shard in all the folders that lack it, held against other processes."""

    def __init__(self, number: int, count: int, targets: Sequence[Target], images: ImageDataset) -> None:
        self.number, self.count = number, count
        self.writers: dict[Target, ShardWriter] = {}
        self.sizes: dict[Target, list[int]] = {}
        self._images = images
        self._labels: list[int] = []
        self._locks, self._files = ExitStack(), ExitStack()
        try:
            for target in targets:
                writer = self._locks.enter_context(target.packing.shard(number))
                if writer is not None:
                    writer.create(count)
                    self.writers[target] = self._files.enter_context(writer)
                    self.sizes[target] = []
        except BaseException:
            self.close()
            raise

    def write(self, place: int, items: np.ndarray, arrays: Sequence[np.ndarray]) -> None:
        if not len(items):  # a shard all of whose photographs were rejected
            return
        self._labels += self._images.labels[items].tolist()
        for (target, writer), array in zip(self.writers.items(), arrays, strict=True):
            check_finite(array, items, self._images, target.name)
            self.sizes[target] += [writer.put(place + slot, item) for slot, item in enumerate(array)]

    def finish(self) -> None:
        self._files.close()
        for target, writer in self.writers.items():
            writer.finish(self.sizes[target], self._labels)
            if target.after_shard is not None:
                target.after_shard(self.number)
        self.close()

    def close(self) -> None:
        self._files.close()
        self._locks.close()


class _Behind:
    """What happens to encoded batches: a thread writes them in order, another finishes the shards."""

    def __enter__(self) -> "_Behind":
        self._writer, self._finisher = ThreadPoolExecutor(1, "writer"), ThreadPoolExecutor(1, "finisher")
        self._writes: deque[Future] = deque()
        self._finishes: deque[Future] = deque()
        self._open: list[_OpenShard] = []
        return self

    def __exit__(self, kind, *exception) -> None:
        try:
            if kind is None:
                _wait_until_at_most(0, self._writes)
                _wait_until_at_most(0, self._finishes)
        finally:
            for pool in (self._writer, self._finisher):
                pool.shutdown(wait=True, cancel_futures=True)
            for shard in self._open:
                shard.close()

    def open(self, shard: _OpenShard) -> _OpenShard:
        self._open.append(shard)
        return shard

    def write(
        self,
        shard: _OpenShard,
        place: int,
        items: np.ndarray,
        arrays: Callable[[], list[np.ndarray]],
        progress: tqdm,
    ) -> None:
        def write() -> None:
            shard.write(place, items, arrays())
            progress.update(len(items))

        self._writes.append(self._writer.submit(write))
        _wait_until_at_most(WRITES_BEHIND, self._writes)

    def finish(self, shard: _OpenShard) -> None:
        written = self._writes[-1] if self._writes else None

        def finish() -> None:
            if written is not None:
                written.result()  # the writer keeps the order: everything before is written too
            shard.finish()

        self._finishes.append(self._finisher.submit(finish))
        _wait_until_at_most(FINISHES_BEHIND, self._finishes)


def check_finite(array: np.ndarray, items: np.ndarray, images: ImageDataset, what: str) -> None:
    """Refuse what is not finite, by the name of its image."""
    if np.isfinite(array).all():
        return
    bad = next(place for place, item in enumerate(array) if not np.isfinite(item).all())
    name = images.name(int(items[bad]))
    if array.dtype == np.float16 and not np.isnan(array[bad]).any():
        raise UserError(f"{what} of {name} exceed float16's largest number, {FLOAT16_MAX:.0f}; add --dtype float32")
    raise UserError(f"{what} of {name} are not finite; add --mixed-precision no, or use other weights: these diverged")


class MeasuredStatistics:
    """Statistics of latents over a whole cache, from what its shards hold.

    Sums are made in float64, shard by shard in fixed chunks, so that nothing depends on batches or processes.

    Args:
        packing: the cache's latents.
        tokenizer: that made them.
    """

    def __init__(self, packing: PackingJob, tokenizer: Tokenizer) -> None:
        self._packing, self._tokenizer = packing, tokenizer

    def shard(self, number: int) -> np.ndarray:
        """Additive moments of a complete shard, float64 ``[2C + 1]``; kept next to it until the cache is complete."""
        kept = self._kept(number)
        with suppress(OSError):  # what is damaged is made again
            data = kept.read_bytes()
            if hashlib.sha256(data[:-_DIGEST_BYTES]).digest() == data[-_DIGEST_BYTES:]:
                return np.frombuffer(data[:-_DIGEST_BYTES])
        path = self._packing.folder / self._packing.spec.file_name(number)
        moments = self._tokenizer.stored_moments(np.load(path, mmap_mode="r", allow_pickle=False))
        data = moments.tobytes()
        with suppress(FileNotFoundError):  # another process has completed the cache meanwhile, and tidied up
            write_atomically(kept, data + hashlib.sha256(data).digest())
        return moments

    def total(self, shards: int) -> LatentStatistics:
        """Over all shards."""
        moments = np.zeros(2 * self._tokenizer.latent_channels + 1)
        for number in range(shards):
            moments += self.shard(number)
        mean, var = mean_and_variance(torch.from_numpy(moments))
        statistics = LatentStatistics(self._tokenizer.latent_channels)
        statistics.mean.copy_(mean)
        statistics.var.copy_(var)
        return statistics

    def tidy_up(self) -> None:
        """Remove what was kept next to the shards."""
        for path in self._packing.folder.glob(".moments-?????"):
            path.unlink(missing_ok=True)

    def _kept(self, number: int) -> Path:
        return self._packing.folder / f".moments-{number:05d}"


def save_beside(folder: Path, tokenizer: Tokenizer, measured: LatentStatistics, keep: bool) -> None:
    """Write what makes a cache self-contained: the VAE, with its own statistics or the measured ones, and the latter.

    Args:
        folder: of the cache.
        tokenizer: the VAE; stays as it is.
        measured: over the whole set.
        keep: store the VAE's own statistics with it.
    """
    own = {name: tensor.clone() for name, tensor in tokenizer.statistics.state_dict().items()}
    if not keep:
        tokenizer.statistics.load_state_dict(measured.state_dict())
    tokenizer.save(folder / VAE_NAME)
    tokenizer.statistics.load_state_dict(own)
    with whole_file(folder / STATISTICS_NAME) as temporary:
        write_safetensors_file(measured.tensors(), temporary)


@contextmanager
def one_thread_each() -> Iterator[int]:
    """Let every operation on the CPU use one thread; gives how many there were to share out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def autocast_for(device: torch.device, mixed_precision: str) -> Callable[[], AbstractContextManager]:
    """The precision of the networks: ``no`` or ``bf16``."""
    if mixed_precision == "no":
        return nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


def _joined(parts: Sequence[Sequence[Tensor]]) -> list[np.ndarray]:
    return [torch.cat(column).numpy() for column in zip(*parts, strict=True)]


def _to_host(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _wait_until_at_most(count: int, futures: deque[Future]) -> None:
    while len(futures) > count:
        futures.popleft().result()
