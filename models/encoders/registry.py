"""The vision foundation models that ``--enc-type`` knows: what can be said of them without building anything."""

import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
TIMM = "timm/"  # any other vision transformer of timm


@dataclass(frozen=True)
class EncoderSpec:
    """One row of the table.

    Attributes:
        timm_name: the timm model (and pretrained tag).
        kind: ``vit``, patch tokens of a vision transformer, or ``cnn``, one stage's feature map.
        embed_dim: D, channels of a token.
        stride: image pixels per token, along a side.
        mean, std: normalisation of images in [0, 1].
        final_norm: ``vit`` only: whether tokens pass the network's final norm (they do not for MAE and CLIP: REPA).
        stage: ``cnn`` only: timm's index of the stage whose features are taken.
        options: of the timm model, where it differs from ``timm_name``.
        timm_has_weights: whether timm publishes them under ``timm_name``.
        source: where the weights are published, for messages; empty where timm says it.
    """

    timm_name: str
    kind: Literal["vit", "cnn"]
    embed_dim: int
    stride: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    final_norm: bool = True
    stage: int | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    timm_has_weights: bool = True
    source: str = ""


def _vit(timm_name: str, embed_dim: int, stride: int = 16, **changes) -> EncoderSpec:
    return EncoderSpec(timm_name, "vit", embed_dim, stride, **changes)


def _dinov2(size: str, embed_dim: int) -> EncoderSpec:
    return _vit(f"vit_{size}_patch14_dinov2.lvd142m", embed_dim, stride=14)


def _dinov2_registers(size: str, embed_dim: int) -> EncoderSpec:
    return _vit(f"vit_{size}_patch14_reg4_dinov2.lvd142m", embed_dim, stride=14)


def _dinov3(size: str, embed_dim: int) -> EncoderSpec:
    source = "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads (after accepting its licence)"
    return _vit(f"vit_{size}_patch16_dinov3.lvd1689m", embed_dim, source=source)


def _siglip(tag: str) -> EncoderSpec:
    options = {"global_pool": ""}  # without the attention pooling of its head
    return _vit(f"vit_base_patch16_siglip_256.{tag}", 768, mean=HALF, std=HALF, options=options)


def _mae(size: str, embed_dim: int, patch: int = 16) -> EncoderSpec:
    return _vit(f"vit_{size}_patch{patch}_224.mae", embed_dim, stride=patch, final_norm=False)


def _mocov3(size: str, embed_dim: int, source: str, **options) -> EncoderSpec:
    name = f"vit_{size}_patch16_224"  # the architecture; timm's weights of this name are other ones
    return _vit(name, embed_dim, options=options, timm_has_weights=False, source=source)


def _efficientnet_lite0(embed_dim: int, stride: int, stage: int) -> EncoderSpec:
    return EncoderSpec("tf_efficientnet_lite0", "cnn", embed_dim, stride, mean=HALF, std=HALF, stage=stage)


