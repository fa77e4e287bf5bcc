"""How much of the velocity that a diffusion model is trained to predict no model can predict.

On the linear path x_t = (1 − t)·x + t·e the target is v = e − x. Given x_t it equals (x_t − x) / t, so that the least
mean squared error at time t is E|x − E[x | x_t]|² / t². arXiv 2606.03578 relates this variance to diffusability; its
estimator was not available, the two below are derived here. Both are per number of the latent and averaged over t.
"""

import math

import torch
from torch import Tensor

from diffusion.counted_noise import counted_normal

TIMES = 16  # midpoints of as many equal parts of [0, 1]
KERNEL_IMAGES = 2000  # that are compared with each other, at most


def covariance_spectrum(points: Tensor) -> Tensor:
    """Eigenvalues of the covariance of points ``[N, D]``, float64 ``[min(N, D)]``; the others, up to D, are 0."""
    centred = points.double() - points.double().mean(0)
    gram = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
    return torch.linalg.eigvalsh(gram).clamp_min(0) / len(points)


def gaussian_velocity_variance(spectrum: Tensor, size: int) -> float:
    """Of a Gaussian with this spectrum: the mean over directions of π/2·√λ; π/2 for white noise, 0 for a point.

    A direction of variance λ leaves λ / ((1 − t)²·λ + t²) at time t, whose integral over t is π/2·√λ. Any other
    distribution of the same covariance leaves less. With few images for the dimensions the small eigenvalues are
    underestimated, and so is this.

    Args:
        spectrum: of the covariance, without zeros if need be.
        size: D.
    """
    return float(math.pi / 2 * spectrum.sqrt().sum() / size)


def velocity_variance(points: Tensor, items: Tensor, spectrum: Tensor, seed: int) -> float:
    """An upper bound of the variance that also sees what is not Gaussian: the better of two predictors at each time.

    One is linear and knows the covariance; its error is as above. The other is the mean of x given x_t if x is one of
    the *other* images: a Gaussian kernel of width t / (1 − t), with nothing to choose. Near t = 0, where no other image
    is near, the linear one is the better; at larger t the kernel is, where latents form clusters or bend.

    Args:
        points: latents ``[N, D]``, at least 2.
        items: their numbers, int64 ``[N]``, which the noise depends on.
        spectrum: of their covariance, see :func:`covariance_spectrum`.
        seed: of the noise.
    """
    x = points.double()
    squares = x.square().sum(1)
    total = 0.0
    for step in range(TIMES):
        t = (step + 0.5) / TIMES
        noisy = (1 - t) * x + t * counted_normal(seed, items, step, x.shape[1:]).double()
        exponents = (1 - t) * (noisy @ x.T) - (1 - t) ** 2 * squares / 2  # |x_t|² is the same for all, and left out
        weights = (exponents.fill_diagonal_(-math.inf) / t**2).softmax(1)
        kernel = (weights @ x - x).square().mean() / t**2
        linear = (spectrum / ((1 - t) ** 2 * spectrum + t**2)).sum() / x.shape[1]
        total += float(torch.minimum(kernel, linear)) / TIMES
    return total
