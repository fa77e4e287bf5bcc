"""What every tokenizer is: images ⇄ latents, what of them a cache keeps, and how it lies on disk."""

import copy
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from errors import UserError
from files import add_checksum, read_safetensors, weights_checksum, whole_folder, write_safetensors
from models.latent_statistics import LatentStatistics
from models.tokenizers import CONFIG_FILE, STATISTICS_FILE
from schema import read_json

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"  # as diffusers calls it


class Code(ABC):
    """Encoded images: from it come a latent, what a cache stores, and the tokenizer's own losses."""

    @property
    @abstractmethod
    def mode(self) -> torch.Tensor:
        """The latent without randomness, un-normalised, float32 ``[B, C, h, w]``."""

    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        """A latent drawn with standard normal ``noise``, all ``[B, C, h, w]``; the mode where nothing is random."""
        return self.mode

    def stored(self) -> torch.Tensor:
        """What a cache keeps, float32 ``[B, S, h, w]``; :meth:`Tokenizer.sample` reads it."""
        return self.mode

    def regulariser(self) -> dict[str, torch.Tensor]:
        """Unweighted scalar losses of the latents themselves, e.g. ``kl``."""
        return {}


@dataclass(frozen=True)
class PlainCode(Code):
    """The code of a tokenizer without randomness: the latent itself, float32 ``[B, C, h, w]``."""

    latent: torch.Tensor

    @property
    def mode(self) -> torch.Tensor:
        return self.latent


