"""Measures of a VAE's latents that are said to matter for diffusion, put together. None is known to predict FID."""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from diffusion.counted_noise import Purpose, counted_normal
from errors import UserError
from metrics.encoding import normalise
from metrics.equivariance import TRANSFORMS, unexplained_share
from metrics.latent_measures import (
    channel_correlation,
    channel_covariance,
    participation_ratio,
    spectral_slope,
    sphere_uniformity,
    two_nearest_dimension,
)
from metrics.probes import Latents, Outcome, check_points, one_vector_an_image, spread
from metrics.spatial_structure import correlation_decay, foreground_grid, local_against_distant, region_similarity
from metrics.velocity_variance import (
    KERNEL_IMAGES,
    covariance_spectrum,
    gaussian_velocity_variance,
    velocity_variance,
)
from models.latent_statistics import LatentStatistics
from models.tokenizers import Tokenizer

SAMPLES_AT_ONCE = 256


@dataclass(frozen=True)
class Diffused:
    """A data set's latents as a diffusion model is trained on them, and what else the measures need.

    Attributes:
        samples: drawn from the VAE's posterior, float32 ``[N, C, h, w]``, normalised, on the CPU.
        foreground: of the images, bool ``[N, h, w]``.
        errors: of equivariance under the transforms of :func:`moved_shapes`, by name.
    """

    samples: Tensor
    foreground: Tensor
    errors: dict[str, float]


def encode_diffused(
    latents: Latents,
    tokenizer: Tokenizer,
    statistics: LatentStatistics,
    own: LatentStatistics | None,
    encoded: Callable[[Callable[[Tensor], Tensor], tuple[int, ...]], Tensor],
) -> Diffused:
    """Encode what :func:`measure_diffusability` needs.

    Args:
        latents: without randomness; what those of transformed images are compared with.
        tokenizer: that they are of.
        statistics: that they were normalised with.
        own: the tokenizer's; without them samples are normalised by the samples' own, which are wider than the means'.
        encoded: a function of uint8 images ``[n, 3, H, W]``, and the shape of a result → all images through it.
    """
    resolution, (height, width) = latents.data.images.resolution, latents.values.shape[2:]
    cell = resolution // (height * tokenizer.packing)
    unpacked = nn.PixelShuffle(tokenizer.packing)  # what moves are positions, in channels too
    stored = encoded(lambda images: tokenizer.encode(images).stored(), tokenizer.stored_shape(resolution))
    samples = torch.empty_like(latents.values)
    numbers = torch.from_numpy(latents.data.items)
    for part, code, items in zip(*(each.split(SAMPLES_AT_ONCE) for each in (samples, stored, numbers)), strict=True):
        noise = counted_normal(latents.seed, items, 0, part.shape[1:], Purpose.POSTERIOR)
        part.copy_(tokenizer.sample(code, noise))
    normalise(samples, own)
    # on the CPU everywhere: integers and comparisons, the same bits whatever the encoder runs on
    foreground = encoded(lambda images: foreground_grid(images.cpu(), height, width), (1, height, width))
    errors = {}
    for name, shape in moved_shapes(tokenizer, resolution).items():
        transform = TRANSFORMS[name]

        def encode_moved(images: Tensor, move: Callable = transform.of_images) -> Tensor:
            return tokenizer.encode(move(images, cell)).mode

        moved = statistics.normalize(encoded(encode_moved, shape))
        errors[name] = unexplained_share(*transform.of_latents(unpacked(latents.values), unpacked(moved)))
    return Diffused(samples, foreground[:, 0].bool(), errors)


def moved_shapes(tokenizer: Tokenizer, resolution: int) -> dict[str, tuple[int, int, int]]:
    """The latents' shape for each of ``TRANSFORMS`` by name; without those whose images the tokenizer cannot encode."""
    _, height, width = tokenizer.latent_shape(resolution)
    shapes = {}
    for name, transform in TRANSFORMS.items():
        with suppress(UserError):  # a tokenizer of one resolution, or not a multiple of its downsampling
            shape = tokenizer.latent_shape(int(resolution * transform.scale))
            if shape[1:] == (height * transform.scale, width * transform.scale):
                shapes[name] = shape
    return shapes


def measure_diffusability(latents: Latents, diffused: Diffused, points: int) -> Outcome:
    """All measures; each function says what it is, in which range, and whose.

    Args:
        latents: whose images and seed they are.
        diffused: of the same images.
        points: images whose latents are compared, at most.
    """
    check_points(latents.data, points)
    values = diffused.samples
    flat = values.flatten(1)[spread(len(values), points)]
    spectrum, covariance = covariance_spectrum(flat), channel_covariance(values)
    places = spread(len(values), min(points, KERNEL_IMAGES))
    compared, numbers = values[places].flatten(1), torch.from_numpy(latents.data.items[places])
    found = {
        "LDS": local_against_distant(values),
        "CDS": correlation_decay(values),
        "SRSS": region_similarity(values, diffused.foreground),
        "spectral-slope": spectral_slope(values),
        **{f"{name}-error": diffused.errors.get(name, math.nan) for name in TRANSFORMS},
        "channel-correlation": channel_correlation(covariance),
        "sphere-uniformity": sphere_uniformity(one_vector_an_image(replace(latents, values=values), points)),
        "participation-token": participation_ratio(torch.linalg.eigvalsh(covariance)),
        "participation-latent": participation_ratio(spectrum),
        "TwoNN": two_nearest_dimension(compared),
        "velocity-gaussian": gaussian_velocity_variance(spectrum, flat.shape[1]),
        "velocity-variance": velocity_variance(compared, numbers, spectrum, latents.seed),
    }
    settings = {"points": len(flat), "compared": len(places), "dimensions": flat.shape[1], "latent": "sample"}
    return Outcome({name: value if math.isfinite(value) else None for name, value in found.items()}, settings)
