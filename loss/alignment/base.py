"""The two seams of alignment: of a tokenizer, and of a denoiser. A method is one class that answers these questions.

Both kinds own their flags, their trainable parts and their weights. The classes are registered by name in
``loss.alignment``; who trains holds one and never asks which.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from diffusion.draws import Draws
from loss.alignment.cosine import patch_cosine
from models.denoisers import Denoiser
from models.latent_statistics import LatentStatistics
from models.tokenizers import Code, Tokenizer

Terms = dict[str, torch.Tensor]  # unweighted scalars by name
Weights = dict[str, float | torch.Tensor]


class TokenGrid(NamedTuple):
    """The tokens of a VFM, as they are known before it is run: its name, how many along a side, their channels."""

    name: str
    grid: int
    width: int


class Alignment(nn.Module):
    """What both kinds have.

    Attributes:
        DEFAULTS: of those flags that say nothing unless this alignment is chosen, by their names in ``args``; the flags
            themselves default to None, so that one which is given to another alignment is noticed.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def add_arguments(cls, group: Any) -> None:
        """Its flags."""

    @classmethod
    def check_arguments(cls, args: argparse.Namespace) -> None:
        """Refuse what cannot be meant, with its flags settled; may change ``args``."""

    @classmethod
    def resolve_arguments(cls, args: argparse.Namespace) -> None:
        """Replace those of its defaults that follow from the data (``args.resolution``)."""

    def describe(self) -> list[str]:
        """What is aligned with what, for the log."""
        return []


class TokenizerAlignment(Alignment):
    """A term of a tokenizer's objective that makes its latents easy to generate.

    Attributes:
        trains_alone: whether it makes sense with a frozen tokenizer, by parts of its own.
        score_names: what :meth:`scores` gives; empty: it predicts no features.
    """

    trains_alone: ClassVar[bool] = False
    score_names: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def features_grid(cls, args: argparse.Namespace, latent_size: int) -> int:
        """On which token grid the VFMs are wanted, for a latent of ``latent_size`` positions along a side."""
        raise NotImplementedError

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
            draws: for this batch.
        """
        raise NotImplementedError

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


class DenoiserAlignment(Alignment):
    """A term of a denoiser's objective, on hidden states; its projectors lie beside the network, never in its weights.

    Attributes:
        needs_features: whether it compares with VFM features.
        title: of the method, for the log.
        FIXED: those of its flags that a run which goes on from another one cannot change.
        taps: blocks whose output it sees, counted from 1.
        features: the VFMs that it compares with.
    """

    needs_features: ClassVar[bool] = False
    title: ClassVar[str]
    FIXED: ClassVar[tuple[str, ...]] = ()
    taps: tuple[int, ...]
    features: tuple[TokenGrid, ...] = ()

    @classmethod
    def weight_of(cls, args: argparse.Namespace) -> float:
        """Its weight by its flags; with 0 it is left out."""
        raise NotImplementedError

    @classmethod
    def from_arguments(
        cls, args: argparse.Namespace, denoiser: Denoiser, features: Sequence[TokenGrid]
    ) -> "DenoiserAlignment":
        """Build it, with random weights; may settle ``args`` that depend on the denoiser."""
        raise NotImplementedError

    def forward(
        self, states: Sequence[torch.Tensor], features: Sequence[torch.Tensor], x: torch.Tensor, t: torch.Tensor
    ) -> Terms:
        """Unweighted terms.

        Args:
            states: hidden states ``[B, grid², width]`` at :attr:`taps`.
            features: of the images, ``[B, N, D]`` for each VFM; empty unless :attr:`needs_features`.
            x: clean normalised latents ``[B, C, h, w]``.
            t: times in [0, 1], ``[B]``.
        """
        raise NotImplementedError

    def predict(self, states: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """What its projectors make of the hidden states: all that it costs beside the denoiser."""
        raise NotImplementedError

    def weights(self, terms: Terms) -> Weights:
        """A weight for each of its terms."""
        raise NotImplementedError
