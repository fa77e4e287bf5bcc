"""FLUX.2's autoencoder: ``diffusers.AutoencoderKLFlux2``, whose latents are patches of 2×2."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from diffusers import ModelMixin

from models.latent_statistics import EPSILON
from models.pixels import to_signed
from models.tokenizers.posterior import Posterior, PosteriorTokenizer


class Flux2Tokenizer(PosteriorTokenizer):
    """FLUX.2's KL autoencoder; its latent is what FLUX.2's own transformer sees.

    That is the encoder's output with patches of 2×2 positions moved into the channels, ``[4·32, H/16, W/16]``. The
    checkpoint has statistics of these channels only (its ``bn``), and one position is one token of FLUX.2.

    Args:
        network: any ``AutoencoderKLFlux2`` with square patches.
    """

    network_name = "AutoencoderKLFlux2"
    identifying_keys = (
        *("in_channels", "out_channels", "latent_channels", "block_out_channels", "decoder_block_out_channels"),
        *("down_block_types", "up_block_types", "layers_per_block", "act_fn", "norm_num_groups"),
        *("mid_block_add_attention", "patch_size"),
    )
    statistics_tensors = ("bn.running_mean", "bn.running_var", "bn.num_batches_tracked")

    def __init__(self, network: ModelMixin):
        super().__init__(network, self.channels_of(network.config))
        rows, columns = network.config.patch_size
        if rows != columns:
            raise ValueError(f"patches of {rows}×{columns} latent positions are not square")
        self.packing = rows

    @classmethod
    def channels_of(cls, config: Mapping) -> int:
        rows, columns = config["patch_size"]
        return int(config["latent_channels"]) * rows * columns

    @property
    def downsampling(self) -> int:
        return self.packing * 2 ** (len(self.network.config.block_out_channels) - 1)

    def encode(self, images: torch.Tensor) -> Posterior:
        """uint8 images ``[B, 3, H, W]`` → posterior over patches ``[B, 4·32, H/16, W/16]``, un-normalised."""
        plain = Posterior.of(self.network.encode(to_signed(images)).latent_dist.parameters)
        return Posterior(F.pixel_unshuffle(plain.mean, self.packing), F.pixel_unshuffle(plain.logvar, self.packing))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.network.decode(F.pixel_shuffle(z, self.packing)).sample.float()

    def take_statistics(self) -> str | None:
        bn = self.network.bn
        if not bn.running_mean.any() and (bn.running_var == 1).all():  # as it begins: never measured
            return None
        self.statistics.mean.copy_(bn.running_mean)
        self.statistics.var.copy_((bn.running_var.double() + (bn.eps - EPSILON)).clamp_min(0))
        return "bn.running_mean and bn.running_var"

    def put_statistics(self, network: ModelMixin) -> None:
        network.bn.running_mean.copy_(self.statistics.mean)
        network.bn.running_var.copy_((self.statistics.var.double() + (EPSILON - network.bn.eps)).clamp_min(0))
