"""Classifier-free guidance, a wrapper around a velocity."""

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
    if scale == 1:
        return velocity

    def guided_velocity(x: torch.Tensor, t: float, y: torch.Tensor) -> torch.Tensor:
        if not low <= t <= high:
            return velocity(x, t, y)
        both = velocity(torch.cat([x, x]), t, torch.cat([y, torch.full_like(y, null_class)]))
        conditional, unconditional = both.chunk(2)
        together = unconditional + scale * (conditional - unconditional)
        return together if channels is None else torch.cat([together[:, :channels], conditional[:, channels:]], dim=1)

    return guided_velocity
