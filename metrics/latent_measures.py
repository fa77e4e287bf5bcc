"""Statistics of a VAE's latents as a diffusion model meets them: spectrum, correlation, spread, dimension."""

import math

import numpy as np
import scipy.fft
import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ITEMS = 256
BLOCK_ROWS = 1024  # points that are compared with all others at once
FLOOR = 1e-12  # of a coefficient's power, as a share of the mean: a logarithm needs one


def spectral_slope(latents: Tensor) -> float:
    """Slope of log power against log frequency: 0 for white noise, negative for smooth latents, −2 about photographs'.

    Power is that of the orthonormal DCT-II, averaged over images and channels; frequency is the distance of (u/h, v/w)
    from 0, and every coefficient but the constant one is a point of the fit. arXiv 2502.14831 describes latents by
    their DCT and finds those with much power at high frequencies harder to generate.

    Args:
        latents: ``[N, C, h, w]``, with h·w > 2.
    """
    height, width = latents.shape[2:]
    power = np.zeros((height, width))
    for part in latents.split(BLOCK_ITEMS):
        power += np.square(scipy.fft.dctn(part.double().numpy(), axes=(2, 3), norm="ortho")).sum((0, 1))
    power = power.flatten()[1:]
    frequency = np.hypot(np.arange(height)[:, None] / height, np.arange(width) / width).flatten()[1:]
    if not power.any() or len(np.unique(frequency)) < 2:
        return math.nan
    x, y = np.log(frequency), np.log(np.maximum(power, FLOOR * power.mean()))
    x -= x.mean()
    return float(x @ y / (x @ x))


def channel_covariance(latents: Tensor) -> Tensor:
    """Of the vectors at all positions of latents ``[N, C, h, w]``, float64 ``[C, C]``."""
    mean = sum(part.double().sum((0, 2, 3)) for part in latents.split(BLOCK_ITEMS)) / latents[:, 0].numel()
    total = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for part in latents.split(BLOCK_ITEMS):
        centred = part.double().transpose(0, 1).flatten(1) - mean[:, None]
        total += centred @ centred.T
    return total / latents[:, 0].numel()


def channel_correlation(covariance: Tensor) -> float:
    """Mean |Pearson's r| of two channels over images and positions: 0 to 1; a constant channel correlates with none.

    No published claim is known here; the noise that latents are mixed with has none.

    Args:
        covariance: of the channels, ``[C, C]``.
    """
    channels = len(covariance)
    if channels < 2:
        return math.nan
    scale = covariance.diagonal().rsqrt().nan_to_num(posinf=0.0)
    correlation = scale[:, None] * covariance * scale
    return float(correlation.triu(1).abs().sum() / (channels * (channels - 1) / 2))


def sphere_uniformity(vectors: Tensor) -> float:
    """log of the mean of exp(−2·|a − b|²) over pairs of vectors scaled to length 1: 0 where all are alike, above −8.

    Wang and Isola 2020 (arXiv 2005.10242), for contrastive features: less is more uniform. Uniform vectors of C
    channels have about −4 + 8/C. Diffusion's view of an even spread is VA-VAE's (``probe.py uniformity``).

    Args:
        vectors: ``[N, C]``, one of each image.
    """
    unit = F.normalize(vectors.double(), dim=-1)
    total = sum(float((4 * (rows @ unit.T) - 4).exp().sum()) for rows in unit.split(BLOCK_ROWS))
    alone = float((4 * unit.square().sum(1) - 4).exp().sum())  # a vector with itself
    count = len(unit)
    return math.log((total - alone) / (count * (count - 1)))


def participation_ratio(spectrum: Tensor) -> float:
    """(Σ λ)² / Σ λ² of a covariance's eigenvalues: how many directions share the variance evenly; 1 to their number."""
    squares = float(spectrum.square().sum())
    return float(spectrum.sum()) ** 2 / squares if squares else math.nan


def two_nearest_dimension(points: Tensor) -> float:
    """TwoNN: intrinsic dimension from the ratio μ of each point's distances to its two nearest neighbours.

    Facco et al. 2017 (Scientific Reports 7, 12140): where density hardly changes over these distances, log μ is
    exponential with rate d. This is the unbiased maximum-likelihood estimate (n − 1) / Σ log μ; points with a twin are
    left out. High dimensions are underestimated.

    Args:
        points: ``[N, D]``, at least 3.
    """
    x = points.double()
    x = x - x.mean(0)
    ratios = []
    for first in range(0, len(x), BLOCK_ROWS):
        distances = torch.cdist(x[first : first + BLOCK_ROWS], x, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distances.topk(3, largest=False).values  # the nearest is the point itself, or its twin
        apart = nearest[:, 1] > 0
        ratios.append((nearest[apart, 2] / nearest[apart, 1]).log())
    logs = torch.cat(ratios)
    total = float(logs.sum())
    return (len(logs) - 1) / total if total else math.nan
