"""The interpolant between latents and noise (SiT, arXiv 2401.08740)."""

import math

import torch

PATH_TYPES = ("linear", "cosine")


def interpolant(t: torch.Tensor, path_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Coefficients (α_t, σ_t) of ``x_t = α_t·x + σ_t·ε``, in the shape of ``t`` (in [0, 1]; data at 0, noise at 1).

    ``linear``: (1 − t, t); ``cosine``: (cos πt/2, sin πt/2).
    """
    if path_type == "linear":
        return 1 - t, t
    if path_type == "cosine":
        return torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)
    raise ValueError(f"path type {path_type!r} is none of {PATH_TYPES}")


def add_noise(x: torch.Tensor, t: torch.Tensor, noise: torch.Tensor, path_type: str = "linear") -> torch.Tensor:
    """``α_t·x + σ_t·ε`` for ``x`` and ``noise`` ``[B, ...]`` and one time a sample, ``t`` ``[B]``."""
    alpha, sigma = interpolant(t.view(-1, *[1] * (x.ndim - 1)), path_type)
    return alpha * x + sigma * noise
