"""Whether a VAE's latent moves with its image: the latent of a transformed image against the transformed latent.

EQ-VAE (arXiv 2502.09509) trains for equivariance under rotation and scale and reports better generation. The error here
is the share of the variance of the transformed image's latent that the transformed latent leaves unexplained: 0 is
exact, 1 no better than a constant. Latents are compared without randomness and normalised.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Transform:
    """One of images and the one of latents that goes with it.

    Attributes:
        of_images: uint8 ``[n, 3, H, W]``, and the pixels along a side of a position of the latent → as many images.
        of_latents: the latents of the images and of the transformed ones → two tensors that are equal if exact.
        scale: of the side of the images.
    """

    of_images: Callable[[Tensor, int], Tensor]
    of_latents: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    scale: float = 1.0


def shifted(images: Tensor, pixels: int) -> Tensor:
    """To the right and down; the border is repeated."""
    return F.pad(images.float(), (pixels, 0, pixels, 0), mode="replicate")[..., :-pixels, :-pixels].to(images.dtype)


def halved(images: Tensor) -> Tensor:
    """Means of 2×2 pixels, rounded."""
    return F.avg_pool2d(images.float(), 2).round().to(images.dtype)


TRANSFORMS = {
    "flip": Transform(lambda images, _: images.flip(3), lambda plain, moved: (plain.flip(3), moved)),
    "rotation": Transform(
        lambda images, _: images.rot90(1, (2, 3)), lambda plain, moved: (plain.rot90(1, (2, 3)), moved)
    ),
    "shift": Transform(shifted, lambda plain, moved: (plain[..., :-1, :-1], moved[..., 1:, 1:])),
    "scale": Transform(lambda images, _: halved(images), lambda plain, moved: (F.avg_pool2d(plain, 2), moved), 0.5),
}


def unexplained_share(expected: Tensor, found: Tensor) -> float:
    """Σ|found − expected|² / Σ|found − its channel's mean|² of ``[N, C, h, w]``; NaN where ``found`` is constant."""
    expected, found = expected.double(), found.double()
    variance = (found - found.mean((0, 2, 3), keepdim=True)).square().sum()
    return float((found - expected).square().sum() / variance) if variance > 0 else float("nan")
