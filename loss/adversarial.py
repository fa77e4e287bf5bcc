"""Hinge GAN terms, VQGAN's adaptive weight and LeCam regularisation."""

import torch
import torch.nn.functional as F
from torch import nn


def generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """−mean D(x̂), over all patches."""
    return -fake_logits.float().mean()


def hinge_discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """½·(mean relu(1 − D(x)) + mean relu(1 + D(x̂))), over all patches."""
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


def adaptive_weight(
    reconstruction_gradient: torch.Tensor, gan_gradient: torch.Tensor, largest: float = 1e4
) -> torch.Tensor:
    """‖∇ reconstruction‖ / (‖∇ GAN‖ + 1e-4), at most ``largest`` (VQGAN, arXiv 2012.09841, equation 7).

    Args:
        reconstruction_gradient, gan_gradient: gradients of the two losses at the decoder's last weight.
        largest: upper bound of the weight.
    """
    ratio = reconstruction_gradient.float().norm() / (gan_gradient.float().norm() + 1e-4)
    return ratio.clamp(0, largest).detach()


class LeCam(nn.Module):
    """LeCam regularisation (arXiv 2104.03310): keeps each logit near the running mean of the other kind.

    The anchors move once a step (:meth:`update`) and start at 0.

    Args:
        decay: of the running means.
    """

    def __init__(self, decay: float = 0.999):
        super().__init__()
        self.decay = decay
        self.register_buffer("real_mean", torch.zeros(()))
        self.register_buffer("fake_mean", torch.zeros(()))

    def forward(self, real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
        """mean relu(D(x) − m_fake)² + mean relu(m_real − D(x̂))², over all patches."""
        above = F.relu(real_logits.float() - self.fake_mean).square().mean()
        below = F.relu(self.real_mean - fake_logits.float()).square().mean()
        return above + below

    @torch.no_grad()
    def update(self, real_mean: torch.Tensor, fake_mean: torch.Tensor) -> None:
        """Move the anchors towards the global batch's mean logits; non-finite ones change nothing."""
        for buffer, value in ((self.real_mean, real_mean), (self.fake_mean, fake_mean)):
            buffer.lerp_(torch.where(value.isfinite(), value.to(buffer), buffer), 1 - self.decay)
