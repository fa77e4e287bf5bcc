"""VA-VAE's direct alignment of a latent with VFM features (arXiv 2501.01423): the VF loss and its weight."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from loss.adversarial import adaptive_weight

LARGEST_WEIGHT = 1e8


def marginal_cosine_loss(tokens: torch.Tensor, features: torch.Tensor, margin: float = 0.5) -> torch.Tensor:
    """Mean over batch and positions of relu(1 − margin − cos(token, feature)), in float32; inputs ``[B, N, D]``."""
    return F.relu(1 - margin - F.cosine_similarity(tokens.float(), features.float(), dim=-1)).mean()


def distance_matrix_loss(tokens: torch.Tensor, features: torch.Tensor, margin: float = 0.25) -> torch.Tensor:
    """Mean over the batch and all pairs of positions of one image of relu(|cos(z_i, z_j) − cos(f_i, f_j)| − margin).

    In float32: a few matrices of N² values an image, 256 KiB each at 16×16 positions, 4 MiB at 32×32.

    Args:
        tokens: z, ``[B, N, D]``.
        features: f, ``[B, N, D']``.
        margin: differences up to this are free.
    """
    difference = _cosines(tokens) - _cosines(features)  # [B, N, N]
    return F.relu(difference.abs() - margin).mean()


def _cosines(vectors: torch.Tensor) -> torch.Tensor:
    """Cosines between all positions of an image: ``[B, N, D]`` → ``[B, N, N]``."""
    with torch.autocast(vectors.device.type, enabled=False):
        unit = F.normalize(vectors.float(), dim=-1)
        return unit @ unit.transpose(1, 2)


@dataclass(frozen=True)
class VFLoss:
    """Both parts of the VF loss; they share one weight.

    Attributes:
        cosine_margin, distance_margin: of the two parts.
    """

    cosine_margin: float = 0.5
    distance_margin: float = 0.25

    def terms(self, tokens: torch.Tensor, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """Unweighted scalars of projected latents and features, ``[B, N, D]`` each, on one grid."""
        return {
            "vf_cosine": marginal_cosine_loss(tokens, features, self.cosine_margin),
            "vf_distance": distance_matrix_loss(tokens, features, self.distance_margin),
        }


def vf_weight(fidelity_gradient: torch.Tensor, alignment_gradient: torch.Tensor, values_per_image: int) -> torch.Tensor:
    """VA-VAE's balance of fidelity and VF loss, in the units of an objective that takes means.

    VA-VAE's fidelity is L1 + LPIPS *summed* over the values of an image, and its weight is ‖∇ fidelity‖ / (‖∇ VF‖ +
    1e-4), at most 1e8. This project's is the mean, smaller by the number of values, so the weight that gives the same
    balance is smaller by that number too. (Unchanged it would let the VF loss outweigh the reconstruction 20,000 times
    at 256 px, where VA-VAE means a tenth of it.)

    Args:
        fidelity_gradient: of the mean fidelity at the encoder's last weight.
        alignment_gradient: of the VF loss there.
        values_per_image: 3·H·W.

    Returns:
        a scalar without gradient.
    """
    summed = fidelity_gradient.float() * values_per_image
    return adaptive_weight(summed, alignment_gradient, LARGEST_WEIGHT) / values_per_image
