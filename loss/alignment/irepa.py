"""iREPA (arXiv 2512.10794): REPA for the spatial structure of a VFM's features, not for what they say of the image."""

import argparse
from collections.abc import Sequence
from typing import ClassVar

import torch

from errors import UserError
from loss.alignment.base import TokenGrid
from loss.alignment.flags import IREPAFlags
from loss.alignment.repa import REPA
from models.denoisers import Denoiser
from models.feature_norm import spatially_standardised
from models.layers import TokenConvolution


class IREPA(IREPAFlags, REPA):
    """A 3×3 convolution for each VFM, after one block, towards features that are standardised over space.

    Args:
        denoiser, features, depth, weight: as REPA's.
        strength: how much of an image's mean feature is taken away.
    """

    takes_some_tokens = False  # neighbours are convolved
    term: ClassVar[str] = "irepa"

    def __init__(self, denoiser: Denoiser, features: Sequence[TokenGrid], depth: int, weight: float, strength: float):
        super().__init__(denoiser, features, depth, 0, weight)
        if any(vfm.grid == 1 for vfm in features):
            raise UserError(
                "--align irepa compares the tokens of an image, and here it has one: take a smaller patch, or repa"
            )
        self.strength = strength

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, denoiser: Denoiser, features: Sequence[TokenGrid]) -> "IREPA":
        return cls(denoiser, features, args.encoder_depth, args.irepa_coeff, args.irepa_strength)

    @staticmethod
    def projector(in_features: int, out_features: int, width: int) -> TokenConvolution:
        """It has no hidden width."""
        return TokenConvolution(in_features, out_features)

    def targets(self, features: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return [spatially_standardised(part, self.strength) for part in features]
