"""The diffusion model's own loss."""

import torch
import torch.nn.functional as F

# Shorter vectors count as if they were this long (true velocities of C channels have about √(2·C)): a new network's are
# 0, where the gradient of a cosine has no bound, and AdamW's second moment would need hundreds of steps to forget it.
SHORTEST = 0.1


def denoising_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample in float32: two velocities ``[B, C, h, w]`` → ``[B]`` (SiT, eq. 6)."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def direction_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """1 − cos of the channels at each position, mean over positions, of each sample in float32: shapes as above.

    LightningDiT's cosine loss, the velocity direction supervision of FasterDiT (arXiv 2410.10356).
    """
    return (1 - F.cosine_similarity(prediction.float(), target.float(), dim=1, eps=SHORTEST)).flatten(1).mean(1)
