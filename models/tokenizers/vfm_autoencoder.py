"""Representation autoencoders of any VFM (RAE, arXiv 2510.11690, section 3): it encodes, frozen, and a ViT decodes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

from errors import UserError
from models.compilation import allow_graphs, compile_options
from models.encoders import build_encoder, encoder_spec
from models.tokenizers.base import PlainCode, Tokenizer
from models.tokenizers.frozen_encoder import FrozenEncoder

NAME = "VFMAutoencoder"
_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Architecture:
    """What config.json says; the decoder's names and defaults are those of RAE's ViT-XL.

    Attributes:
        encoder: the VFM, a name of ``--enc-type``.
        image_size: side of the images, pixels: the only one.
        patch_size: pixels that a latent position decodes to, along a side; the VFM's grid has image_size / patch_size.
        decoder_hidden_size, decoder_num_hidden_layers, decoder_num_attention_heads, decoder_intermediate_size: of the
            decoder's blocks.
        encoder_blocks: the latent is the mean of the features after these blocks of a ViT, counted from 1 (RAEv2, arXiv
            2605.18324): early ones know what an image looks like. Empty: the VFM's own features, of its last block.
    """

    encoder: str
    image_size: int = 256
    patch_size: int = 16
    decoder_hidden_size: int = 1152
    decoder_num_hidden_layers: int = 28
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int = 4096
    encoder_blocks: Sequence[int] = ()

    def __post_init__(self):
        if not isinstance(self.encoder, str):
            raise ValueError(f"encoder is {self.encoder!r}, not the name of a VFM")
        for name, value in self.decoder_sizes().items():
            if not _is_count(value):
                raise ValueError(f"{name} is {value!r}, not a whole number of 1 or more")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        for divisor in (4, self.decoder_num_attention_heads):  # 4: sines and cosines of two coordinates
            if self.decoder_hidden_size % divisor:
                raise ValueError(f"decoder_hidden_size {self.decoder_hidden_size} is not a multiple of {divisor}")
        blocks = self.encoder_blocks
        if not isinstance(blocks, Sequence) or not all(map(_is_count, blocks)) or sorted(set(blocks)) != list(blocks):
            raise ValueError(f"encoder_blocks is {blocks!r}, not a list of ascending block numbers from 1")
        if blocks and encoder_spec(self.encoder).kind == "cnn":
            raise ValueError(
                f"encoder_blocks are of vision transformers, and {self.encoder} is a convolutional network"
            )

    def decoder_sizes(self) -> dict[str, int]:
        """Everything but what is said of the encoder."""
        return {name: value for name, value in asdict(self).items() if not name.startswith("encoder")}

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size


class VFMAutoencoder(FrozenEncoder, Tokenizer):
    """Patch features of a frozen VFM as the latent, without randomness; its decoder alone trains.

    The features of a position are normalised over its channels (layer norm without scale and shift), as RAE's are; of
    several blocks before their mean is taken. The decoder is RAE's, a class of diffusers, and gives images in the VFM's
    own normalisation.

    Args:
        architecture: of both.
    """

    kind = NAME

    def __init__(self, architecture: Architecture):
        spec = encoder_spec(architecture.encoder)
        super().__init__(spec.embed_dim)
        self.built_from = architecture
        self.encoder = build_encoder(architecture.encoder, architecture.grid, random_weights=True)
        self.decoder = _decoder_class()(
            hidden_size=spec.embed_dim,
            num_patches=architecture.grid**2,
            **architecture.decoder_sizes(),
        )
        depth = len(getattr(self.encoder.network, "blocks", ()))
        if max(architecture.encoder_blocks, default=0) > depth:
            raise ValueError(f"encoder_blocks {list(architecture.encoder_blocks)}: {architecture.encoder} has {depth}")

    @property
    def downsampling(self) -> int:
        return self.built_from.patch_size

    @property
    def architecture(self) -> dict:
        said = {"_class_name": NAME} | asdict(self.built_from)
        blocks = said.pop("encoder_blocks")
        return said | {"encoder_blocks": list(blocks)} if blocks else said

    @classmethod
    def from_architecture(cls, config: Mapping) -> "VFMAutoencoder":
        return cls(Architecture(**{key: value for key, value in config.items() if not key.startswith("_")})).eval()

    def load_pretrained_encoder(self, checkpoint: str | None) -> None:
        """The VFM's weights; those of its last norm go, as RAE has it."""
        self.encoder = build_encoder(self.built_from.encoder, self.built_from.grid, checkpoint)
        norm = getattr(self.encoder.network, "norm", None)
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            if getattr(norm, name, None) is not None:
                nn.init.constant_(getattr(norm, name), value)

    @property
    def image_size(self) -> int:
        return self.built_from.image_size

    def encode(self, images: torch.Tensor) -> PlainCode:
        """uint8 images ``[B, 3, H, W]`` → features ``[B, D, h, w]``."""
        blocks = self.built_from.encoder_blocks
        features = self.encoder.block_features(images, blocks) if blocks else [self.encoder(images)]
        normalised = [F.layer_norm(tokens, (self.latent_channels,), eps=_NORM_EPS).float() for tokens in features]
        return PlainCode(
            (sum(normalised) / len(normalised)).mT.unflatten(2, (self.built_from.grid, self.built_from.grid))
        )

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        patches = self.decoder(z.flatten(2).mT).logits
        normalised = self.decoder.unpatchify(patches).float()
        return (normalised * self.encoder.std + self.encoder.mean) / 127.5 - 1

    @property
    def decoder_last_layer(self) -> nn.Parameter:
        return self.decoder.decoder_pred.weight

    def compile(self, *args, **options) -> None:
        """Block by block: those of a part share a graph."""
        allow_graphs()
        self.encoder.compile(*args, **options)
        for block in self.decoder.decoder_layers:
            block.compile(*args, **compile_options(options))


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1


def _decoder_class() -> type[nn.Module]:
    try:
        from diffusers.models.autoencoders.autoencoder_rae import RAEDecoder
    except ImportError as error:
        raise UserError(
            f"the installed diffusers has no decoder of RAE's ({error}): pip install --upgrade diffusers"
        ) from error
    return RAEDecoder
