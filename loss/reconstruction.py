"""How far a reconstruction is from its image, pixel by pixel: as a loss, and in dB."""

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


def psnr(images: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each image in dB: two uint8 ``[B, 3, H, W]`` → float64 ``[B]``; 100 where equal."""
    error = (images.double() - reconstruction.double()).square().mean((1, 2, 3))
    return (10 * torch.log10(255.0**2 / error)).clamp_max(100.0)
