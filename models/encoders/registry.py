"""The vision foundation models that ``--enc-type`` knows: what can be said of them without building anything."""

from dataclasses import dataclass
from typing import Literal

from errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class EncoderSpec:
    """One row of the table.

    Attributes:
        timm_name: the timm model (and pretrained tag).
        kind: ``vit``, patch tokens of a vision transformer, or ``cnn``, one stage's feature map.
        embed_dim: D, channels of a token.
        stride: image pixels per token, along a side.
        mean, std: normalisation of images in [0, 1].
        final_norm: ``vit`` only: whether tokens pass the network's final norm.
        stage: ``cnn`` only: timm's index of the stage whose features are taken.
    """

    timm_name: str
    kind: Literal["vit", "cnn"]
    embed_dim: int
    stride: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    final_norm: bool = True
    stage: int | None = None


def _dinov2(size: str, embed_dim: int) -> EncoderSpec:
    return EncoderSpec(f"vit_{size}_patch14_dinov2.lvd142m", "vit", embed_dim, stride=14)


def _efficientnet_lite0(embed_dim: int, stride: int, stage: int) -> EncoderSpec:
    return EncoderSpec("tf_efficientnet_lite0", "cnn", embed_dim, stride, mean=HALF, std=HALF, stage=stage)


ENCODERS: dict[str, EncoderSpec] = {
    "dinov2-vit-s": _dinov2("small", 384),
    "dinov2-vit-b": _dinov2("base", 768),
    "dinov2-vit-l": _dinov2("large", 1024),
    "dinov2-vit-g": _dinov2("giant", 1536),
    "efficientnet-lite0": _efficientnet_lite0(112, stride=16, stage=3),
    "efficientnet-lite0-s32": _efficientnet_lite0(320, stride=32, stage=4),
}


def encoder_spec(enc_type: str) -> EncoderSpec:
    """The table's row for ``--enc-type``; a :class:`UserError` lists the names there are."""
    if enc_type not in ENCODERS:
        raise UserError(f"--enc-type {enc_type} is not known; there are {', '.join(ENCODERS)}")
    return ENCODERS[enc_type]


def encoder_names(enc_type: str) -> list[str]:
    """The VFMs of ``--enc-type``: one name, or several separated by commas; a :class:`UserError` for an unknown one."""
    names = [name.strip() for name in enc_type.split(",")]
    for name in names:
        encoder_spec(name)
        if names.count(name) > 1:
            raise UserError(f"--enc-type {enc_type} names {name} twice")
    return names
