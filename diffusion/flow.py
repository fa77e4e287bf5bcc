"""The interpolant between latents and noise, and what follows from it (SiT, arXiv 2401.08740).

Time runs from data at 0 to noise at 1: ``x_t = α_t·x + σ_t·ε``, velocity ``v = α̇_t·x + σ̇_t·ε``.
"""

import math
from collections.abc import Sequence

import torch

from diffusion import PATH_TYPES, WEIGHTINGS


def interpolant(t: torch.Tensor, path_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Coefficients (α_t, σ_t), in the shape of ``t`` (in [0, 1]).

    ``linear``: (1 − t, t); ``cosine``: (cos πt/2, sin πt/2).
    """
    if path_type == "linear":
        return 1 - t, t
    if path_type == "cosine":
        return torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)
    raise ValueError(f"path type {path_type!r} is none of {PATH_TYPES}")


def interpolant_rate(t: torch.Tensor, path_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Derivatives (α̇_t, σ̇_t) of :func:`interpolant` with respect to ``t``."""
    if path_type == "linear":
        return -torch.ones_like(t), torch.ones_like(t)
    alpha, sigma = interpolant(t, path_type)
    return -sigma * math.pi / 2, alpha * math.pi / 2


def add_noise(x: torch.Tensor, t: torch.Tensor, noise: torch.Tensor, path_type: str = "linear") -> torch.Tensor:
    """``α_t·x + σ_t·ε`` for ``x`` and ``noise`` ``[B, ...]`` and one time a sample, ``t`` ``[B]``."""
    alpha, sigma = interpolant(_per_sample(t, x), path_type)
    return alpha * x + sigma * noise


def velocity(x: torch.Tensor, t: torch.Tensor, noise: torch.Tensor, path_type: str = "linear") -> torch.Tensor:
    """The training target ``α̇_t·x + σ̇_t·ε``, shapes as in :func:`add_noise`."""
    alpha_rate, sigma_rate = interpolant_rate(_per_sample(t, x), path_type)
    return alpha_rate * x + sigma_rate * noise


def data_and_noise(
    v: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, path_type: str = "linear"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve ``x_t = α·x + σ·ε, v = α̇·x + σ̇·ε`` for (x, ε): what a velocity says of data and noise.

    The determinant ``α·σ̇ − σ·α̇`` is 1 on the linear and π/2 on the cosine path, so no time is singular.

    Args:
        v: velocity ``[B, ...]``.
        x_t: noisy sample of the same shape.
        t: one time a sample ``[B]``, or a scalar tensor.
        path_type: of the interpolant.
    """
    time = _per_sample(t, x_t)
    alpha, sigma = interpolant(time, path_type)
    alpha_rate, sigma_rate = interpolant_rate(time, path_type)
    determinant = alpha * sigma_rate - sigma * alpha_rate
    return (sigma_rate * x_t - sigma * v) / determinant, (alpha * v - alpha_rate * x_t) / determinant


def score_from_velocity(v: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, path_type: str = "linear") -> torch.Tensor:
    """Score ``∇ log p_t(x_t) = −E[ε | x_t] / σ_t`` of the marginal whose velocity is ``v``; infinite at ``t = 0``."""
    _, noise = data_and_noise(v, x_t, t, path_type)
    _, sigma = interpolant(_per_sample(t, x_t), path_type)
    return -noise / sigma


def shift_times(t: torch.Tensor, shift: float, path_type: str = "linear") -> torch.Tensor:
    """Times at which the noise-to-data ratio σ_t/α_t is ``shift`` times that at ``t``: above 1, nearer to the noise.

    ``linear``: s·t / (1 + (s − 1)·t) (Stable Diffusion 3, arXiv 2403.03206, eq. 23; for latents of many dimensions
    RAE, arXiv 2510.11690). ``cosine``: 2/π·atan(s·tan(πt/2)). The inverse is that of 1/s; 0 and 1 stay.

    Args:
        t: in [0, 1], any shape.
        shift: positive; 1 changes nothing.
        path_type: of the interpolant.
    """
    if shift == 1:
        return t
    alpha, sigma = interpolant(t, path_type)
    if path_type == "linear":
        return shift * sigma / (alpha + shift * sigma)
    shifted = torch.atan2(shift * sigma, alpha) * (2 / math.pi)
    return torch.where((t > 0) & (t < 1), shifted.clamp(0, 1), t)  # cos π/2 is not quite 0


def settled_shift(shift: float | str, latent_shape: Sequence[int]) -> float:
    """The shift itself; of ``auto`` √(numbers in a latent / 4096): more of them show through the same noise (RAE)."""
    return math.sqrt(math.prod(latent_shape) / 4096) if shift == "auto" else shift


def training_times(
    draws: torch.Tensor,
    weighting: str,
    path_type: str = "linear",
    shift: float = 1.0,
    mean: float = 0.0,
    std: float = 1.0,
) -> torch.Tensor:
    """Times to train at, in [0, 1].

    ``uniform``: the draws themselves. ``lognormal``: σ = exp(mean + std·n) for standard normal n, then the time whose
    noise-to-data ratio σ_t/α_t is σ: t = σ/(1 + σ) (linear) or 2/π·atan σ (cosine).

    Args:
        draws: uniform in [0, 1) for ``uniform``, standard normal for ``lognormal``, any shape.
        weighting: one of ``WEIGHTINGS``.
        path_type: of the interpolant.
        shift: see :func:`shift_times`.
        mean, std: of log σ.
    """
    if weighting == "uniform":
        times = draws
    elif weighting != "lognormal":
        raise ValueError(f"weighting {weighting!r} is none of {WEIGHTINGS}")
    else:
        draws = draws if (mean, std) == (0, 1) else mean + std * draws
        times = torch.sigmoid(draws) if path_type == "linear" else torch.atan(draws.exp()) * (2 / math.pi)
    return shift_times(times, shift, path_type)


def _per_sample(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``t`` ``[B]`` or scalar, shaped to broadcast over ``x`` ``[B, ...]``."""
    return t.reshape(-1, *[1] * (x.ndim - 1))
