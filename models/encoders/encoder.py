"""A frozen vision foundation model: uint8 images → patch features ``[B, N, D]``."""

from collections.abc import Sequence

import timm
import torch
import torch.nn.functional as F
from torch import nn

from errors import UserError
from models.encoders.registry import EncoderSpec, encoder_spec
from models.encoders.weights import find_weights, load_weights
from models.weight_files import one_line, weights_checksum

CHANNELS_LAST_FROM = 128  # pixels: depthwise convolutions are then 1.3 (128) to 1.6 (256) times as fast on a CPU


class Encoder(nn.Module):
    """A frozen VFM that gives the token grid it was asked for.

    Images are normalised in float32 and resized (bicubic, ``align_corners=False``, no antialiasing: the REPA protocol)
    to ``grid · stride`` pixels. Always in eval mode, parameters frozen, forward without gradient.

    Args:
        spec: which network.
        grid: tokens along a side.
        network: the timm network, built for that input size.
        name: what ``--enc-type`` calls it.
    """

    def __init__(self, spec: EncoderSpec, grid: int, network: nn.Module, name: str = ""):
        super().__init__()
        self.spec, self.grid, self.network, self.name = spec, grid, network, name or spec.timm_name
        self.register_buffer("mean", torch.tensor(spec.mean).view(3, 1, 1) * 255.0, persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(3, 1, 1) * 255.0, persistent=False)
        if spec.kind == "cnn" and self.input_size >= CHANNELS_LAST_FROM:
            network.to(memory_format=torch.channels_last)
        self.requires_grad_(False)
        self.eval()

    @property
    def embed_dim(self) -> int:
        return self.spec.embed_dim

    @property
    def input_size(self) -> int:
        """Side of the image that the network sees, in pixels."""
        return self.grid * self.spec.stride

    def checksum(self) -> str:
        """SHA-256 of the weights, without position embeddings: they were resampled to the grid."""
        state = self.network.state_dict()
        return weights_checksum({name: state[name] for name in state if not name.endswith("pos_embed")})

    def train(self, mode: bool = True) -> "Encoder":
        """Stays in eval mode: a frozen network whose statistics must not move."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images ``[B, 3, H, W]`` → float32 patch features ``[B, grid², D]``, row-major."""
        x = self.preprocess(images)
        if self.spec.kind == "cnn":
            return self.network(x)[0].flatten(2).transpose(1, 2).float()
        if self.spec.final_norm:
            return self.network.forward_features(x)[:, self.network.num_prefix_tokens :].float()
        return self.network.forward_intermediates(x, indices=1, norm=False, output_fmt="NLC", intermediates_only=True)[
            -1
        ].float()

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images ``[B, 3, H, W]`` → normalised float32 ``[B, 3, input_size, input_size]``."""
        x = (images.float() - self.mean) / self.std
        if x.shape[-2:] != (self.input_size, self.input_size):
            x = F.interpolate(x, (self.input_size, self.input_size), mode="bicubic", align_corners=False)
        return x


def build_encoder(enc_type: str, grid: int, checkpoint: str | None = None, random_weights: bool = False) -> Encoder:
    """Build a VFM for a ``grid × grid`` token grid.

    Args:
        enc_type: a name of :data:`ENCODERS`, or ``timm/NAME``.
        grid: tokens along a side.
        checkpoint: file with the weights; by default they are looked for (``models.encoders.weights``).
        random_weights: build without weights, to measure sizes and speed.

    Raises:
        UserError: unknown name, a grid that the network cannot give, no weights.
    """
    spec = encoder_spec(enc_type)
    if grid < 1:
        raise UserError(f"--enc-type {enc_type} gives token grids of 1×1 and up, not {grid}×{grid}")
    path = None if random_weights else find_weights(enc_type, spec, checkpoint)  # before a large network is built
    network = _build_network(enc_type, spec, grid)
    if path is not None:
        load_weights(network, enc_type, spec, path)
    return Encoder(spec, grid, network, enc_type)


def _build_network(enc_type: str, spec: EncoderSpec, grid: int) -> nn.Module:
    if not timm.is_model(spec.timm_name.split(".")[0]):
        raise UserError(f"--enc-type {enc_type}: timm {timm.__version__} does not have it; pip install -U timm")
    if spec.kind == "cnn":
        return timm.create_model(spec.timm_name, features_only=True, out_indices=(spec.stage,))
    try:
        return timm.create_model(spec.timm_name, img_size=grid * spec.stride, num_classes=0, **spec.options)
    except (AssertionError, TypeError, ValueError) as error:  # networks of a fixed size; timm/NAME
        raise UserError(
            f"--enc-type {enc_type} cannot give {grid}×{grid} tokens ({one_line(error)}); take the grid of its native "
            f"image, {timm.get_pretrained_cfg(spec.timm_name).input_size[-1] // spec.stride}, or another encoder"
        ) from error


def build_encoders(
    enc_types: Sequence[str], grid: int, checkpoints: str | None = None, random_weights: bool = False
) -> list[Encoder]:
    """Build several VFMs for the same ``grid × grid`` token grid; :func:`build_encoder` says of what.

    Args:
        enc_types: their names, of :func:`encoder_names`.
        grid: tokens along a side.
        checkpoints: ``--enc-ckpt``: the file of a single VFM; of several, one file each, in the same order, separated
            by commas, where an empty entry is looked for.
        random_weights: build without weights.

    Raises:
        UserError: as :func:`build_encoder`, or another number of files than of VFMs.
    """
    files = split_checkpoints(enc_types, checkpoints)
    return [build_encoder(name, grid, file, random_weights) for name, file in zip(enc_types, files, strict=True)]


def split_checkpoints(enc_types: Sequence[str], checkpoints: str | None) -> list[str | None]:
    """The file of each VFM; None where it is to be looked for."""
    if checkpoints is None:
        return [None] * len(enc_types)
    files = [checkpoints] if len(enc_types) == 1 else checkpoints.split(",")
    if len(files) != len(enc_types):
        count = f"{len(files)} file{'s' if len(files) > 1 else ''}"
        raise UserError(
            f"--enc-ckpt {checkpoints} is {count} for the {len(enc_types)} encoders of --enc-type "
            f"{','.join(enc_types)}: give one each, in that order, separated by commas (nothing between two commas: "
            "that one is looked for)"
        )
    return [file.strip() or None for file in files]
