"""REPA-E's alignment of a VAE (arXiv 2504.10483): its latents predict VFM features through a frozen denoiser."""

from collections.abc import Callable, Sequence

import torch

from diffusion.draws import Draws
from diffusion.flow import add_noise
from loss.alignment.base import Terms, TokenizerAlignment, Weights
from loss.alignment.cosine import averaged, patch_cosine_loss
from loss.alignment.repa import REPA
from models.denoisers import Denoiser
from models.latent_statistics import LatentStatistics


class ThroughDenoiser(TokenizerAlignment):
    """The first blocks and the projectors of a denoiser that trains along; nothing of it is trained by this loss.

    No label is dropped, and latents are normalised by the running statistics as constants. The denoiser belongs to its
    own optimizer, so that it is not a submodule here; the caller freezes it.

    Args:
        denoiser: the network.
        repa: its projectors.
        weight: of the average over the VFMs.
        times: what ``Draws.times`` holds → times.
        path_type: the interpolant.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        repa: REPA,
        weight: float,
        times: Callable[[torch.Tensor], torch.Tensor],
        path_type: str,
    ):
        super().__init__()
        self._networks = (denoiser, repa)  # a tuple is not registered
        self.weight, self._times, self._path_type = weight, times, path_type

    def forward(
        self,
        latent: torch.Tensor,
        statistics: LatentStatistics,
        features: Sequence[torch.Tensor],
        labels: torch.Tensor,
        draws: Draws,
    ) -> Terms:
        """``alignment``: mean over batch and patches of 1 − cos."""
        denoiser, repa = self._networks
        t = self._times(draws.times)
        noisy = add_noise(statistics.normalize(latent), t, draws.noise, self._path_type)
        tokens = repa.predict(denoiser.hidden_states(noisy, t, labels, repa.taps))
        losses = [patch_cosine_loss(*pair) for pair in zip(tokens, features, strict=True)]
        return averaged("alignment", [vfm.name for vfm in repa.features], losses)

    def weights(self, terms: Terms, *context: object) -> Weights:
        return dict.fromkeys(terms, 0.0) | {"alignment": self.weight}

    def describe(self) -> list[str]:
        names = ", ".join(vfm.name for vfm in self._networks[1].features)
        return [f"the VAE is aligned with {names} through block {self._networks[1].taps[0]}, weight {self.weight:g}"]
