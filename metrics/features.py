"""Networks by whose features sets of images are compared: Inception, DINOv2's class token, FDr's, VFMs, timm's."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches

import timm
import torch
import torch.nn.functional as F
from torch import nn

from errors import UserError, one_line
from files import weights_checksum
from metrics import dinov2, inception
from metrics.arguments import DINOV2, INCEPTION
from metrics.arguments import FEATURES_FLAG as FLAG
from metrics.representations import REPRESENTATIONS, Representation
from models.encoders import ENCODERS, Encoder, EncoderSpec, build_encoder
from models.encoders.weights import find_weights
from models.weight_files import NotWeightsError, read_state_dict

TIMM = "timm/"
AT_ONCE = 2  # images on a CPU: what a layer gives, of 6 MB an image and more, stays in its cache
GRID, COARSEST_STRIDE = 16, 16  # tokens along a side, and the stride up to which a 256 px image gives them


@dataclass(frozen=True)
class Features:
    """Of a batch, float32: ``pooled`` ``[B, D]``, and of Inception ``spatial`` ``[B, 2023]``, ``logits`` ``[B, C]``."""

    pooled: torch.Tensor
    spatial: torch.Tensor | None = None
    logits: torch.Tensor | None = None

    @property
    def dims(self) -> tuple[int, int, int]:
        """Of each, 0 where there is none."""
        pooled, spatial, classes = (0 if x is None else x.shape[1] for x in (self.pooled, self.spatial, self.logits))
        return pooled, spatial, classes


class Extractor(nn.Module):
    """uint8 images ``[B, 3, H, W]`` of any size → :class:`Features`, in float32 whatever the caller's autocast.

    Args:
        name: as ``--features`` names it.
        network: images → what :class:`Features` holds, in that order; in float32 unless it has a ``precision``.
        weights_sha256: of the network's weights.
    """

    def __init__(self, name: str, network: nn.Module, weights_sha256: str):
        super().__init__()
        self.name, self.network, self.weights_sha256 = name, network, weights_sha256
        self.requires_grad_(False)
        self.eval()
        self.to(memory_format=torch.channels_last)  # a quarter faster on a CPU

    @property
    def is_inception(self) -> bool:
        return self.name == INCEPTION

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def precision(self) -> str:
        return getattr(self.network, "precision", "float32")

    def train(self, mode: bool = True) -> "Extractor":
        """Stays in eval mode."""
        return super().train(False)

    def describe(self) -> dict:
        """What a measurement says of it."""
        name = inception.NAME if self.is_inception else self.name
        precision = {} if self.precision == "float32" else {"precision": self.precision}
        return {"name": name, "weights_sha256": self.weights_sha256} | precision

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> Features:
        pieces = images.split(AT_ONCE) if images.device.type == "cpu" else (images,)
        with torch.autocast(images.device.type, enabled=False), without_tf32():
            found = [self.network(piece) for piece in pieces]
        return Features(*(torch.cat(parts) for parts in zip(*found, strict=True)))


@contextmanager
def without_tf32() -> Iterator[None]:
    """Matrix products and convolutions of float32 in float32, on any GPU: TF32 would keep 10 of its 23 bits."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


class TokenMean(nn.Module):
    """A VFM's patch tokens, averaged: ``[B, D]``."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.encoder(images).mean(1),)


class Pooled(nn.Module):
    """What a timm network hands to its classifier, ``[B, D]``, at its own input size and normalisation.

    Images are resized as they are, without a crop: bicubic with antialiasing.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        settings = timm.data.resolve_model_data_config(network)
        self.size = tuple(settings["input_size"][1:])
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(settings[name]).view(3, 1, 1) * 255.0, persistent=False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        x = images.float()
        if x.shape[-2:] != self.size:
            x = F.interpolate(x, self.size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 255)
        x = self.network.forward_features((x - self.mean) / self.std)
        return (self.network.forward_head(x, pre_logits=True).flatten(1).float(),)


def build_extractor(name: str, checkpoint: str | None = None, random_weights: bool = False) -> Extractor:
    """Build the network that ``--features`` names.

    Args:
        name: ``inception``, ``DINOv2``, of ``REPRESENTATIONS``, of ``--enc-type``, or ``timm/`` and a model of timm.
        checkpoint: file with the weights; by default they are looked for where the network's usually lie.
        random_weights: to measure sizes and speed.

    Raises:
        UserError: no such network, no weights, or those of another network.
    """
    if name == INCEPTION:
        network = inception.build_inception(checkpoint, random_weights)
        return Extractor(name, network, network.weights_sha256)
    if name == DINOV2:
        network = dinov2.build_dinov2(checkpoint, random_weights)
        return Extractor(name, network, network.weights_sha256)
    if name in REPRESENTATIONS:
        spec = REPRESENTATIONS[name]
        network = _build_timm(name, spec.timm_name, checkpoint, random_weights, **spec.options)
        return Extractor(name, Representation(network, spec.side), weights_checksum(network.state_dict()))
    if name.startswith(TIMM):
        network = _build_timm(name, name.removeprefix(TIMM), checkpoint, random_weights)
        return Extractor(name, Pooled(network), weights_checksum(network.state_dict()))
    if name not in ENCODERS:
        close = get_close_matches(name, [DINOV2, *REPRESENTATIONS, *ENCODERS], 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(
            f"{FLAG} {name} is not known; {hint}there are {DINOV2}, {', '.join([*REPRESENTATIONS, *ENCODERS])}, and "
            f"{TIMM}NAME for any model of timm"
        )
    stride = ENCODERS[name].stride
    grid = GRID if stride <= COARSEST_STRIDE else GRID * COARSEST_STRIDE // stride
    encoder = build_vfm(name, grid, checkpoint, random_weights)
    return Extractor(name, TokenMean(encoder), encoder.checksum())


def build_vfm(name: str, grid: int, checkpoint: str | None = None, random_weights: bool = False) -> Encoder:
    """``models.encoders.build_encoder`` for a name of ``--features``."""
    try:
        return build_encoder(name, grid, checkpoint, random_weights)
    except UserError as error:  # the same network, asked for by another flag
        raise type(error)(str(error).replace("--enc-type", FLAG)) from error


def _build_timm(asked: str, name: str, checkpoint: str | None, random_weights: bool, **options: bool) -> nn.Module:
    """timm's model of a name, which ``--features`` asked for under another one."""
    if not timm.is_model(name):
        close = get_close_matches(name, timm.list_models(), 1)
        hint = f"did you mean {TIMM}{close[0]}? " if close else ""
        raise UserError(f"{FLAG} {TIMM}{name}: timm has no such model; {hint}timm.list_models() lists them")
    if random_weights:
        return timm.create_model(name, **options)
    settings = timm.get_pretrained_cfg(name)
    full_name = ".".join(part for part in (settings.architecture, settings.tag) if part)
    spec = EncoderSpec(full_name, "cnn", embed_dim=0, stride=0)  # weights are looked for by its name alone
    try:
        path = find_weights(TIMM + name, spec, checkpoint)
    except UserError as error:
        raise type(error)(str(error).replace(f"--enc-type {TIMM}{name}", f"{FLAG} {asked}")) from error
    try:
        overlay = {"state_dict": read_state_dict(path)}
        # with its classifier, unused: timm takes any file, even an unfitting one, for a network with another head
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    except (NotWeightsError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{FLAG} {asked}: {path} holds no weights for it ({one_line(error)})") from error
