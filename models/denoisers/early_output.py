"""Internal guidance (RAEv2, arXiv 2605.18324): a network's output on the way guides it, in the same pass."""

import torch
from torch import nn


class EarlyOutput(nn.Module):
    """A denoiser as far as block ``config.guide_depth``, and the output there.

    Args:
        denoiser: with such a block.
    """

    def __init__(self, denoiser: nn.Module):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        """As :meth:`Denoiser.forward`, without the blocks after that one."""
        (state,) = self.denoiser.hidden_states(x, t, y, (self.denoiser.config.guide_depth,))
        return self.denoiser.guide_velocity(x, t, y, state), ()

    def undamped(self, velocity: torch.Tensor, t: float) -> torch.Tensor:
        """As :meth:`Denoiser.undamped`."""
        return self.denoiser.undamped(velocity, t)

    def compile(self, *args, **options) -> None:
        """Its parts are the denoiser's, which compiles them."""
