"""Qwen-Image's autoencoder: ``diffusers.AutoencoderKLQwenImage``, a causal 3-D VAE of videos, on single frames."""

from collections.abc import Mapping

import torch
from diffusers import ModelMixin
from torch import nn

from models.pixels import to_signed
from models.tokenizers.posterior import Posterior, PosteriorTokenizer


class QwenImageTokenizer(PosteriorTokenizer):
    """A KL autoencoder of videos for images: a video of one frame, whose dimension nobody else sees.

    Before the first frame lie zeros, and nothing is resampled in time. So the halves are called without the memory of
    earlier frames that diffusers' ``encode`` and ``decode`` keep, and images are not clamped.

    Args:
        network: any ``AutoencoderKLQwenImage`` of RGB images.
    """

    network_name = "AutoencoderKLQwenImage"
    identifying_keys = (
        *("base_dim", "z_dim", "dim_mult", "num_res_blocks", "attn_scales", "temperal_downsample", "input_channels"),
    )

    def __init__(self, network: ModelMixin):
        channels = network.config.get("input_channels", 3)
        if channels != 3:  # Qwen-Image-Layered: RGBA
            raise ValueError(f"its images have {channels} channels, not 3")
        super().__init__(network, network.config.z_dim)
        for name, parameter in network.named_parameters():
            if ".time_conv." in name:  # between frames: one alone has no use for them, and DDP would wait for gradients
                parameter.requires_grad_(False)

    @classmethod
    def channels_of(cls, config: Mapping) -> int:
        return int(config["z_dim"])

    @property
    def downsampling(self) -> int:
        return 2 ** len(self.network.config.temperal_downsample)

    def encode(self, images: torch.Tensor) -> Posterior:
        """uint8 images ``[B, 3, H, W]`` → posterior over latents ``[B, C, H/8, W/8]``, un-normalised."""
        frames = to_signed(images).unsqueeze(2)
        return Posterior.of(self.network.quant_conv(self.network.encoder(frames)).squeeze(2))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.network.decoder(self.network.post_quant_conv(z.unsqueeze(2))).squeeze(2).float()

    def take_statistics(self) -> str | None:
        mean, std = (torch.tensor(self.network.config[name]) for name in ("latents_mean", "latents_std"))
        if {mean.numel(), std.numel()} != {self.latent_channels}:
            raise ValueError(f"latents_mean and latents_std are not numbers of {self.latent_channels} channels")
        self.statistics.load(mean, std)
        return "latents_mean and latents_std of config.json"

    def to(self, *args, **options) -> nn.Module:
        """As any module's; an order of 4-D weights (``channels_last``) says nothing of these, which have five."""
        options.pop("memory_format", None)
        return super().to(*args, **options) if args or options else self
