"""VFM features of a batch, as every loss and measure sees them."""

from collections.abc import Callable, Iterable, Sequence

import torch
from accelerate import Accelerator

from dataset.latents import LatentBatch
from dataset.loader import ImageBatch
from models.encoders import Encoder
from models.feature_norm import FeatureNorm
from runtime.processes import sum_over_processes

MEASURED_IMAGES = 2048  # each has a feature a token: a mean within 2 % of a standard deviation, if tokens were alike


@torch.no_grad()
def batch_features(
    accelerator: Accelerator,
    encoders: Sequence[Encoder] | None,
    norm: FeatureNorm | None,
    batch: ImageBatch | LatentBatch,
) -> list[torch.Tensor]:
    """``[b, N, D]`` of each VFM: those that came with the batch, or computed from its images; normalised."""
    if encoders is None or batch.features is not None:
        features = [part.float() for part in batch.features]
    else:
        with accelerator.autocast():
            features = [encoder(batch.images) for encoder in encoders]
    return features if norm is None else norm(features)


def measure_feature_norm(
    norm: FeatureNorm,
    features_of: Callable[..., Sequence[torch.Tensor]],
    batches: Iterable,
    batch_size: int,
    least: int,
) -> int:
    """Set the statistics of features from the first batches of a training.

    Args:
        norm: is set; normalises nothing yet.
        features_of: gives the features of a micro-batch.
        batches: this process's, lists of micro-batches.
        batch_size: images of one over all processes.
        least: images that suffice.

    Returns:
        the number of images used, over all processes.
    """
    count, moments = 0, [0] * norm.count
    while count < least:
        for batch in next(batches):
            moments = [sum(pair) for pair in zip(moments, norm.moments(features_of(batch)), strict=True)]
        count += batch_size
    norm.load([sum_over_processes(sums) for sums in moments])
    return count
