"""Send-VAE's alignment (arXiv 2601.05823, section 3): a mapper predicts VFM features from noisy latents."""

import argparse
from collections.abc import Sequence

import torch
from torch import nn

from diffusion.draws import Draws
from diffusion.flow import add_noise, training_times
from loss.alignment.base import FeaturePrediction, Terms, TokenGrid, Weights
from loss.alignment.cosine import averaged, patch_cosine_loss
from loss.alignment.flags import MapperFlags
from models.latent_statistics import LatentStatistics, standardised
from models.mapper import Mapper
from models.tokenizers import Code


class MapperAlignment(FeaturePrediction, MapperFlags):
    """One mapper for each VFM, on normalised latents, with noise of a random time or without.

    Args:
        mappers: in the order of the features.
        features: of the VFMs.
        weight: of the average over the VFMs.
        path_type: ``linear`` or ``cosine`` interpolant; None: no noise is added.
        times: what ``diffusion.flow.training_times`` makes times of draws by: weighting and shift.
        latest: time, in whose range all are scaled.
        statistics: ``running`` or ``batch``: by which latents are normalised in training. Running ones are constants to
            the gradient, which then makes latents larger and larger, as that drowns the noise; their own mean and
            variance, of the micro-batch on one process, leave the alignment nothing to gain from scale.
    """

    def __init__(
        self,
        mappers: Sequence[nn.Module],
        features: Sequence[TokenGrid],
        weight: float,
        path_type: str | None,
        times: tuple[str, float] = ("uniform", 1.0),
        latest: float = 1.0,
        statistics: str = "running",
    ):
        super().__init__(mappers, features)
        self.weight, self.path_type, self.times, self.latest = weight, path_type, times, latest
        self.by_batch = statistics == "batch"

    @classmethod
    def from_arguments(
        cls, args: argparse.Namespace, latent_shape: tuple[int, int, int], features: Sequence[TokenGrid]
    ) -> "MapperAlignment":
        channels, side, _ = latent_shape
        sizes = args.mapper_depth, args.mapper_width, args.mapper_head
        mappers = [Mapper(channels, side, vfm.grid, vfm.width, *sizes) for vfm in features]
        path_type, times = args.path_type if args.noise_injection else None, (args.noise_times, args.noise_shift)
        return cls(mappers, features, args.align_coeff, path_type, times, args.noise_max, args.noise_statistics)

    def forward(
        self,
        latent: torch.Tensor,
        statistics: LatentStatistics,
        features: Sequence[torch.Tensor],
        labels: torch.Tensor,
        draws: Draws,
    ) -> Terms:
        """``alignment``: mean over batch and patches of 1 − cos."""
        tokens = self.predict(self.noisy(latent, statistics, draws))
        losses = [patch_cosine_loss(*pair) for pair in zip(tokens, features, strict=True)]
        return averaged("alignment", self.names, losses)

    def weights(self, terms: Terms, *context: object) -> Weights:
        return dict.fromkeys(terms, 0.0) | {"alignment": self.weight}

    def scores(
        self, code: Code, statistics: LatentStatistics, features: Sequence[torch.Tensor], draws: Draws
    ) -> dict[str, list[torch.Tensor]]:
        """Mean cosine with noise as in training, and of the latent without randomness and noise."""
        return {
            "align_cosine": self.cosines(self.noisy(code.sample(draws.posterior), statistics, draws), features),
            "align_cosine_clean": self.cosines(statistics.normalize(code.mode), features),
        }

    def noisy(self, latent: torch.Tensor, statistics: LatentStatistics, draws: Draws) -> torch.Tensor:
        """What the mappers see in training: normalised, and with noise where that is switched on."""
        z = standardised(latent) if self.by_batch and self.training else statistics.normalize(latent)
        if self.path_type is None:
            return z
        weighting, shift = self.times
        t = self.latest * training_times(draws.times, weighting, self.path_type, shift)
        return add_noise(z, t, draws.noise, self.path_type)

    def describe(self) -> list[str]:
        noise = "" if self.path_type is None else f" with noise on the {self.path_type} path"
        return [f"alignment: latent{noise} → mapper → {self.targets()}; 1 − cosine with weight {self.weight:g}"]
