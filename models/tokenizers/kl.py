"""The VAE: ``diffusers.AutoencoderKL`` with its latent statistics, from uint8 images to images in [-1, 1]."""

import copy
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import nn

from errors import UserError
from models.latent_statistics import LatentStatistics
from models.pixels import to_signed
from models.weight_files import weights_checksum

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs" / "vae"
STATISTICS_FILE = "latents_stats.safetensors"
# What the layers do, beside what the weights' names and shapes say; a fixed list, because diffusers adds keys.
_ARCHITECTURE_KEYS = (
    *("in_channels", "out_channels", "latent_channels", "block_out_channels", "down_block_types", "up_block_types"),
    *("layers_per_block", "act_fn", "norm_num_groups", "mid_block_add_attention"),
)


@dataclass(frozen=True)
class Posterior:
    """The encoder's diagonal Gaussian: float32 ``mean`` and ``logvar`` (in [-30, 20]), each ``[B, C, h, w]``."""

    mean: torch.Tensor
    logvar: torch.Tensor

    @property
    def std(self) -> torch.Tensor:
        return (0.5 * self.logvar).exp()

    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        """``mean + std·noise`` for standard normal ``noise`` of the same shape."""
        return self.mean + self.std * noise


class Autoencoder(nn.Module):
    """A KL autoencoder and the statistics of its latents.

    Args:
        network: any ``AutoencoderKL``.
    """

    def __init__(self, network: AutoencoderKL):
        super().__init__()
        self.network = network
        self.statistics = LatentStatistics(self.latent_channels)

    @property
    def latent_channels(self) -> int:
        return self.network.config.latent_channels

    @property
    def downsampling(self) -> int:
        """Image pixels per latent position, along a side."""
        return 2 ** (len(self.network.config.block_out_channels) - 1)

    @property
    def architecture(self) -> dict:
        """What :meth:`from_architecture` builds this network from, plain JSON values."""
        config = json.loads(self.network.to_json_string())
        return {key: value for key, value in config.items() if not key.startswith("_")}

    @classmethod
    def from_architecture(cls, config: dict) -> "Autoencoder":
        """A VAE with random weights."""
        return cls(AutoencoderKL.from_config(config)).eval()

    @property
    def last_layer(self) -> nn.Parameter:
        """The decoder's last weight, where VQGAN's adaptive GAN weight compares gradients."""
        return self.network.decoder.conv_out.weight

    @property
    def encoder_last_layer(self) -> nn.Parameter:
        """The encoder's last weight, where VA-VAE compares gradients."""
        return self.network.encoder.conv_out.weight

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) for square images; raises where the resolution does not fit the downsampling."""
        if resolution % self.downsampling:
            raise UserError(f"resolution {resolution} is not a multiple of the VAE's downsampling {self.downsampling}")
        side = resolution // self.downsampling
        return self.latent_channels, side, side

    def encode(self, images: torch.Tensor) -> Posterior:
        """uint8 images ``[B, 3, H, W]`` → posterior over latents ``[B, C, H/f, W/f]``, un-normalised."""
        parameters = self.network.encode(to_signed(images)).latent_dist.parameters.float()
        mean, logvar = parameters.chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Un-normalised latents ``[B, C, h, w]`` → images ``[B, 3, H, W]``, nominally in [-1, 1], not clamped."""
        return self.network.decode(z).sample.float()

    def checksum(self) -> str:
        """SHA-256 of architecture and weights: which VAE this is, whatever its statistics, scaling factor or folder."""
        config = {key: list_or_value(self.network.config.get(key)) for key in _ARCHITECTURE_KEYS}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        digest.update(weights_checksum(self.network.state_dict()).encode())
        return digest.hexdigest()

    def save(self, folder: Path, with_statistics: bool = True) -> None:
        """Write a diffusers folder with the latent statistics beside the weights, complete or not at all."""
        folder = Path(folder)
        beside = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(beside, ignore_errors=True)
        # a copy, because safetensors refuses weights that are in channels_last order
        network = copy.deepcopy(self.network).to(memory_format=torch.contiguous_format)
        statistics = self.statistics.tensors()
        if network.config.get("latents_mean") is not None:  # still those of the VAE that training started from
            std = statistics["std"].double() * network.config.scaling_factor  # its pipelines divide by it
            network.register_to_config(latents_mean=statistics["mean"].tolist(), latents_std=std.tolist())
        network.save_pretrained(beside, safe_serialization=True)
        if with_statistics:
            save_file(statistics, beside / STATISTICS_FILE)
        replaced = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(replaced, ignore_errors=True)
        if folder.exists():
            folder.rename(replaced)  # so that no half-deleted folder ever has the name
        beside.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)


def architecture_names() -> list[str]:
    """The names that ``--vae`` knows."""
    return sorted(path.stem for path in CONFIG_DIR.glob("*.json"))


def list_or_value(value):
    """JSON gives lists where diffusers gives tuples."""
    return list(value) if isinstance(value, tuple) else value
