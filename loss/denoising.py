"""The diffusion model's own loss."""

import torch


def denoising_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample in float32: two velocities ``[B, C, h, w]`` → ``[B]`` (SiT, eq. 6)."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)
