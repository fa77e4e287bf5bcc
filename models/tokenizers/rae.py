"""Representation autoencoders (RAE, arXiv 2510.11690): ``diffusers.AutoencoderRAE``, a frozen VFM and a decoder."""

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch import nn

from errors import UserError
from files import read_safetensors
from models.latent_statistics import EPSILON
from models.tokenizers.base import WEIGHTS_FILE, PlainCode
from models.tokenizers.diffusers_network import DiffusersTokenizer
from models.tokenizers.frozen_encoder import FrozenEncoder

# transformers 5 calls the layers of its VFMs otherwise than 4 did, and a folder has the names of where it was written.
_NEW_NAMES = (
    (r"^encoder\.vision_model\.", "encoder."),
    (r"^encoder\.encoder\.layers?\.", "encoder.layers."),
    (r"(^encoder\..*\.attention)\.attention\.(q|k|v)(?:uery|ey|alue)\.", r"\1.\2_proj."),
    (r"(^encoder\..*\.attention)\.output\.dense\.", r"\1.o_proj."),
    (r"(^encoder\..*)\.intermediate\.dense\.", r"\1.mlp.fc1."),
    (r"(^encoder\..*)\.output\.dense\.", r"\1.mlp.fc2."),
)
_NOT_LOADED = "decoder.decoder_pos_embed"  # computed; older files have it


class RAETokenizer(FrozenEncoder, DiffusersTokenizer):
    """Patch features of a VFM as the latent, without randomness, ``[B, C, h, w]``; its decoder alone trains.

    The latent is what diffusers' ``encode`` gives, already normalised by the checkpoint's own statistics: these are of
    each position (``[C, h, w]``), which statistics a channel could not say. Those of this tokenizer are then 0 and 1.

    Args:
        network: any ``AutoencoderRAE``.
    """

    network_name = kind = "AutoencoderRAE"
    identifying_keys = (
        *("encoder_type", "encoder_hidden_size", "encoder_patch_size", "encoder_num_hidden_layers"),
        *("encoder_input_size", "patch_size", "decoder_num_attention_heads", "scaling_factor"),
    )

    def __init__(self, network: ModelMixin):
        super().__init__(network, network.config.encoder_hidden_size)
        network.noise_tau = 0.0  # of the decoder's training: latents are what the VFM says

    @classmethod
    def from_architecture(cls, config: Mapping) -> "RAETokenizer":
        if find_spec("transformers") is None:
            raise UserError(f"the VFM in an {cls.network_name} is a class of transformers: pip install transformers")
        return super().from_architecture(config)

    @property
    def downsampling(self) -> int:
        return self.network.decoder_patch_size

    @property
    def image_size(self) -> int:
        return self.network.decoder_image_size  # another one would be resized on the way in, and not on the way out

    def encode(self, images: torch.Tensor) -> PlainCode:
        """uint8 images ``[B, 3, H, W]`` → latents ``[B, C, h, w]``."""
        return PlainCode(self.network.encode(images.float() / 255).latent.float())

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.network.decode(z).sample.float() * 2 - 1

    def network_state(self) -> dict[str, torch.Tensor]:
        """By the same names whatever release of transformers built the VFM."""
        return {_new_name(name): tensor for name, tensor in self.network.state_dict().items()}

    def read_network(self, folder: Path) -> None:
        found = {_new_name(name): tensor for name, tensor in read_safetensors(folder / WEIGHTS_FILE).items()}
        found.pop(_NOT_LOADED, None)
        names = {_new_name(name): name for name in self.network.state_dict()}
        self.network.load_state_dict({names.get(name, name): tensor for name, tensor in found.items()})

    def take_statistics(self) -> str | None:
        if self.network.config.latents_mean is None:
            return None
        self.statistics.mean.zero_()
        self.statistics.var.fill_(1 - EPSILON)  # whose std is 1, to the bit
        return "latents_mean and latents_std of config.json"

    def put_statistics(self, network: ModelMixin) -> None:
        """Nothing: the network's own stay as they are."""

    @property
    def decoder_last_layer(self) -> nn.Parameter:
        return self.network.decoder.decoder_pred.weight


def _new_name(name: str) -> str:
    for old, new in _NEW_NAMES:
        name = re.sub(old, new, name)
    return name
