"""VAE-REPA (SRA 2, arXiv 2601.17830): hidden states of a diffusion transformer aligned with the VAE's own latents."""

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from errors import UserError
from loss.alignment.base import DenoiserAlignment, DenoisingStep, Terms, TokenGrid, Weights
from loss.alignment.flags import DEEP, DEPTHS, VAEREPAFlags
from models.denoisers import Denoiser
from models.layers import projector, unpatchify, xavier_linears

BETA = 0.05
LAYERS = 5  # linear ones of the projector
# The hidden width is not published: this costs XL/2 the published 4 %.
WIDTH = 2  # in widths of the denoiser


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


class VAEREPA(DenoiserAlignment, VAEREPAFlags):
    """A projector predicts the clean latent from the hidden state of one block.

    Args:
        denoiser: tells width, grid and latent.
        depth: of the block, from 1.
        width: hidden width of the projector.
        times: lowest and highest time that counts.
        weight: of the term.
    """

    def __init__(self, denoiser: Denoiser, depth: int, width: int, times: Sequence[float], weight: float):
        super().__init__()
        if not 1 <= depth <= denoiser.depth:
            raise UserError(
                f"--vae-repa-depth {depth}: {denoiser.config.model} has blocks 1 to {denoiser.depth}; choose one"
            )
        self.taps, self.times, self.weight = (depth,), tuple(times), weight
        self._shape = denoiser.latent_shape
        channels, height, _ = denoiser.latent_shape
        patch = height // denoiser.grid
        self.projector = projector(denoiser.width, patch * patch * channels, width, LAYERS)
        self.projector.apply(xavier_linears)

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, denoiser: Denoiser, features: Sequence[TokenGrid]) -> "VAEREPA":
        args.vae_repa_depth = args.vae_repa_depth or DEPTHS[denoiser.depth > DEEP]
        args.vae_repa_width = args.vae_repa_width or WIDTH * denoiser.width
        return cls(denoiser, args.vae_repa_depth, args.vae_repa_width, args.vae_repa_times, args.vae_repa_coeff)

    def forward(self, step: DenoisingStep) -> Terms:
        """``vae_repa``: see :func:`latent_alignment_loss`."""
        (predicted,) = self.predict(step.states)
        return {"vae_repa": latent_alignment_loss(predicted, step.x, step.t, *self.times)}

    def predict(self, states: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """The clean normalised latent ``[B, C, h, w]``."""
        (state,) = states
        return [unpatchify(self.projector(state), self._shape)]

    def weights(self, terms: Terms) -> Weights:
        return {"vae_repa": self.weight}

    def describe(self) -> list[str]:
        low, high = self.times
        return [f"VAE-REPA after block {self.taps[0]}, times {low:g} to {high:g}, weight {self.weight:g}"]
