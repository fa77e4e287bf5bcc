"""A sum of alignments of a denoiser."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from itertools import islice

import torch
from torch import nn

from diffusion.draws import Draws
from errors import UserError
from loss.alignment import DENOISER_ALIGNMENTS
from loss.alignment.base import DenoiserAlignment, DenoisingStep, Terms, TokenGrid, Weights
from loss.total import joined
from models.denoisers import Denoiser


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

    @property
    def needs_average(self) -> bool:
        """Whether a part compares with the averaged network."""
        return any(part.teacher_taps for part in self.values())

    def taught(
        self, teach: Callable[[torch.Tensor, Sequence[int]], Sequence[torch.Tensor]], t: torch.Tensor, draws: Draws
    ) -> dict[str, Sequence[torch.Tensor]]:
        """The averaged network's hidden states, by the names of the parts that compare with them.

        Args:
            teach: times ``[B]`` and blocks → its hidden states there.
            t, draws: those of the step.
        """
        taught = {name: part for name, part in self.items() if part.teacher_taps}
        return {name: teach(part.teacher_times(t, draws), part.teacher_taps) for name, part in taught.items()}

    def forward(self, step: DenoisingStep, taught: Mapping[str, Sequence[torch.Tensor]]) -> Terms:
        """As :meth:`DenoiserAlignment.forward`; with the states at :attr:`taps`, and ``taught`` of :meth:`taught`."""
        terms: Terms = {}
        states, places = iter(step.states), iter(step.places)
        for name, part in self.items():
            features = [*(step.features if part.needs_features else ()), *taught.get(name, ())]
            own_states, own_places = (list(islice(each, len(part.taps))) for each in (states, places))
            own = step._replace(states=own_states, places=own_places, features=features)
            terms = joined(terms, part(own))
        return terms

    def weights(self, terms: Terms) -> Weights:
        """Of all terms."""
        weights: Weights = {}
        for part in self.values():
            weights = joined(weights, part.weights(terms))
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
    """The sum of these alignments, for a denoiser.

    Args:
        args: flags, settled by :func:`settle_arguments`.
        names: of :data:`DENOISER_ALIGNMENTS`.
        denoiser: whose hidden states are aligned.
        features: the VFMs, on the denoiser's grid.

    Raises:
        UserError: a block that the denoiser does not have.
    """
    for name in names:
        if DENOISER_ALIGNMENTS[name].weight_of(args) is None:
            raise ValueError(f"--align {name}: its weight is None; list its flag in DEFAULTS")
    parts = {name: DENOISER_ALIGNMENTS[name].from_arguments(args, denoiser, features) for name in names}
    for name, part in parts.items():
        if absent := [tap for tap in (*part.taps, *part.teacher_taps) if not 1 <= tap <= denoiser.depth]:
            blocks = ", ".join(map(str, absent))
            raise UserError(
                f"--align {name} sees block {blocks}, but {denoiser.config.model} has blocks 1 to {denoiser.depth}"
            )
        sparse = denoiser.config.sparse_blocks
        if not part.takes_some_tokens and (some := [tap for tap in part.taps if tap in sparse]) and args.token_drop:
            raise UserError(
                f"--align {name} wants all tokens after block {some[0]}, and --sprint drops some in blocks "
                f"{sparse.start} to {sparse.stop - 1}: align an earlier or a later one (--encoder-depth, of vae "
                "--vae-repa-depth), or add --token-drop 0"
            )
    return DenoiserAlignments(parts)
