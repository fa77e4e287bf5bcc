"""REPA (arXiv 2410.06940): hidden states of a denoiser predict VFM features of the clean image."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from errors import UserError
from loss.alignment.base import DenoiserAlignment, Terms, TokenGrid, Weights
from loss.alignment.cosine import averaged, patch_cosine_loss
from models.denoisers import Denoiser
from models.layers import projector, xavier_linears
from runtime.cli import non_negative_float, positive_int


class REPA(DenoiserAlignment):
    """A projector for each VFM, after one block.

    Args:
        denoiser: tells width and blocks.
        features: of the VFMs, on the denoiser's grid.
        depth: of the block, from 1.
        width: hidden width of the projectors.
        weight: of the average over the VFMs.
    """

    needs_features = True
    title = "REPA"
    FIXED = ("encoder_depth", "projector_width")
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"proj_coeff": 0.5}

    def __init__(self, denoiser: Denoiser, features: Sequence[TokenGrid], depth: int, width: int, weight: float):
        super().__init__()
        if not 1 <= depth <= denoiser.depth:
            raise UserError(
                f"--encoder-depth {depth}: {denoiser.config.model} has blocks 1 to {denoiser.depth}; choose one"
            )
        self.taps, self.features, self.weight = (depth,), tuple(features), weight
        self.projectors = nn.ModuleList(projector(denoiser.width, vfm.width, width) for vfm in features)
        self.projectors.apply(xavier_linears)

    @classmethod
    def add_arguments(cls, group: Any) -> None:
        group.add_argument(
            "--proj-coeff",
            type=non_negative_float,
            metavar="X",
            help="weight of REPA in the denoiser's loss; 0: none (default: 0.5)",
        )
        group.add_argument(
            "--encoder-depth", type=positive_int, default=8, metavar="N", help="block whose output is aligned, from 1"
        )
        group.add_argument(
            "--projector-width", type=positive_int, default=2048, metavar="N", help="hidden width of the projectors"
        )

    @classmethod
    def weight_of(cls, args: argparse.Namespace) -> float:
        return args.proj_coeff

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, denoiser: Denoiser, features: Sequence[TokenGrid]) -> "REPA":
        return cls(denoiser, features, args.encoder_depth, args.projector_width, args.proj_coeff)

    def forward(
        self, states: Sequence[torch.Tensor], features: Sequence[torch.Tensor], x: torch.Tensor, t: torch.Tensor
    ) -> Terms:
        """``repa``: mean over batch and patches of 1 − cos."""
        losses = [patch_cosine_loss(*pair) for pair in zip(self.predict(states), features, strict=True)]
        return averaged("repa", [vfm.name for vfm in self.features], losses)

    def predict(self, states: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Predicted features ``[B, N, D]`` of each VFM."""
        (state,) = states
        return [project(state) for project in self.projectors]

    def weights(self, terms: Terms) -> Weights:
        return {name: 0.0 for name in terms if name.startswith("repa/")} | {"repa": self.weight}

    def describe(self) -> list[str]:
        names = ", ".join(vfm.name for vfm in self.features)
        return [f"REPA after block {self.taps[0]} with {names}, weight {self.weight:g}"]
