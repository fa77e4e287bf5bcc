"""Guidance, a wrapper around a velocity: away from that of no class, or from that of a weaker network."""

from collections.abc import Callable

import torch

from diffusion.samplers import Velocity


def guided(
    velocity: Velocity, scale: float, null_class: int, low: float = 0.0, high: float = 1.0, channels: int | None = None
) -> Velocity:
    """``v_u + scale·(v_c − v_u)`` while ``low ≤ t ≤ high``, the velocity itself outside (arXiv 2404.07724).

    Inside, class and null class go through in one batch of twice the size; outside there is one plain forward. Whether
    a time is inside is decided by the time of each evaluation, without asking the device.

    Args:
        velocity: of a model trained with label dropout.
        scale: 1 means no guidance.
        null_class: the label that means "no class" (``Denoiser.null_class``).
        low: end of the interval near the data.
        high: end of the interval near the noise.
        channels: guide only the first ones of the latent, as LightningDiT does with 3; None: all.
    """

    def with_and_without_class(
        x: torch.Tensor, t: float, y: torch.Tensor, *arrival: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return velocity(torch.cat([x, x]), t, torch.cat([y, torch.full_like(y, null_class)]), *arrival).chunk(2)

    return _extrapolated(velocity, with_and_without_class, scale, low, high, channels)


def autoguided(
    velocity: Velocity, guide: Velocity, scale: float, low: float = 0.0, high: float = 1.0, channels: int | None = None
) -> Velocity:
    """``v_g + scale·(v − v_g)``, v_g the velocity of a weaker network for the same class (autoguidance, arXiv
    2406.02507).

    Score and denoised data are affine in the velocity, so that extrapolating the one is extrapolating the others.

    Args:
        velocity: of the network that is guided.
        guide: of one with the same faults, only worse: smaller, or trained for fewer steps, on the same latents.
        scale, low, high, channels: as in :func:`guided`.
    """

    def with_guide(x: torch.Tensor, t: float, y: torch.Tensor, *arrival: float) -> tuple[torch.Tensor, torch.Tensor]:
        return velocity(x, t, y, *arrival), guide(x, t, y, *arrival)

    return _extrapolated(velocity, with_guide, scale, low, high, channels)


def internally_guided(
    velocity: Velocity,
    both: Callable[[torch.Tensor, float, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    scale: float,
    low: float = 0.0,
    high: float = 1.0,
    channels: int | None = None,
) -> Velocity:
    """``v_g + scale·(v − v_g)``, v_g from an output of the same network on the way (internal guidance, RAEv2, arXiv
    2605.18324): a guided time takes one pass.

    Args:
        velocity: of the network.
        both: its velocity, and that of its output on the way.
        scale, low, high, channels: as in :func:`guided`.
    """
    return _extrapolated(velocity, both, scale, low, high, channels)


def _extrapolated(
    velocity: Velocity,
    pair: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    scale: float,
    low: float,
    high: float,
    channels: int | None,
) -> Velocity:
    """Inside the interval, ``scale`` times as far from the second of a pair of velocities as the first is."""
    if scale == 1:
        return velocity

    def guided_velocity(x: torch.Tensor, t: float, y: torch.Tensor, *arrival: float) -> torch.Tensor:
        if not low <= t <= high:
            return velocity(x, t, y, *arrival)
        own, other = pair(x, t, y, *arrival)
        together = other + scale * (own - other)
        return together if channels is None else torch.cat([together[:, :channels], own[:, channels:]], dim=1)

    return guided_velocity
