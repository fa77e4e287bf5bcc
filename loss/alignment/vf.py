"""VA-VAE's direct alignment of a latent with VFM features (arXiv 2501.01423): the VF loss and its weight."""

import argparse
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from diffusion.draws import Draws
from loss.adversarial import adaptive_weight
from loss.alignment.base import FeaturePrediction, Terms, TokenGrid, Weights
from loss.alignment.cosine import averaged
from loss.alignment.flags import VFFlags
from models.latent_statistics import LatentStatistics
from models.mapper import LinearMapper
from models.tokenizers import Code, Tokenizer

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


class VFAlignment(FeaturePrediction, VFFlags):
    """Projected latents, un-normalised and without noise, on the VFM's features at every position.

    Both parts share one weight, which keeps their gradient in the encoder's last layer at ``weight`` times that of the
    fidelity. With gradient accumulation every micro-batch has a weight of its own, as with the adaptive GAN weight;
    over processes it is that of the global micro-batch (VA-VAE has one for each process).

    Args:
        projections: for each VFM, latent ``[B, C, h, w]`` → tokens ``[B, h·w, D]``.
        features: of the VFMs.
        weight: in units of the fidelity's gradient.
        cosine_margin, distance_margin: of the two parts.
        values_per_image: 3·H·W.
    """

    def __init__(
        self,
        projections: Sequence[nn.Module],
        features: Sequence[TokenGrid],
        weight: float,
        cosine_margin: float,
        distance_margin: float,
        values_per_image: int,
    ):
        super().__init__(projections, features)
        self.weight, self.values_per_image = weight, values_per_image
        self.cosine_margin, self.distance_margin = cosine_margin, distance_margin

    @classmethod
    def from_arguments(
        cls, args: argparse.Namespace, latent_shape: tuple[int, int, int], features: Sequence[TokenGrid]
    ) -> "VFAlignment":
        projections = [LinearMapper(latent_shape[0], vfm.width) for vfm in features]
        weight = args.align_coeff * args.vf_weight
        values = 3 * args.resolution**2
        return cls(projections, features, weight, args.vf_cosine_margin, args.vf_distance_margin, values)

    def forward(
        self,
        latent: torch.Tensor,
        statistics: LatentStatistics,
        features: Sequence[torch.Tensor],
        labels: torch.Tensor,
        draws: Draws,
    ) -> Terms:
        """``vf_cosine`` and ``vf_distance``."""
        pairs = list(zip(self.predict(latent), features, strict=True))
        cosines = [marginal_cosine_loss(*pair, self.cosine_margin) for pair in pairs]
        distances = [distance_matrix_loss(*pair, self.distance_margin) for pair in pairs]
        return averaged("vf_cosine", self.names, cosines) | averaged("vf_distance", self.names, distances)

    def weights(
        self,
        terms: Terms,
        fidelity: torch.Tensor | None,
        tokenizer: Tokenizer,
        gradient: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> Weights:
        """One for both parts, see :func:`vf_weight`."""
        layer = tokenizer.encoder_last_layer
        alignment = terms["vf_cosine"] + terms["vf_distance"]
        factor = vf_weight(gradient(fidelity, layer), gradient(alignment, layer), self.values_per_image)
        return dict.fromkeys(terms, 0.0) | dict.fromkeys(("vf_cosine", "vf_distance"), self.weight * factor)

    def varying(self, weights: Weights) -> Terms:
        return {"vf_weight": weights["vf_cosine"]}

    def scores(
        self, code: Code, statistics: LatentStatistics, features: Sequence[torch.Tensor], draws: Draws
    ) -> dict[str, list[torch.Tensor]]:
        """Mean cosine of a sample, and of the latent without randomness."""
        return {
            "align_cosine": self.cosines(code.sample(draws.posterior), features),
            "align_cosine_clean": self.cosines(code.mode, features),
        }

    def describe(self) -> list[str]:
        return [
            f"alignment: latent → 1×1 convolution → {self.targets()}; margins {self.cosine_margin:g} and "
            f"{self.distance_margin:g}, weight {self.weight:g} in proportion to the fidelity"
        ]
