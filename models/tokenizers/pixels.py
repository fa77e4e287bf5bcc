"""No tokenizer: pixels in the place of latents, for what a transformer makes without a VAE."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from errors import UserError
from models.latent_statistics import EPSILON
from models.pixels import to_signed
from models.tokenizers.base import Code, Tokenizer

NAME, IMAGE_CHANNELS = "pixels", 3
_ADDED_AT_ONCE = 64  # images


@dataclass(frozen=True)
class Pixels(Code):
    """uint8 images ``[B, 3, H, W]``; the latent is the same in [-1, 1]."""

    images: torch.Tensor

    @property
    def mode(self) -> torch.Tensor:
        return to_signed(self.images)

    def stored(self) -> torch.Tensor:
        """The images themselves, uint8."""
        return self.images


class PixelTokenizer(Tokenizer):
    """Images as they are: the latent is ``[B, 3, H, W]`` in [-1, 1], and is not normalised further (mean 0, std 1)."""

    needs_weights = False
    stores_images = True

    def __init__(self):
        super().__init__(IMAGE_CHANNELS)
        self.take_statistics()

    @property
    def downsampling(self) -> int:
        return 1

    @property
    def architecture(self) -> dict:
        return {"_class_name": NAME}

    @classmethod
    def from_architecture(cls, config: Mapping) -> "PixelTokenizer":
        return cls().eval()

    def encode(self, images: torch.Tensor) -> Pixels:
        """uint8 images ``[B, 3, H, W]`` → the same."""
        return Pixels(images)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return z.float()

    def sample(self, stored: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """uint8 images ``[B, 3, H, W]`` → float32 in [-1, 1]."""
        return to_signed(stored)

    @staticmethod
    def stored_moments(stored: np.ndarray) -> np.ndarray:
        """As of every tokenizer, from sums of integers, which are exact."""
        sums = np.zeros((2, IMAGE_CHANNELS), np.int64)
        for first in range(0, len(stored), _ADDED_AT_ONCE):
            part = stored[first : first + _ADDED_AT_ONCE]
            for total, values in zip(sums, (part, np.square(part, dtype=np.uint16)), strict=True):
                total += values.sum(3, dtype=np.uint32).sum((0, 2), dtype=np.int64)
        count = np.float64(stored.size // IMAGE_CHANNELS)
        values, squares = sums / [[127.5], [127.5**2]]
        return np.concatenate([values - count, squares - 2 * values + count, [count]])

    def take_statistics(self) -> str:
        self.statistics.mean.zero_()
        self.statistics.var.fill_(1 - EPSILON)  # whose std is 1, to the bit
        return "the range of pixels, [-1, 1]"

    def write_network(self, folder: Path) -> None:
        self.write_architecture(folder)

    def read_network(self, folder: Path) -> None:
        """There is nothing to read."""

    def check_trainable(self, encoder: bool = True) -> None:
        raise UserError(f"--vae {NAME} is no VAE and has nothing to train: cache it as it is, and train a denoiser")

    @property
    def encoder_last_layer(self) -> nn.Parameter:
        raise UserError(f"{NAME} have no encoder")

    @property
    def decoder_last_layer(self) -> nn.Parameter:
        raise UserError(f"{NAME} have no decoder")
