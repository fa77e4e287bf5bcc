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
