"""Alignment of latents and of hidden states: one file a method, one line in a registry."""

import argparse
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from errors import UserError
from loss.alignment.base import Alignment, DenoiserAlignment, Terms, TokenGrid, TokenizerAlignment, Weights
from loss.alignment.mapper import MapperAlignment
from loss.alignment.repa import REPA
from loss.alignment.vae_repa import VAEREPA
from loss.alignment.vf import VFAlignment
from models.denoisers import Denoiser

__all__ = [
    "DENOISER_ALIGNMENTS",
    "NONE",
    "TOKENIZER_ALIGNMENTS",
    "Alignment",
    "DenoiserAlignment",
    "DenoiserAlignments",
    "Terms",
    "TokenGrid",
    "TokenizerAlignment",
    "Weights",
    "build_denoiser_alignment",
    "parse_sum",
    "settle_arguments",
]

TOKENIZER_ALIGNMENTS: dict[str, type[TokenizerAlignment]] = {  # --align-loss of train_sendvae.py
    "cosine": MapperAlignment,
    "vf": VFAlignment,
}
DENOISER_ALIGNMENTS: dict[str, type[DenoiserAlignment]] = {"repa": REPA, "vae": VAEREPA}  # --align of train_ldm.py
NONE = "none"


def settle_arguments(
    args: argparse.Namespace, chosen: Sequence[str], registry: Mapping[str, type[Alignment]], flag: str
) -> None:
    """Give the flags of the chosen alignments their defaults, and refuse those of others.

    Args:
        args: flags, None where they are not given.
        chosen: names of the registry.
        registry: all there are.
        flag: that chooses, for messages.

    Raises:
        UserError: a flag of an alignment that was not chosen, or values that cannot be meant.
    """
    owned = {name for key in chosen for name in registry[key].DEFAULTS}
    for key, cls in registry.items():
        for name in cls.DEFAULTS:
            value = getattr(args, name, None)
            # A switch that is off and a weight of 0 ask for nothing; a depth of 0 does.
            asks = value is not None and value is not False and not (isinstance(value, float) and value == 0)
            if name not in owned and asks:
                given = f"--{name.replace('_', '-')}"
                raise UserError(
                    f"{given} belongs to {flag} {key}, not to {flag} {'+'.join(chosen) or NONE}: leave it out, or "
                    "choose that alignment"
                )
    for key in chosen:
        for name, default in registry[key].DEFAULTS.items():
            if getattr(args, name) is None:
                setattr(args, name, default)
        registry[key].check_arguments(args)


def parse_sum(text: str) -> list[str]:
    """``repa+vae`` → its names in the registry's order; none of ``none``.

    Raises:
        UserError: an unknown name.
    """
    names = [] if text == NONE else text.split("+")
    for name in names:
        if name not in DENOISER_ALIGNMENTS:
            known = ", ".join(DENOISER_ALIGNMENTS)
            raise UserError(f"--align {text}: {name!r} is not known; give {known}, a sum such as repa+vae, or {NONE}")
    return [name for name in DENOISER_ALIGNMENTS if name in names]


class DenoiserAlignments(nn.ModuleDict):
    """A sum of alignments of a denoiser, by their names; of none too.

    Args:
        parts: in the order of their terms.
    """

    def __init__(self, parts: Mapping[str, DenoiserAlignment]):
        super().__init__(parts)
        self.taps = tuple(tap for part in self.values() for tap in part.taps)

    @property
    def needs_features(self) -> bool:
        return any(part.needs_features for part in self.values())

    def forward(
        self, states: Sequence[torch.Tensor], features: Sequence[torch.Tensor], x: torch.Tensor, t: torch.Tensor
    ) -> Terms:
        """As :meth:`DenoiserAlignment.forward`; ``states`` are those at :attr:`taps`."""
        terms: Terms = {}
        for part in self.values():
            terms |= part(states[: len(part.taps)], features, x, t)
            states = states[len(part.taps) :]
        return terms

    def weights(self, terms: Terms) -> Weights:
        """Of all terms."""
        weights: Weights = {}
        for part in self.values():
            weights |= part.weights(terms)
        return weights

    @property
    def features(self) -> list[TokenGrid]:
        """The VFMs that the parts compare with, each once."""
        return list(dict.fromkeys(vfm for part in self.values() for vfm in part.features))

    def describe(self) -> list[str]:
        return [line for part in self.values() for line in part.describe()]


def build_denoiser_alignment(
    args: argparse.Namespace, names: Sequence[str], denoiser: Denoiser, features: Sequence[TokenGrid]
) -> DenoiserAlignments:
    """The sum of these alignments, beside a denoiser.

    Args:
        args: flags, settled by :func:`settle_arguments`.
        names: of :data:`DENOISER_ALIGNMENTS`.
        denoiser: whose hidden states are aligned.
        features: the VFMs, on the denoiser's grid.
    """
    return DenoiserAlignments(
        {name: DENOISER_ALIGNMENTS[name].from_arguments(args, denoiser, features) for name in names}
    )
