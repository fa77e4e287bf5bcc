"""How VFM features are scaled before anything is aligned with them."""

from collections.abc import Sequence

import torch
from torch import nn

from models.latent_statistics import latent_moments, mean_and_variance

# A channel that hardly varies is not blown up beyond this: the smallest deviation, in units of the mean one.
SMALLEST_DEVIATION = 1e-3


def spatially_standardised(tokens: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
    """Each channel over the tokens of its image: ``(x − γ·mean) / (std + 1e-6)``, float32 (iREPA, arXiv 2512.10794).

    What all tokens of an image have in common goes, and with it most of what a classifier reads; how tokens differ from
    each other stays.

    Args:
        tokens: ``[B, N, D]``.
        strength: γ, how much of the mean is taken away.
    """
    tokens = tokens.float()
    mean, std = tokens.mean(1, keepdim=True), tokens.std(1, keepdim=True)
    return (tokens - strength * mean) / (std + 1e-6)


class SpatialNorm(nn.Module):
    """:func:`spatially_standardised` features of each VFM; nothing is measured."""

    is_measured = False

    def forward(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """``[B, N, D]`` of each VFM."""
        return [spatially_standardised(part) for part in features]


class FeatureNorm(nn.Module):
    """Standardisation of the features of each VFM by statistics over images; as they are until those are loaded.

    Much of some VFMs' features is the same for every image, so that a constant already has a high cosine with them
    (EfficientNet-Lite0: 0.65 to 0.8). Without that part the cosine says what is known of the image.

    Args:
        shapes: tokens N and channels D of each VFM.
        per_token: every token has statistics of its own, so that what depends on the position alone goes too; else all
            tokens share those of a channel.
    """

    is_measured = True

    def __init__(self, shapes: Sequence[tuple[int, int]], per_token: bool = False):
        super().__init__()
        self.count, self.per_token = len(shapes), per_token
        for number, (tokens, width) in enumerate(shapes):
            shape = (tokens, width) if per_token else (width,)
            self.register_buffer(f"mean_{number}", torch.zeros(shape))
            self.register_buffer(f"std_{number}", torch.ones(shape))

    def forward(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """``[B, N, D]`` of each VFM → zero mean and unit variance a channel (of a token), float32."""
        return [
            (part.float() - self.get_buffer(f"mean_{number}")) / self.get_buffer(f"std_{number}")
            for number, part in enumerate(features)
        ]

    def moments(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What :meth:`load` takes, of a batch: additive, float64 on each VFM's ``[B, N, D]``."""
        channels_first = (part.flatten(1).unsqueeze(-1) if self.per_token else part.mT for part in features)
        return [latent_moments(part.unsqueeze(-1)) for part in channels_first]

    def load(self, moments: Sequence[torch.Tensor]) -> None:
        """Take the statistics from :meth:`moments` summed over batches."""
        for number, sums in enumerate(moments):
            mean_there, std_there = self.get_buffer(f"mean_{number}"), self.get_buffer(f"std_{number}")
            mean, var = mean_and_variance(sums)
            std = var.sqrt()
            mean_there.copy_(mean.view_as(mean_there))
            std_there.copy_(std.clamp_min(SMALLEST_DEVIATION * std.mean()).view_as(std_there))
