"""Counted randomness: every draw is a function of the seed and of where it is made, so a step number restores it."""

from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """What a generator is for; part of its seed, so that no two uses share a stream."""

    TRAINING = 0
    LATENT_STATISTICS = 1
    VALIDATION = 2


def seeded_generator(device: torch.device, purpose: Purpose, seed: int, *counters: int) -> torch.Generator:
    """A generator whose stream depends on (purpose, seed, counters) alone, e.g. counters = (step, micro-step, rank)."""
    state = np.random.SeedSequence([int(purpose), seed, *counters]).generate_state(2, np.uint32)
    value = (int(state[0]) << 32 | int(state[1])) & (2**63 - 1)
    return torch.Generator(device).manual_seed(value)
