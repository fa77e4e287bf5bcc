"""The KL autoencoder: ``diffusers.AutoencoderKL`` with its latent statistics."""

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from errors import one_line
from files import as_os_error, weights_checksum
from models.pixels import to_signed
from models.tokenizers.base import Code, Tokenizer

MOMENTS_ITEMS = 64  # summed at once: part of what the last bits of measured statistics depend on
# Compiled residual blocks: f16d32 has 15 kinds, each with and without gradients, for a batch and for its rest.
MOST_GRAPHS = 128
# What the layers do, apart from what the weights' names and shapes say; a fixed list, because diffusers adds keys.
_ARCHITECTURE_KEYS = (
    *("in_channels", "out_channels", "latent_channels", "block_out_channels", "down_block_types", "up_block_types"),
    *("layers_per_block", "act_fn", "norm_num_groups", "mid_block_add_attention"),
)


@dataclass(frozen=True)
class Posterior(Code):
    """The encoder's diagonal Gaussian: float32 ``mean`` and ``logvar`` (in [-30, 20]), each ``[B, C, h, w]``."""

    mean: torch.Tensor
    logvar: torch.Tensor

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


class KLTokenizer(Tokenizer):
    """A KL autoencoder and the statistics of its latents.

    Args:
        network: any ``AutoencoderKL``.
    """

    def __init__(self, network: AutoencoderKL):
        super().__init__(network.config.latent_channels)
        self.network = network

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.network.config.block_out_channels) - 1)

    @property
    def architecture(self) -> dict:
        config = json.loads(self.network.to_json_string())
        return {"_class_name": "AutoencoderKL"} | {k: v for k, v in config.items() if not k.startswith("_")}

    @classmethod
    def from_architecture(cls, config: Mapping) -> "KLTokenizer":
        try:
            return cls(AutoencoderKL.from_config(config)).eval()
        except Exception as error:  # what diffusers makes of values that it does not look at
            raise ValueError(f"no AutoencoderKL is built from this configuration ({one_line(error)})") from error

    def stored_shape(self, resolution: int) -> tuple[int, ...]:
        """Posterior mean and standard deviation."""
        channels, *sides = self.latent_shape(resolution)
        return 2 * channels, *sides

    @classmethod
    def latent_shape_of(cls, stored_shape: tuple[int, ...], config: Mapping) -> tuple[int, int, int]:
        channels = int(config["latent_channels"])
        if len(stored_shape) != 3 or stored_shape[0] != 2 * channels:
            raise ValueError(
                f"posterior means and standard deviations of a VAE with {channels} latent channels have {2 * channels}"
            )
        return channels, *stored_shape[1:]

    def encode(self, images: torch.Tensor) -> Posterior:
        """uint8 images ``[B, 3, H, W]`` → posterior over latents ``[B, C, H/f, W/f]``, un-normalised."""
        parameters = self.network.encode(to_signed(images)).latent_dist.parameters.float()
        mean, logvar = parameters.chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.network.decode(z).sample.float()

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

    def enable_gradient_checkpointing(self) -> None:
        self.network.enable_gradient_checkpointing()

    def compile(self, *args, **options) -> None:
        """Each residual block: they share their code, and a graph serves all of the same width and resolution."""
        import torch._dynamo.config as limits  # here, because it takes a second

        limit = "recompile_limit" if hasattr(limits, "recompile_limit") else "cache_size_limit"  # torch 2.6
        setattr(limits, limit, max(getattr(limits, limit), MOST_GRAPHS))
        for module in self.network.modules():
            if isinstance(module, ResnetBlock2D):
                module.compile(*args, **options | {"dynamic": False})

    def checksum(self) -> str:
        """SHA-256 of architecture and weights: which VAE this is, whatever its statistics, scaling factor or folder."""
        config = {key: list_or_value(self.network.config.get(key)) for key in _ARCHITECTURE_KEYS}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        digest.update(weights_checksum(self.network.state_dict()).encode())
        return digest.hexdigest()

    def write_network(self, folder: Path) -> None:
        """A diffusers folder."""
        # a copy, because safetensors refuses weights that are in channels_last order
        network = copy.deepcopy(self.network).to(memory_format=torch.contiguous_format)
        if network.config.get("latents_mean") is not None:  # still those of the VAE that training started from
            statistics = self.statistics.tensors()
            std = statistics["std"].double() * network.config.scaling_factor  # its pipelines divide by it
            network.register_to_config(latents_mean=statistics["mean"].tolist(), latents_std=std.tolist())
        with as_os_error(folder):
            network.save_pretrained(folder, safe_serialization=True)


def list_or_value(value):
    """JSON gives lists where diffusers gives tuples."""
    return list(value) if isinstance(value, tuple) else value
