"""What a step draws, as a function of the seed and of where it is drawn: a step's number restores it."""

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch


class Stream(IntEnum):
    """What a generator is for; part of its seed, so that no two uses share a stream."""

    TRAINING = 0
    LATENT_STATISTICS = 1
    VALIDATION = 2


class Draws(NamedTuple):
    """What a batch of B latents needs; who has no use for a part leaves it.

    Attributes:
        posterior: standard normal ``[B, C, h, w]``, makes a latent of an encoded image.
        noise: standard normal ``[B, C, h, w]``, the other end of the interpolant; where a class token goes with the
            latent, in the shape of both (``Denoiser.state_shape``).
        times: ``[B]``, uniform or standard normal, as ``diffusion.flow.training_times`` wants them.
        dropout: uniform ``[B]``; the label is dropped where it is below the probability.
        generator: for what a method draws of its own: a step then draws the same after a resume, which it would not
            from torch's global one.
    """

    posterior: torch.Tensor
    noise: torch.Tensor
    times: torch.Tensor
    dropout: torch.Tensor
    generator: torch.Generator | None = None


TIMES = {"uniform": torch.rand, "lognormal": torch.randn}  # what the times of a weighting are made of


def draw(shape: Sequence[int], generator: torch.Generator, weighting: str = "uniform") -> Draws:
    """Draw for a batch of latents of ``shape`` ``[B, C, h, w]``, on the generator's device."""
    options = {"generator": generator, "device": generator.device}
    return Draws(
        torch.randn(shape, **options),
        torch.randn(shape, **options),
        TIMES[weighting](shape[0], **options),
        torch.rand(shape[0], **options),
        generator,
    )


def seeded_generator(device: torch.device, stream: Stream, seed: int, *counters: int) -> torch.Generator:
    """A generator whose numbers depend on (stream, seed, counters) alone, e.g. counters = (step, micro-step, rank)."""
    state = np.random.SeedSequence([int(stream), seed, *counters]).generate_state(2, np.uint32)
    value = (int(state[0]) << 32 | int(state[1])) & (2**63 - 1)
    return torch.Generator(device).manual_seed(value)
