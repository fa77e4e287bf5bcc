"""The two seams of alignment: of a tokenizer, and of a denoiser. A method is one class that answers these questions.

Both kinds own their flags (``loss.alignment.flags``), their trainable parts and their weights. They are registered by
name in ``loss.alignment``; who trains holds one and never asks which.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import nn

from diffusion.draws import Draws
from loss.alignment.cosine import patch_cosine
from loss.alignment.flags import DenoiserAlignmentFlags, TokenizerAlignmentFlags
from models.denoisers import Denoiser
from models.denoisers.sprint import Route, select
from models.latent_statistics import LatentStatistics
from models.tokenizers import Code, Tokenizer

Terms = dict[str, torch.Tensor]  # unweighted scalars by name
Weights = dict[str, float | torch.Tensor]


class TokenGrid(NamedTuple):
    """The tokens of a VFM, as they are known before it is run: its name, how many along a side, their channels."""

    name: str
    grid: int
    width: int


class TokenizerAlignment(nn.Module, TokenizerAlignmentFlags):
    """A term of a tokenizer's objective that makes its latents easy to generate.

    Attributes:
        score_names: what :meth:`scores` gives; empty: it predicts no features.
    """

    score_names: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_arguments(
        cls, args: argparse.Namespace, latent_shape: tuple[int, int, int], features: Sequence[TokenGrid]
    ) -> "TokenizerAlignment":
        """Build it, with random weights."""
        raise NotImplementedError

    def forward(
        self,
        latent: torch.Tensor,
        statistics: LatentStatistics,
        features: Sequence[torch.Tensor],
        labels: torch.Tensor,
        draws: Draws,
    ) -> Terms:
        """Unweighted terms.

        Args:
            latent: un-normalised samples ``[B, C, h, w]``; gradients flow into the tokenizer.
            statistics: normalise them.
            features: of the images, ``[B, N, D]`` for each VFM.
            labels: int64 ``[B]``.
            draws: for this batch; random numbers of its own come from ``draws.generator``.
        """
        raise NotImplementedError

    def encoded(self, images: torch.Tensor, draws: Draws) -> torch.Tensor:
        """The images that are encoded: by default as they are; smaller ones only with ``keeps_size = False``.

        The draws of :meth:`view` and :meth:`forward` are then of their latent's size; features are of the given ones.

        Args:
            images: uint8 ``[B, 3, H, W]``.
            draws: as in :meth:`forward`.
        """
        return images

    def view(self, latent: torch.Tensor, images: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
        """What is decoded, and the images that it shall be: both transformed alike, or by default as they are.

        Args:
            latent: as in :meth:`forward`, which is given the one that is not transformed.
            images: uint8 ``[B, 3, H, W]``, as :meth:`encoded`.
            draws: as in :meth:`forward`.
        """
        return latent, images

    def weights(
        self,
        terms: Terms,
        fidelity: torch.Tensor | None,
        tokenizer: Tokenizer,
        gradient: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> Weights:
        """A weight for each of its terms.

        Args:
            terms: from :meth:`forward`.
            fidelity: the weighted pixel terms of the objective, a scalar; None where the tokenizer is frozen.
            tokenizer: tells the layers where gradients may be compared.
            gradient: (scalar, parameter) → its gradient there, averaged over processes; keeps the graph.
        """
        raise NotImplementedError

    def describe(self) -> list[str]:
        """What is aligned with what, for the log."""
        return []

    def varying(self, weights: Weights) -> Terms:
        """Those of the weights that change from step to step, by the name under which they are logged."""
        return {}

    def scores(
        self, code: Code, statistics: LatentStatistics, features: Sequence[torch.Tensor], draws: Draws
    ) -> dict[str, list[torch.Tensor]]:
        """How well held-out features are predicted, ``[B]`` for each VFM, higher is better.

        Args:
            code: the encoded images.
            statistics, features, draws: as in :meth:`forward`.
        """
        return {}


class FeaturePrediction(TokenizerAlignment):
    """What alignments share whose mappers make VFM features of a latent.

    Args:
        mappers: latent ``[B, C, h, w]`` → tokens ``[B, N, D]``, one for each VFM.
        features: of the VFMs, in the same order.
    """

    score_names = ("align_cosine", "align_cosine_clean")

    def __init__(self, mappers: Sequence[nn.Module], features: Sequence[TokenGrid]):
        super().__init__()
        self.mappers, self.features = nn.ModuleList(mappers), tuple(features)

    @property
    def names(self) -> list[str]:
        return [vfm.name for vfm in self.features]

    def predict(self, z: torch.Tensor) -> list[torch.Tensor]:
        """Features ``[B, N, D]`` of each VFM; float32, cast once, so that several losses' gradients add in it."""
        return [mapper(z).float() for mapper in self.mappers]

    def cosines(self, z: torch.Tensor, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Mean cosine ``[B]`` of predicted and true features, for each VFM."""
        return [patch_cosine(*pair).mean(1) for pair in zip(self.predict(z), features, strict=True)]

    def targets(self) -> str:
        """What is predicted, in words."""
        return ", ".join(f"{vfm.grid}×{vfm.grid} tokens of {vfm.width} ({vfm.name})" for vfm in self.features)


class DenoisingStep(NamedTuple):
    """What an alignment of a denoiser sees of a micro-batch.

    Attributes:
        x: clean normalised latents ``[B, C, h, w]``.
        t: times in [0, 1], ``[B]``.
        labels: int64 ``[B]``; the null class where the label was dropped.
        draws: for this batch; random numbers of its own come from ``draws.generator``.
        target: the true velocity of the latents ``[B, C, h, w]``.
        features: of the images, ``[B, N, D]`` for each VFM, where the alignment needs them; then the averaged network's
            hidden states ``[B, grid², width]`` at its ``teacher_taps``, without gradient. None: nothing is aligned.
        states: hidden states ``[B, grid², width]`` at its ``taps``; of fewer tokens where ``places`` says so.
        velocity: as predicted, ``[B, C, h, w]``.
        route: of the tokens through a network with SPRINT, or None.
        places: of each state's tokens in the grid, int64 ``[B, n]``; None: it has all.
    """

    x: torch.Tensor
    t: torch.Tensor
    labels: torch.Tensor
    draws: Draws
    target: torch.Tensor
    features: Sequence[torch.Tensor] | None
    states: Sequence[torch.Tensor] = ()
    velocity: torch.Tensor | None = None
    route: Route | None = None
    places: Sequence[torch.Tensor | None] = ()

    def at_places(self, tokens: torch.Tensor, number: int = 0) -> torch.Tensor:
        """Those of tokens ``[B, grid², D]`` that the state of this number has: all, but for SPRINT's middle blocks."""
        return select(tokens, self.places[number] if self.places else None)


class DenoiserAlignment(nn.Module, DenoiserAlignmentFlags):
    """A term of a denoiser's objective, on hidden states or the velocity; its projectors are no part of the network.

    Attributes:
        taps: blocks whose output it sees, counted from 1.
        features: the VFMs that it compares with.
        teacher_taps: blocks of the averaged network (the first ``--ema-decay``) whose output it compares with, counted
            from 1; that network sees the same latents, noise and labels at :meth:`teacher_times`.
        takes_some_tokens: whether its states may lack tokens (SPRINT): it then compares them with
            ``DenoisingStep.at_places``.
    """

    takes_some_tokens: ClassVar[bool] = False
    taps: tuple[int, ...]
    features: tuple[TokenGrid, ...] = ()
    teacher_taps: tuple[int, ...] = ()

    @classmethod
    def from_arguments(
        cls, args: argparse.Namespace, denoiser: Denoiser, features: Sequence[TokenGrid]
    ) -> "DenoiserAlignment":
        """Build it, with random weights; may settle ``args`` that depend on the denoiser."""
        raise NotImplementedError

    def forward(self, step: DenoisingStep) -> Terms:
        """Unweighted terms."""
        raise NotImplementedError

    def teacher_times(self, t: torch.Tensor, draws: Draws) -> torch.Tensor:
        """Times in [0, 1] ``[B]`` at which the averaged network sees what the trained one sees at ``t``: the same."""
        return t

    def describe(self) -> list[str]:
        """What is aligned with what, for the log."""
        return []

    def predict(self, states: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """What its projectors make of the hidden states: all that it costs on top of the denoiser."""
        return []

    def weights(self, terms: Terms) -> Weights:
        """A weight for each of its terms."""
        raise NotImplementedError
