"""Tokenizers whose network is a class of diffusers, kept on disk as diffusers keeps it."""

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import diffusers
import torch
from diffusers import ModelMixin
from torch import nn

from errors import UserError, one_line
from files import as_os_error, read_safetensors, weights_checksum
from models.tokenizers.base import WEIGHTS_FILE, Tokenizer


class DiffusersTokenizer(Tokenizer):
    """A network of diffusers and the statistics of its latents.

    Args:
        network: of the class that :attr:`network_name` names.
        latent_channels: C.
    """

    network_name: str
    # What the layers do, apart from what the weights' names and shapes say; a fixed list, because diffusers adds keys.
    identifying_keys: tuple[str, ...]
    statistics_tensors: tuple[str, ...] = ()  # of the network's: latent statistics, and no weights

    def __init__(self, network: ModelMixin, latent_channels: int):
        super().__init__(latent_channels)
        self.network = network

    @property
    def architecture(self) -> dict:
        config = json.loads(self.network.to_json_string())
        return {"_class_name": self.network_name} | {k: v for k, v in config.items() if not k.startswith("_")}

    @classmethod
    def from_architecture(cls, config: Mapping) -> "Tokenizer":
        kind = getattr(diffusers, cls.network_name, None)
        if kind is None:
            raise UserError(
                f"diffusers {diffusers.__version__} has no {cls.network_name}: pip install --upgrade diffusers"
            )
        try:
            network = kind.from_config(config)
        except Exception as error:  # what diffusers makes of values that it does not look at
            raise ValueError(f"no {cls.network_name} is built from this configuration ({one_line(error)})") from error
        return cls(network).eval()

    def enable_gradient_checkpointing(self) -> None:
        try:
            self.network.enable_gradient_checkpointing()
        except ValueError:  # diffusers' word for a class that cannot
            super().enable_gradient_checkpointing()

    def encoder_parts(self) -> list[nn.Module]:
        parts = (getattr(self.network, name, None) for name in ("encoder", "quant_conv"))
        return [part for part in parts if part is not None]

    def network_state(self) -> dict[str, torch.Tensor]:
        return {k: v for k, v in self.network.state_dict().items() if k not in self.statistics_tensors}

    def checksum(self) -> str:
        """SHA-256 of architecture and weights: which VAE this is, whatever its statistics, scaling factor or folder."""
        config = {key: list_or_value(self.network.config.get(key)) for key in self.identifying_keys}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        digest.update(weights_checksum(self.network_state()).encode())
        return digest.hexdigest()

    def write_network(self, folder: Path) -> None:
        """A diffusers folder."""
        # a copy, because safetensors refuses weights that are in channels_last order
        network = copy.deepcopy(self.network).to(memory_format=torch.contiguous_format)
        self.put_statistics(network)
        with as_os_error(folder):
            network.save_pretrained(folder, safe_serialization=True)

    def put_statistics(self, network: ModelMixin) -> None:
        """Into a network that is written: the latent statistics, where diffusers' pipelines look for them."""
        if network.config.get("latents_mean") is not None:  # still those of the VAE that training started from
            statistics = self.statistics.tensors()
            std = statistics["std"].double() * network.config.get("scaling_factor", 1.0)  # its pipelines divide by it
            network.register_to_config(latents_mean=statistics["mean"].tolist(), latents_std=std.tolist())

    def read_network(self, folder: Path) -> None:
        self.network.load_state_dict(read_safetensors(folder / WEIGHTS_FILE))


def list_or_value(value):
    """JSON gives lists where diffusers gives tuples."""
    return list(value) if isinstance(value, tuple) else value
