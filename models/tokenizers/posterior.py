"""Tokenizers of diffusers whose encoder gives a diagonal Gaussian."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from models.compilation import allow_graphs, compile_options
from models.tokenizers.base import Code
from models.tokenizers.diffusers_network import DiffusersTokenizer

MOMENTS_ITEMS = 64  # summed at once: part of what the last bits of measured statistics depend on


@dataclass(frozen=True)
class Posterior(Code):
    """The encoder's diagonal Gaussian: float32 ``mean`` and ``logvar`` (in [-30, 20]), each ``[B, C, h, w]``."""

    mean: torch.Tensor
    logvar: torch.Tensor

    @classmethod
    def of(cls, parameters: torch.Tensor) -> "Posterior":
        """From an encoder's means and log-variances ``[B, 2C, h, w]``."""
        mean, logvar = parameters.float().chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30.0, 20.0))

    @property
    def mode(self) -> torch.Tensor:
        return self.mean

    @property
    def std(self) -> torch.Tensor:
        return (0.5 * self.logvar).exp()

    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        """``mean + std·noise``."""
        return self.mean + self.std * noise

    def stored(self) -> torch.Tensor:
        """Mean, then standard deviation, ``[B, 2C, h, w]``.

        In float16 a standard deviation under 6e-8 becomes 0: a sample is then the mean, to its own precision.
        """
        return torch.cat([self.mean, self.std], dim=1)

    def regulariser(self) -> dict[str, torch.Tensor]:
        """``kl``: KL(N(mean, var) ‖ N(0, 1)) = ½·Σ(mean² + var − 1 − logvar) over C, h, w; averaged over the batch."""
        return {"kl": 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).sum((1, 2, 3)).mean()}


class PosteriorTokenizer(DiffusersTokenizer):
    """A KL autoencoder of diffusers; a cache keeps means and standard deviations."""

    @classmethod
    @abstractmethod
    def channels_of(cls, config: Mapping) -> int:
        """C of the latents, by a configuration of diffusers."""

    def stored_shape(self, resolution: int) -> tuple[int, ...]:
        """Posterior mean and standard deviation."""
        channels, *sides = self.latent_shape(resolution)
        return 2 * channels, *sides

    @classmethod
    def latent_shape_of(cls, stored_shape: tuple[int, ...], config: Mapping) -> tuple[int, int, int]:
        channels = cls.channels_of(config)
        if len(stored_shape) != 3 or stored_shape[0] != 2 * channels:
            raise ValueError(
                f"posterior means and standard deviations of a VAE with {channels} latent channels have {2 * channels}"
            )
        return channels, *stored_shape[1:]

    def sample(self, stored: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Mean and standard deviation ``[B, 2C, h, w]`` → mean + std·noise."""
        mean, std = stored.float().chunk(2, dim=1)
        return torch.addcmul(mean, std, noise)

    @staticmethod
    def stored_moments(stored: np.ndarray) -> np.ndarray:
        """Of posterior samples: their variance is ``var(mean) + E[std²]``, so that none needs to be drawn."""
        channels = stored.shape[1] // 2
        moments = np.zeros(2 * channels + 1)
        for first in range(0, len(stored), MOMENTS_ITEMS):
            part = stored[first : first + MOMENTS_ITEMS].astype(np.float64)
            mean, std = part[:, :channels], part[:, channels:]
            moments[:channels] += mean.sum((0, 2, 3))
            moments[channels:-1] += (mean**2 + std**2).sum((0, 2, 3))
            moments[-1] += len(part) * part[0, 0].size
        return moments

    @property
    def encoder_last_layer(self) -> nn.Parameter:
        return self.network.encoder.conv_out.weight

    @property
    def decoder_last_layer(self) -> nn.Parameter:
        return self.network.decoder.conv_out.weight

    def compile(self, *args, **options) -> None:
        """Residual blocks, which share a graph where width and resolution are the same, and the norms before images."""
        allow_graphs()
        options = compile_options(options)
        for module in list(self.network.modules()):
            if isinstance(module, ResnetBlock2D):
                module.compile(*args, **options)
            elif isinstance(module, Encoder | Decoder):
                activate_in_norm(module)
                module.conv_norm_out.compile(*args, **options)


class ActivatedGroupNorm(nn.GroupNorm):
    """Norm and SiLU in one, in the precision and order of what comes in, which the next convolution asks for.

    Autocast rounds to that precision there. Alone, CUDA's norm answers in NCHW.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        is_nhwc = x.is_contiguous(memory_format=torch.channels_last)
        order = torch.channels_last if is_nhwc else torch.contiguous_format
        return F.silu(super().forward(x)).to(x.dtype, memory_format=order)


def activate_in_norm(network: Encoder | Decoder) -> None:
    """Move the activation after the last norm into it: compiled they are one pass over memory, each alone several.

    Names of weights stay. Nothing is done where the norm or the activation is another.
    """
    if type(network.conv_norm_out) is nn.GroupNorm and isinstance(network.conv_act, nn.SiLU):
        network.conv_norm_out.__class__ = ActivatedGroupNorm
        network.conv_act = nn.Identity()
