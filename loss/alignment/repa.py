"""REPA (arXiv 2410.06940): hidden states of a denoiser predict VFM features of the clean image."""

import argparse
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import nn

from errors import UserError
from loss.alignment.base import DenoiserAlignment, DenoisingStep, Terms, TokenGrid, Weights
from loss.alignment.cosine import averaged, patch_cosine_loss
from loss.alignment.flags import REPAFlags
from models.denoisers import Denoiser
from models.layers import projector, xavier_linears


class REPA(DenoiserAlignment, REPAFlags):
    """A projector for each VFM, after one block.

    Attributes:
        term: name of its term.
        projector: (width of the denoiser, width of the VFM, hidden width) → a projector.

    Args:
        denoiser: tells width and blocks.
        features: of the VFMs, on the denoiser's grid.
        depth: of the block, from 1.
        width: hidden width of the projectors.
        weight: of the average over the VFMs.
    """

    takes_some_tokens = True
    term: ClassVar[str] = "repa"
    projector: ClassVar[Callable[[int, int, int], nn.Module]] = staticmethod(projector)

    def __init__(self, denoiser: Denoiser, features: Sequence[TokenGrid], depth: int, width: int, weight: float):
        super().__init__()
        if not 1 <= depth <= denoiser.depth:
            raise UserError(
                f"--encoder-depth {depth}: {denoiser.config.model} has blocks 1 to {denoiser.depth}; choose one"
            )
        self.taps, self.features, self.weight = (depth,), tuple(features), weight
        self.projectors = nn.ModuleList(self.projector(denoiser.width, vfm.width, width) for vfm in features)
        self.projectors.apply(xavier_linears)

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, denoiser: Denoiser, features: Sequence[TokenGrid]) -> "REPA":
        return cls(denoiser, features, args.encoder_depth, args.projector_width, args.proj_coeff)

    def forward(self, step: DenoisingStep) -> Terms:
        """``repa``: mean over batch and patches of 1 − cos."""
        targets = [step.at_places(target) for target in self.targets(step.features)]
        pairs = zip(self.predict(step.states), targets, strict=True)
        losses = [patch_cosine_loss(*pair) for pair in pairs]
        return averaged(self.term, [vfm.name for vfm in self.features], losses)

    def targets(self, features: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """What is to be predicted of features ``[B, N, D]``."""
        return features

    def predict(self, states: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Predicted features ``[B, N, D]`` of each VFM."""
        (state,) = states
        return [project(state) for project in self.projectors]

    def weights(self, terms: Terms) -> Weights:
        return {name: 0.0 for name in terms if name.startswith(f"{self.term}/")} | {self.term: self.weight}

    def describe(self) -> list[str]:
        names = ", ".join(vfm.name for vfm in self.features)
        return [f"{self.title} after block {self.taps[0]} with {names}, weight {self.weight:g}"]
