"""How faithfully a VAE reconstructs, image by image.

Originals and reconstructions are compared as the 8-bit images that one would save: reconstructions are clamped and
rounded to uint8 first, as in published evaluations that write PNG files. Images that are compared in floating point
come out slightly better (at 40 dB by about 0.05 dB).
"""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from dataset.images import ImageDataset
from diffusion.counted_noise import Purpose, counted_normal
from errors import UserError
from files import weights_checksum, write_atomically
from inference.latent_cache import ChunkEncoder
from loss.reconstruction import psnr
from metrics.encoding import chunked
from models.pixels import to_signed, to_uint8
from models.tokenizers import Tokenizer


def ssim(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of each image: two uint8 ``[B, 3, H, W]`` → ``[B]``, at most 1.

    11×11 Gaussian window of σ 1.5, K = (0.01, 0.03), data range 255, mean over RGB and all positions, the image being
    reflected beyond its borders (torchmetrics); in float64, because variances are differences of large squares.
    """
    return structural_similarity_index_measure(
        reconstructions.double(), originals.double(), data_range=255.0, reduction="none"
    )


class PairScores:
    """Scores of pairs of images, as one function for a chunk.

    Args:
        lpips: LPIPS networks by their names, e.g. ``{"alex": …}``.

    Attributes:
        names: of the scores.
        checksums: of the LPIPS networks' weights, trunk and heads, by their names.
    """

    def __init__(self, lpips: Mapping[str, nn.Module]):
        self._lpips = dict(lpips)
        self.checksums = {name: weights_checksum(network.state_dict()) for name, network in lpips.items()}
        self.names = ["PSNR", "SSIM", *(f"LPIPS-{name}" for name in self._lpips)]

    @torch.no_grad()
    def __call__(self, pairs: Tensor) -> Tensor:
        """uint8 ``[B, 6, H, W]``, original and reconstruction, → float64 ``[B, len(names)]``."""
        originals, reconstructions = pairs.chunk(2, 1)
        scores = [psnr(originals, reconstructions), ssim(originals, reconstructions)]
        signed = to_signed(reconstructions), to_signed(originals)
        scores += [network(*signed).flatten() for network in self._lpips.values()]
        return torch.stack([score.double() for score in scores], 1)


def reconstruct(
    tokenizer: Tokenizer, worker: ChunkEncoder, images: Tensor, items: np.ndarray, sample_seed: int | None
) -> Tensor:
    """uint8 ``[n, 3, H, W]`` → reconstructions, the same.

    Args:
        tokenizer: the VAE.
        worker: in whose chunks.
        images: the originals.
        items: their numbers, int64 ``[n]``, which a sample's noise depends on.
        sample_seed: decode a sample of the posterior, its noise counted from this seed; None decodes the mean.
    """

    if sample_seed is None:
        z = chunked(worker, lambda part: tokenizer.encode(part).mode, images)
    else:
        stored = chunked(worker, lambda part: tokenizer.encode(part).stored(), images)
        numbers, shape = torch.from_numpy(np.asarray(items, np.int64)), tokenizer.latent_shape(images.shape[-1])
        z = tokenizer.sample(stored, counted_normal(sample_seed, numbers, 0, shape, Purpose.POSTERIOR))
    return chunked(worker, decoder(tokenizer), z.contiguous())


def decoder(tokenizer: Tokenizer) -> Callable[[Tensor], Tensor]:
    """Un-normalised latents ``[n, C, h, w]`` → uint8 images; a :class:`UserError` where these are not finite."""

    def decode(z: Tensor) -> Tensor:
        images = tokenizer.decode(z)
        if not images.isfinite().all():  # as uint8 it would be any number
            raise UserError("reconstructions are not finite: this VAE has diverged, or needs --mixed-precision no")
        return to_uint8(images)

    return decode


def worst(scores: np.ndarray, count: int) -> np.ndarray:
    """Numbers of the ``count`` images with the lowest PSNR, the worst first: scores ``[N]`` → int64."""
    return np.argsort(scores, kind="stable")[:count]


def write_table(path: Path, names: Sequence[str], scores: np.ndarray, images: ImageDataset, items: np.ndarray) -> None:
    """A CSV with a row an image: its number in the dataset ``[N]``, name, class, scores ``[N, len(names)]``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("index", "image", "class", *names))
    for item, row in zip(items.tolist(), scores.tolist(), strict=True):
        label = images.class_names[int(images.labels[item])]
        writer.writerow((item, images.name(item), label, *(f"{value:.6g}" for value in row)))
    write_atomically(path, text.getvalue().encode())


def summary(names: Sequence[str], scores: np.ndarray) -> dict[str, float]:
    """The mean over images of each column."""
    return {name: float(value) for name, value in zip(names, scores.mean(0), strict=True)}
