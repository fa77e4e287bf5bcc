"""VFM features of a batch, as every loss and measure sees them."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator

from dataset.latents import LatentBatch
from dataset.loader import ImageBatch
from models.encoders import Encoder
from models.feature_norm import FeatureNorm, SpatialNorm


@torch.no_grad()
def batch_features(
    accelerator: Accelerator,
    encoders: Sequence[Encoder] | None,
    norm: FeatureNorm | SpatialNorm | None,
    batch: ImageBatch | LatentBatch,
) -> list[torch.Tensor]:
    """``[b, N, D]`` of each VFM: those that came with the batch, or computed from its images; normalised."""
    if encoders is None or batch.features is not None:
        features = [part.float() for part in batch.features]
    else:
        with accelerator.autocast():
            features = [encoder(batch.images) for encoder in encoders]
    return features if norm is None else norm(features)


@torch.no_grad()
def features_and_class_token(
    accelerator: Accelerator,
    encoders: Sequence[Encoder],
    norm: FeatureNorm | SpatialNorm | None,
    images: torch.Tensor,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Of uint8 images, in one pass: as :func:`batch_features`, and the first VFM's class token ``[b, D]`` as it is."""
    first, *others = encoders
    with accelerator.autocast():
        tokens = first(images, class_token=True)
        features = [tokens[:, 1:], *(encoder(images) for encoder in others)]
    return features if norm is None else norm(features), tokens[:, 0]
