"""Pixel reconstruction and KL terms of the VAE loss."""

import torch
import torch.nn.functional as F

RECONSTRUCTION_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}


def reconstruction_loss(images: torch.Tensor, reconstruction: torch.Tensor, kind: str = "l1") -> torch.Tensor:
    """Mean over all elements of |x − x̂| (``l1``, REPA-E's code) or (x − x̂)² (``l2``, the Send-VAE paper).

    Args:
        images, reconstruction: ``[B, 3, H, W]`` in [-1, 1].
        kind: ``l1`` or ``l2``.
    """
    return RECONSTRUCTION_LOSSES[kind](reconstruction.float(), images.float())


def kl_divergence(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, var) ‖ N(0, 1)): ½·Σ(mean² + var − 1 − logvar) over C, h, w; averaged over the batch.

    Args:
        mean, logvar: posterior parameters ``[B, C, h, w]``.
    """
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()


def psnr(images: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each image in dB: two uint8 ``[B, 3, H, W]`` → float64 ``[B]``; 100 where equal."""
    error = (images.double() - reconstruction.double()).square().mean((1, 2, 3))
    return (10 * torch.log10(255.0**2 / error)).clamp_max(100.0)
