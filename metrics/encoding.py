"""A dataset as vectors: a VAE's latents, a VFM's tokens, or raw pixels, held in memory.

Images are encoded in fixed chunks whose composition follows from the items alone (inference/latent_cache.py says why):
neither the batch nor the number of reading threads changes a bit.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset.images import ImageDataset
from dataset.latents import available_memory
from dataset.loader import read_batches
from errors import UserError
from inference.latent_cache import ChunkEncoder, Target
from models.encoders import Encoder
from models.latent_statistics import LatentStatistics, latent_moments, mean_and_variance
from models.tokenizers import Tokenizer

MOMENTS_ITEMS = 256  # latents whose moments are summed at once


def chunked(worker: ChunkEncoder, function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """Apply a function of tensors ``[n, …]`` in the worker's chunks; the result on the CPU."""
    target = Target("", None, function, False, ())
    return torch.from_numpy(worker.start(inputs, [target])()[0])


def whole_chunks(batch_size: int, chunk: int) -> int:
    """The batch size, rounded up to whole chunks."""
    return -(-batch_size // chunk) * chunk


def latent_modes(tokenizer: Tokenizer) -> Callable[[Tensor], Tensor]:
    """uint8 images ``[n, 3, H, W]`` → latents without randomness, float32 ``[n, C, h, w]``, un-normalised."""
    return lambda images: tokenizer.encode(images).mode


def scaled_pixels(images: Tensor) -> Tensor:
    """uint8 images ``[n, 3, H, W]`` → float32 in [0, 1], as they are: the baseline without any network."""
    return images.float() / 255.0


def token_grids(encoder: Encoder) -> Callable[[Tensor], Tensor]:
    """uint8 images ``[n, 3, H, W]`` → a VFM's tokens as a latent has them, float32 ``[n, D, grid, grid]``."""
    return lambda images: encoder(images).transpose(1, 2).unflatten(2, (encoder.grid, encoder.grid))


def encode_dataset(
    images: ImageDataset,
    items: np.ndarray,
    function: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    worker: ChunkEncoder,
    *,
    batch_size: int,
    num_workers: int,
    progress: tqdm,
) -> Tensor:
    """Items of a dataset through a function, float32 ``[n, *shape]`` on the CPU.

    Args:
        images: the dataset.
        items: which, int64 ``[n]``.
        function: uint8 images ``[n, 3, H, W]`` → float32 ``[n, *shape]``.
        shape: of a result.
        worker: in whose chunks.
        batch_size: images read at once, rounded up to whole chunks.
        num_workers: reading threads.
        progress: moved on by an image each.

    Raises:
        UserError: the results do not fit into memory, or are not finite.
    """
    check_memory(len(items), int(np.prod(shape)))
    result = torch.empty(len(items), *shape)
    size = whole_chunks(batch_size, worker.chunk)
    batches = [items[first : first + size] for first in range(0, len(items), size)]
    done = 0
    for batch, pixels in zip(batches, read_batches(images, batches, num_workers=num_workers), strict=True):
        part = chunked(worker, function, pixels)
        if not part.isfinite().all():
            bad = int(part.flatten(1).isfinite().all(1).logical_not().nonzero()[0, 0])
            raise UserError(f"the latent of {images.name(int(batch[bad]))} is not finite: this VAE has diverged")
        result[done : done + len(batch)] = part
        done += len(batch)
        progress.update(len(batch))
    return result


def normalise(latents: Tensor, own: LatentStatistics | None) -> LatentStatistics:
    """Normalise latents ``[N, C, h, w]`` in place.

    Args:
        latents: on the CPU.
        own: the VAE's statistics, if it has some.

    Returns:
        What they were normalised with: ``own``, or without it the statistics of these very latents.
    """
    statistics = own
    if statistics is None:
        mean, var = mean_and_variance(sum(latent_moments(part) for part in latents.split(MOMENTS_ITEMS)))
        statistics = LatentStatistics(latents.shape[1])
        statistics.load(mean, var.sqrt(), var)
    for part in latents.split(MOMENTS_ITEMS):
        part.copy_(statistics.normalize(part))
    return statistics


def check_memory(count: int, size: int) -> int:
    """Bytes of so many float32 vectors; a :class:`UserError` where they do not fit into memory."""
    needed, available = 4 * count * size, available_memory()
    if needed > available:
        raise UserError(
            f"{count} vectors of {size} numbers need {needed / 1e9:.2f} GB and {available / 1e9:.2f} GB of memory are "
            "available; add --max-images N"
        )
    return needed
