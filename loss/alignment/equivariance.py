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
    """Scales and turns the latents of a micro-batch, or scales its images, or leaves both, as the public code does.

    Args:
        probability: that latents are transformed.
        sides: of latents that are scaled, in positions, up to the whole side, which is none of them; each is equally
            probable, and so are the quarter turns 1 to 3. Without any, latents are only turned.
        image_probability: that images are scaled before they are encoded, where their latents are not transformed.
    """

    def __init__(self, probability: float, sides: range, image_probability: float = 0.0):
        super().__init__()
        self.probability, self.sides, self.image_probability = probability, sides, image_probability

    @classmethod
    def from_arguments(
        cls, args: argparse.Namespace, latent_shape: tuple[int, int, int], features: Sequence[TokenGrid]
    ) -> "Equivariance":
        side = latent_shape[-1]
        return cls(args.eq_probability, range(cls.smallest_side(args, side), side), args.eq_image_probability)

    def encoded(self, images: torch.Tensor, draws: Draws) -> torch.Tensor:
        """Scaled bilinearly without antialiasing, in some of the micro-batches that :meth:`view` leaves."""
        choice = host_choice(draws)
        if choice.random() < self.probability or choice.random() >= self.image_probability or not self.sides:
            return images
        return resized_images(images, images.shape[-1] * choice.choice(self.sides) // self.sides.stop)

    def view(self, latent: torch.Tensor, images: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
        """Both scaled bilinearly without antialiasing, then turned."""
        choice = host_choice(draws)
        if choice.random() >= self.probability:
            return latent, images
        side, turns = choice.choice(self.sides or [latent.shape[-1]]), choice.randint(1, 3)
        scaled = resized_images(images, images.shape[-1] * side // latent.shape[-1])
        return torch.rot90(resized(latent, side), turns, (-2, -1)), torch.rot90(scaled, turns, (-2, -1))

    def forward(self, latent: torch.Tensor, *context: object) -> Terms:
        """No term."""
        return {}

    def weights(self, terms: Terms, *context: object) -> Weights:
        return {}

    def describe(self) -> list[str]:
        sides = f"scaled to sides of {self.sides.start} to {self.sides.stop - 1} positions and " if self.sides else ""
        lines = [f"equivariance: {self.probability:.0%} of the micro-batches are {sides}turned"]
        if self.image_probability and self.sides and self.probability < 1:
            lines.append(f"equivariance: images of {self.image_probability:.0%} of the others are scaled")
        return lines


def host_choice(draws: Draws) -> random.Random:
    """Choices of this step, the same at each call, and on the host: sizes cannot wait for a GPU."""
    return random.Random(draws.generator.initial_seed())  # noqa: S311


def resized_images(images: torch.Tensor, side: int) -> torch.Tensor:
    """uint8 ``[B, 3, H, W]`` → ``[B, 3, side, side]``, rounded."""
    return resized(images.float(), side).round_().to(torch.uint8)


def resized(x: torch.Tensor, side: int) -> torch.Tensor:
    """``[B, C, h, w]`` → ``[B, C, side, side]``."""
    return F.interpolate(x, (side, side), mode="bilinear", align_corners=False)
