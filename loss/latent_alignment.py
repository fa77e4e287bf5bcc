"""VAE-REPA (SRA 2, arXiv 2601.17830): hidden states of a diffusion transformer aligned with the VAE's own latents."""

import torch
import torch.nn.functional as F

BETA = 0.05


def latent_alignment_error(predicted: torch.Tensor, latent: torch.Tensor, beta: float = BETA) -> torch.Tensor:
    """Smooth-L1 distance of each sample in float32: d²/(2·beta) below ``beta``, |d| − beta/2 above; mean of elements.

    Which latent is meant, and how elements are reduced, is not published. Here it is the normalised sample that
    entered the noisy latent, and the mean.

    Args:
        predicted: what a projector makes of a block's output, ``[B, C, h, w]``.
        latent: the clean normalised latent, ``[B, C, h, w]``.
        beta: where the square meets the straight line.

    Returns:
        float32 ``[B]``.
    """
    return F.smooth_l1_loss(predicted.float(), latent.float(), beta=beta, reduction="none").mean((1, 2, 3))


def latent_alignment_loss(
    predicted: torch.Tensor, latent: torch.Tensor, t: torch.Tensor, low: float = 0.0, high: float = 1.0
) -> torch.Tensor:
    """Mean error over the batch, in which samples of a time outside ``low ≤ t ≤ high`` count as 0.

    They stay in the denominator, so that accumulated micro-batches and several processes give the whole batch's loss.

    Args:
        predicted, latent: ``[B, C, h, w]``.
        t: times in [0, 1], ``[B]``.
        low, high: the range that is aligned.
    """
    inside = (t >= low) & (t <= high)
    return (latent_alignment_error(predicted, latent) * inside).mean()
