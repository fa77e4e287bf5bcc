"""The networks of FDr6 (Representation Fréchet Loss, arXiv 2604.28190) and their features, as its authors take them.

Source: the paper, and frechet_distance/repr_models.py, scripts/ref/compute_valfd.py of github.com/Jiawei-Yang/FD-Loss.
"""

from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F
from torch import nn

from metrics.arguments import INCEPTION


@dataclass(frozen=True)
class RepresentationSpec:
    """One of the six.

    Attributes:
        statistics: released file with ``mu`` and ``sigma`` of ImageNet's training set at 256 px.
        validation_fd: published Fréchet distance of ImageNet's validation set (50,000 images) to those statistics.
        width: D of the features.
        timm_name: of the network; empty for Inception, which ``metrics.inception`` has.
        side: of its input, pixels.
    """

    statistics: str
    validation_fd: float
    width: int
    timm_name: str = ""
    side: int = 0

    @property
    def options(self) -> dict[str, bool]:
        """Of ``timm.create_model``: a ViT takes any side, padded to whole patches, its positions resampled."""
        return dict.fromkeys(("dynamic_img_size", "dynamic_img_pad"), True) if "vit" in self.timm_name else {}


REPRESENTATIONS = {
    INCEPTION: RepresentationSpec("guided_diffusion_stats.npz", 1.68, 2048),
    "FDr/convnext": RepresentationSpec(
        "convnext_in256_t224_stats.npz", 56.87, 1024, "convnextv2_base.fcmae_ft_in22k_in1k", 224
    ),
    "FDr/dinov2": RepresentationSpec(
        "vit_large_patch14_dinov2_lvd142m_in256_t256_stats.npz", 14.19, 1024, "vit_large_patch14_dinov2.lvd142m", 256
    ),
    "FDr/mae": RepresentationSpec(
        "vit_large_patch16_224_mae_in256_t224_stats.npz", 0.04, 1024, "vit_large_patch16_224.mae", 224
    ),
    "FDr/siglip": RepresentationSpec(
        "vit_so400m_patch16_siglip_256_v2_webli_in256_t224_stats.npz",
        *(0.60, 1152, "vit_so400m_patch16_siglip_256.v2_webli", 224),
    ),
    "FDr/clip": RepresentationSpec(
        "vit_large_patch14_clip_224_openai_in256_t256_stats.npz", 5.60, 1024, "vit_large_patch14_clip_224.openai", 256
    ),
}


class Representation(nn.Module):
    """uint8 images ``[B, 3, H, W]`` → float32 ``[B, D]``, by a timm network under bf16 autocast.

    Of a CNN the mean over space before its head's norm, of a ViT the class token, or without one its attention pooling.
    Images are resized bicubically with antialiasing and not clamped, then normalised as timm says; what fills up the
    last patches is 0 after that.

    Args:
        network: timm's, built with :attr:`RepresentationSpec.options`.
        side: of its input, pixels.
        dtype: of the autocast; float32 switches it off.
    """

    def __init__(self, network: nn.Module, side: int, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.network, self.side, self.dtype = network, side, dtype
        settings = timm.data.resolve_model_data_config(network)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(settings[name]).view(3, 1, 1), persistent=False)

    @property
    def precision(self) -> str:
        return "float32" if self.dtype == torch.float32 else "bf16"

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        x = images.float() / 255
        if x.shape[-2:] != (self.side, self.side):
            x = F.interpolate(x, (self.side, self.side), mode="bicubic", align_corners=False, antialias=True)
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return (self._pool(self.network.forward_features((x - self.mean) / self.std)).float(),)

    def _pool(self, features: torch.Tensor) -> torch.Tensor:
        if features.ndim == 4:  # [B, D, h, w]
            return features.mean((2, 3))
        return features[:, 0] if self.network.num_prefix_tokens else self.network.attn_pool(features)
