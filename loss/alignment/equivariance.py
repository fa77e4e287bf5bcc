"""EQ-VAE's regularisation (arXiv 2502.09509, section 3): latents that are scaled and turned decode to images that are.

No term is added: the VAE's own losses compare what a transformed latent decodes to with the transformed image.
"""

import argparse
import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from diffusion.draws import Draws
from loss.alignment.base import Terms, TokenGrid, TokenizerAlignment, Weights
from loss.alignment.flags import EquivarianceFlags


class Equivariance(TokenizerAlignment, EquivarianceFlags):
    """Scales and turns a micro-batch, or leaves it as it is, as the public code does.

    Args:
        probability: of a transformation.
        sides: of latents that are scaled, in positions, each equally probable, and so are the quarter turns 1 to 3;
            without any they are only turned.
    """

    def __init__(self, probability: float, sides: range):
        super().__init__()
        self.probability, self.sides = probability, sides

    @classmethod
    def from_arguments(
        cls, args: argparse.Namespace, latent_shape: tuple[int, int, int], features: Sequence[TokenGrid]
    ) -> "Equivariance":
        side = latent_shape[-1]
        return cls(args.eq_probability, range(cls.smallest_side(args, side), side))

    def view(self, latent: torch.Tensor, images: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
        """Both scaled bilinearly without antialiasing, then turned."""
        choice = random.Random(draws.generator.initial_seed())  # noqa: S311  on the host: sizes cannot wait for a GPU
        if choice.random() >= self.probability:
            return latent, images
        side, turns = choice.choice(self.sides or [latent.shape[-1]]), choice.randint(1, 3)
        pixels = images.shape[-1] * side // latent.shape[-1]
        scaled = resized(images.float(), pixels).round_().to(torch.uint8)
        return torch.rot90(resized(latent, side), turns, (-2, -1)), torch.rot90(scaled, turns, (-2, -1))

    def forward(self, latent: torch.Tensor, *context: object) -> Terms:
        """No term."""
        return {}

    def weights(self, terms: Terms, *context: object) -> Weights:
        return {}

    def describe(self) -> list[str]:
        sides = f"scaled to sides of {self.sides.start} to {self.sides.stop - 1} positions and " if self.sides else ""
        return [f"equivariance: {self.probability:.0%} of the micro-batches are {sides}turned"]


def resized(x: torch.Tensor, side: int) -> torch.Tensor:
    """``[B, C, h, w]`` → ``[B, C, side, side]``."""
    return F.interpolate(x, (side, side), mode="bilinear", align_corners=False)