class Tokenizer(nn.Module, ABC):
    """Images ⇄ latents, with the statistics of the latents.

    A subclass builds its networks after ``super().__init__(latent_channels)`` and answers the abstract methods; the
    rest has defaults for a tokenizer without randomness that is saved as ``config.json`` and safetensors.

    Args:
        latent_channels: C.

    Attributes:
        packing: positions of its network's latent along a side that make one position here, its channels holding them
            in the order of ``torch.pixel_unshuffle``.
        needs_weights: whether a name alone, without a file, is not enough.
        stores_images: whether a cache keeps the uint8 images themselves. Then those of mirrored images are mirrored as
            they are read, and statistics are a range that no data differ from.
    """

    packing = 1
    needs_weights = True
    stores_images = False

    def __init__(self, latent_channels: int):
        super().__init__()
        self.latent_channels = latent_channels
        self.statistics = LatentStatistics(latent_channels)

    # what it is

    @property
    @abstractmethod
    def downsampling(self) -> int:
        """Image pixels per latent position, along a side."""

    @property
    @abstractmethod
    def architecture(self) -> dict:
        """What :meth:`from_architecture` builds it from: plain JSON values, ``_class_name`` the registry's name."""

    @classmethod
    @abstractmethod
    def from_architecture(cls, config: Mapping) -> "Tokenizer":
        """One with random weights, in eval mode."""

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) for square images; raises where the resolution does not fit the downsampling."""
        if resolution % self.downsampling:
            raise UserError(f"resolution {resolution} is not a multiple of the VAE's downsampling {self.downsampling}")
        side = resolution // self.downsampling
        return self.latent_channels, side, side

    def stored_shape(self, resolution: int) -> tuple[int, ...]:
        """Shape of what a cache keeps of an image."""
        return self.latent_shape(resolution)

    @classmethod
    def latent_shape_of(cls, stored_shape: tuple[int, ...], config: Mapping) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a cache's items; a :class:`ValueError` where they are not this tokenizer's."""
        return stored_shape

    # what it does

    @abstractmethod
    def encode(self, images: torch.Tensor) -> Code:
        """uint8 images ``[B, 3, H, W]`` → their code."""

    @abstractmethod
    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Un-normalised latents ``[B, C, h, w]`` → images ``[B, 3, H, W]``, nominally in [-1, 1], not clamped."""

    def sample(self, stored: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """What a cache kept, ``[B, S, h, w]``, and standard normal noise → un-normalised latents, float32."""
        return stored.float()

    @staticmethod
    def stored_moments(stored: np.ndarray) -> np.ndarray:
        """Sums, sums of squares and count a channel of the latents that a cache's items give: float64 ``[2C + 1]``."""
        channels = stored.shape[1]
        total, squares = np.zeros((2, channels))
        for item in stored:  # one at a time: in float64 a shard of wide latents has gigabytes
            values = item.reshape(channels, -1).astype(np.float64)
            total += values.sum(1)
            squares += np.square(values, out=values).sum(1)
        return np.concatenate([total, squares, [stored.size / channels]])

    # what training asks of it

    def check_trainable(self, encoder: bool = True) -> None:
        """Raise a :class:`UserError` where it can only be used as it is; ``encoder``: whether that is trained too."""

    def load_pretrained_encoder(self, checkpoint: str | None) -> None:
        """The encoder's weights for a decoder that is trained from scratch: from a file, or where they are found.

        Raises:
            UserError: it has none of its own.
        """
        raise UserError("--freeze-encoder with --vae-ckpt none: a random encoder would stay random; give a trained VAE")

    def encoder_parts(self) -> list[nn.Module]:
        """What only :meth:`encode` uses: the rest can be trained while latents stay what they are."""
        encoder = getattr(self, "encoder", None)
        if not isinstance(encoder, nn.Module):
            raise UserError(f"{type(self).__name__} does not say what of it is the encoder (encoder_parts)")
        return [encoder]

    @property
    @abstractmethod
    def encoder_last_layer(self) -> nn.Parameter:
        """The encoder's last weight, where VA-VAE compares gradients."""

    @property
    @abstractmethod
    def decoder_last_layer(self) -> nn.Parameter:
        """The decoder's last weight, where VQGAN's adaptive GAN weight compares gradients."""

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass."""
        raise UserError(
            f"{type(self).__name__} cannot recompute its activations: train it without gradient checkpointing"
        )

    def compile(self, *args, **options) -> None:
        """``torch.compile`` its parts in place, so that names of tensors stay; nothing by default."""

    def with_statistics(self, statistics: LatentStatistics) -> "Tokenizer":
        """The same networks, not copied, with other latent statistics."""
        other = copy.copy(self)
        other._modules = self._modules | {"statistics": statistics}
        return other

    # how it lies on disk

    def network_state(self) -> dict[str, torch.Tensor]:
        """Tensors by name without the statistics."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("statistics.")}

    def checksum(self) -> str:
        """SHA-256 of architecture and weights: which tokenizer this is, whatever its statistics or folder."""
        digest = hashlib.sha256(json.dumps(self.architecture, sort_keys=True).encode())
        digest.update(weights_checksum(self.network_state()).encode())
        return digest.hexdigest()

    def save(self, folder: Path, with_statistics: bool = True) -> None:
        """Write a folder with the latent statistics next to the weights, complete or not at all."""
        with whole_folder(folder) as temporary:
            self.write_network(temporary)
            for path in temporary.glob("*.safetensors"):
                add_checksum(path)
            if with_statistics:
                write_safetensors(self.statistics.tensors(), temporary / STATISTICS_FILE, with_checksum=True)

    def write_network(self, folder: Path) -> None:
        """Architecture and weights into an empty folder."""
        self.write_architecture(folder)
        write_safetensors(self.network_state(), folder / WEIGHTS_FILE)

    def write_architecture(self, folder: Path) -> None:
        """``config.json`` alone."""
        (folder / CONFIG_FILE).write_text(json.dumps(self.architecture, indent=2) + "\n")

    def read_network(self, folder: Path) -> None:
        """What :meth:`write_network` wrote."""
        statistics = {f"statistics.{name}": tensor for name, tensor in self.statistics.state_dict().items()}
        self.load_state_dict(read_safetensors(folder / WEIGHTS_FILE) | statistics)

    def take_statistics(self) -> str | None:
        """Latent statistics from what the network was saved with: in words from where; None where it has none."""
        return None

    @classmethod
    def load(cls, folder: Path) -> tuple["Tokenizer", str | None]:
        """What :meth:`save` wrote, in eval mode, and where its statistics come from: None where it has none."""
        folder = Path(folder)
        tokenizer = cls.from_architecture(read_json(folder / CONFIG_FILE))
        tokenizer.read_network(folder)
        file = folder / STATISTICS_FILE
        if file.exists():
            tokenizer.statistics.load(**read_safetensors(file))
            return tokenizer.eval(), str(file)
        source = tokenizer.take_statistics()
        return tokenizer.eval(), source and f"{source} in {folder}"