_MOCOV3_FILES = "https://dl.fbaipublicfiles.com/moco-v3"
ENCODERS: dict[str, EncoderSpec] = {
    "dinov2-vit-s": _dinov2("small", 384),
    "dinov2-vit-b": _dinov2("base", 768),
    "dinov2-vit-l": _dinov2("large", 1024),
    "dinov2-vit-g": _dinov2("giant", 1536),
    "dinov2reg-vit-s": _dinov2_registers("small", 384),
    "dinov2reg-vit-b": _dinov2_registers("base", 768),
    "dinov2reg-vit-l": _dinov2_registers("large", 1024),
    "dinov2reg-vit-g": _dinov2_registers("giant", 1536),
    "dinov3-vit-s": _dinov3("small", 384),
    "dinov3-vit-b": _dinov3("base", 768),
    "dinov3-vit-l": _dinov3("large", 1024),
    "dinov1-vit-s": _vit("vit_small_patch16_224.dino", 384),
    "dinov1-vit-b": _vit("vit_base_patch16_224.dino", 768),
    "clip-vit-L": _vit(
        "vit_large_patch14_clip_quickgelu_224.openai", 1024, 14, mean=CLIP_MEAN, std=CLIP_STD, final_norm=False
    ),
    "siglip-vit-b": _siglip("webli"),
    "siglip2-vit-b": _siglip("v2_webli"),
    "mae-vit-b": _mae("base", 768),
    "mae-vit-l": _mae("large", 1024),
    "mae-vit-h": _mae("huge", 1280, patch=14),
    "jepa-vit-h": _vit("vit_huge_patch14_gap_224.in1k_ijepa", 1280, stride=14),
    # 12 heads where timm's ViT-S has 6
    "mocov3-vit-s": _mocov3("small", 384, f"{_MOCOV3_FILES}/vit-s-300ep/vit-s-300ep.pth.tar", num_heads=12),
    "mocov3-vit-b": _mocov3("base", 768, f"{_MOCOV3_FILES}/vit-b-300ep/vit-b-300ep.pth.tar"),
    "mocov3-vit-l": _mocov3("large", 1024, "https://github.com/LTH14/rcg"),
    "efficientnet-lite0": _efficientnet_lite0(112, stride=16, stage=3),
    "efficientnet-lite0-s32": _efficientnet_lite0(320, stride=32, stage=4),
}


def encoder_spec(enc_type: str) -> EncoderSpec:
    """The table's row for a name of ``--enc-type``, or one made for ``timm/NAME``; nothing is built at full size.

    Raises:
        UserError: an unknown name, with the nearest known ones; a timm model that is not a vision transformer.
    """
    if enc_type.startswith(TIMM):
        return _timm_spec(enc_type)
    if enc_type not in ENCODERS:
        raise UserError(
            f"--enc-type {enc_type} is not known{_nearest(enc_type, list(ENCODERS))}; there are {', '.join(ENCODERS)}, "
            f"and {TIMM}NAME for any other vision transformer of timm"
        )
    return ENCODERS[enc_type]


def encoder_names(enc_type: str) -> list[str]:
    """The VFMs of ``--enc-type``: one name, or several separated by commas; a :class:`UserError` for an unknown one."""
    names = [name.strip() for name in enc_type.split(",")]
    for name in names:
        encoder_spec(name)
        if names.count(name) > 1:
            raise UserError(f"--enc-type {enc_type} names {name} twice")
    return names


@functools.cache
def _timm_spec(enc_type: str) -> EncoderSpec:
    """A row for any vision transformer of timm: sizes from the network on the meta device, constants from timm.

    Its tokens are what ``forward_features`` gives, after the final norm wherever that sees the tokens.
    """
    import timm
    import torch
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    name = enc_type.removeprefix(TIMM)
    if not timm.is_model(name.split(".")[0]):
        known = timm.list_models() + timm.list_pretrained()
        raise UserError(f"--enc-type {enc_type}: timm {timm.__version__} has no model {name}{_nearest(name, known)}")
    try:
        with torch.device("meta"):
            network = timm.create_model(name, num_classes=0)
    except (RuntimeError, ValueError) as error:  # an unknown tag of a known model
        raise UserError(f"--enc-type {enc_type}: {error}{_nearest(name, timm.list_pretrained())}") from error
    if not isinstance(network, VisionTransformer | Eva):
        raise UserError(
            f"--enc-type {enc_type}: timm's {name} is a {type(network).__name__}, which gives no grid of patch tokens "
            "as a ViT does; take a vision transformer, e.g. one of timm.list_models('vit_*')"
        )
    config = network.pretrained_cfg
    stride = network.patch_embed.feat_ratio(as_scalar=True)
    return _vit(name, network.embed_dim, stride, mean=tuple(config["mean"]), std=tuple(config["std"]))


def _nearest(name: str, known: list[str]) -> str:
    """``; did you mean …?`` where something is near."""
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(near)}?)" if near else ""
