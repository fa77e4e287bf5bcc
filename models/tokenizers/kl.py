"""The KL autoencoder: ``diffusers.AutoencoderKL`` with its latent statistics."""

from collections.abc import Mapping

import torch
from diffusers import AutoencoderKL

from models.pixels import to_signed
from models.tokenizers.posterior import Posterior, PosteriorTokenizer


class KLTokenizer(PosteriorTokenizer):
    """A KL autoencoder and the statistics of its latents.

    Args:
        network: any ``AutoencoderKL``.
    """

    network_name = "AutoencoderKL"
    identifying_keys = (
        *("in_channels", "out_channels", "latent_channels", "block_out_channels", "down_block_types", "up_block_types"),
        *("layers_per_block", "act_fn", "norm_num_groups", "mid_block_add_attention"),
    )

    def __init__(self, network: AutoencoderKL):
        super().__init__(network, network.config.latent_channels)

    @classmethod
    def channels_of(cls, config: Mapping) -> int:
        return int(config["latent_channels"])

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.network.config.block_out_channels) - 1)

    def encode(self, images: torch.Tensor) -> Posterior:
        """uint8 images ``[B, 3, H, W]`` → posterior over latents ``[B, C, H/f, W/f]``, un-normalised."""
        return Posterior.of(self.network.encode(to_signed(images)).latent_dist.parameters)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.network.decode(z).sample.float()
