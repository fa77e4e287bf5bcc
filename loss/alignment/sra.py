"""SRA (arXiv 2505.02831): hidden states of a denoiser predict later ones of its own average, which sees less noise."""

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from diffusion.draws import Draws
from errors import UserError
from loss.alignment.base import DenoiserAlignment, DenoisingStep, Terms, TokenGrid, Weights
from loss.alignment.cosine import patch_cosine_loss
from loss.alignment.flags import SRA_DEPTHS, SRAFlags
from loss.alignment.vae_repa import BETA
from models.denoisers import Denoiser
from models.layers import projector, xavier_linears


class SRA(DenoiserAlignment, SRAFlags):
    """A projector predicts the averaged network's hidden state after one block from the trained one's after another.

    Args:
        denoiser: tells the width.
        depth: block of the trained network, from 1.
        teacher_depth: block of the averaged one.
        interval: the averaged network's time is earlier by a uniform number up to this, and never below 0.
        loss: ``smooth-l1`` (the paper's), or ``cosine``, which its authors have recommended since.
        weight: of the term.
    """

    takes_some_tokens = True

    def __init__(self, denoiser: Denoiser, depth: int, teacher_depth: int, interval: float, loss: str, weight: float):
        super().__init__()
        for flag, block in (("--sra-depth", depth), ("--sra-teacher-depth", teacher_depth)):
            if not 1 <= block <= denoiser.depth:
                raise UserError(f"{flag} {block}: {denoiser.config.model} has blocks 1 to {denoiser.depth}; choose one")
        self.taps, self.teacher_taps = (depth,), (teacher_depth,)
        self.interval, self.loss, self.weight = interval, loss, weight
        self.projector = projector(denoiser.width, denoiser.width, 2 * denoiser.width, layers=2)
        self.projector.apply(xavier_linears)

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, denoiser: Denoiser, features: Sequence[TokenGrid]) -> "SRA":
        depth, teacher_depth = SRA_DEPTHS
        if denoiser.depth < teacher_depth:
            depth, teacher_depth = max(1, denoiser.depth // 3), max(1, 2 * denoiser.depth // 3)
        args.sra_depth = args.sra_depth or depth
        args.sra_teacher_depth = args.sra_teacher_depth or teacher_depth
        return cls(denoiser, args.sra_depth, args.sra_teacher_depth, args.sra_interval, args.sra_loss, args.sra_coeff)

    def teacher_times(self, t: torch.Tensor, draws: Draws) -> torch.Tensor:
        earlier = self.interval * torch.rand(t.shape, generator=draws.generator, device=t.device)
        return (t - earlier).clamp_min(0)

    def forward(self, step: DenoisingStep) -> Terms:
        """``sra``: mean over batch, tokens and channels of the smooth-L1 distance, or over tokens of 1 − cos."""
        (predicted,), (state,) = self.predict(step.states), step.features
        target = step.at_places(state)
        if self.loss == "cosine":
            return {"sra": patch_cosine_loss(predicted, target)}
        return {"sra": F.smooth_l1_loss(predicted.float(), target.float(), beta=BETA)}

    def predict(self, states: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """The averaged network's hidden state ``[B, N, width]``."""
        (state,) = states
        return [self.projector(state)]

    def weights(self, terms: Terms) -> Weights:
        return {"sra": self.weight}

    def describe(self) -> list[str]:
        (depth,), (teacher_depth,) = self.taps, self.teacher_taps
        return [
            f"SRA after block {depth} with block {teacher_depth} of the averaged network, up to {self.interval:g} "
            f"earlier, {self.loss}, weight {self.weight:g}"
        ]
