"""PatchGAN discriminator (pix2pix, arXiv 1611.07004; the layout of taming-transformers, so that its files load)."""

import torch
from torch import nn


class PatchDiscriminator(nn.Module):
    """4×4 convolutions, BatchNorm, LeakyReLU 0.2; one logit for each overlapping image patch.

    BatchNorm uses the statistics of the batch it sees: real and fake images go through in separate calls, each process
    on its own. Convolution weights start as N(0, 0.02), norm weights as N(1, 0.02).

    Args:
        width: channels of the first layer, doubled in each further one.
        num_layers: stride-2 layers.
    """

    def __init__(self, width: int = 64, num_layers: int = 3):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        channels = width
        for i in range(1, num_layers + 1):
            stride, wider = (2 if i < num_layers else 1), width * min(2**i, 8)
            layers += [
                nn.Conv2d(channels, wider, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(wider),
                nn.LeakyReLU(0.2, inplace=True),
            ]
            channels = wider
        layers.append(nn.Conv2d(channels, 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*layers)
        self.min_resolution = 3 * 2**num_layers
        self.apply(_init_weights)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images ``[B, 3, H, W]`` in [-1, 1] → logits ``[B, 1, H/8 - 2, W/8 - 2]`` (for three layers)."""
        return self.main(images)


class DiscriminatorPair(nn.Module):
    """Scores real and fake images in one forward, so that one DDP reduction covers both."""

    def __init__(self, discriminator: nn.Module):
        super().__init__()
        self.discriminator = discriminator

    def forward(self, real: torch.Tensor, fake: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Two batches ``[B, 3, H, W]`` in [-1, 1] → (logits of real, logits of fake)."""
        return self.discriminator(real), self.discriminator(fake)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
