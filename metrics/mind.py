"""Monge Inception Distance (Berthet et al. 2026, arXiv 2605.06797): a sliced Wasserstein distance of features."""

import numpy as np
import torch

SIZE = 5000
PROJECTIONS = 1000


def monge_distance(
    samples: torch.Tensor, reference: torch.Tensor, *, size: int, projections: int = PROJECTIONS, seed: int = 0
) -> float:
    """3·D · the mean over random directions of the squared 2-Wasserstein distance of both sets along it, in float64.

    Two sets that differ by a shift m are 3·‖m‖² apart. Like a Fréchet distance it grows as images get fewer: compare
    only what was measured with the same ``size``.

    Args:
        samples: features ``[N, D]``.
        reference: features ``[M, D]``, on the same device.
        size: vectors of either set that are compared, drawn without replacement where there are more; of
            :func:`choose_size`.
        projections: directions, uniform on the sphere.
        seed: of directions and draws, which depend on nothing else but D, N, M and ``size``.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    directions = torch.from_numpy(generator.standard_normal((samples.shape[1], projections))).to(samples.device)
    directions /= directions.norm(dim=0)
    along = []
    for features in (samples, reference):
        if len(features) > size:
            chosen = torch.from_numpy(generator.choice(len(features), size, replace=False)).to(features.device)
            features = features[chosen]
        along.append((features.double() @ directions).sort(dim=0).values)
    return 3 * samples.shape[1] * (along[0] - along[1]).square().mean().item()


def choose_size(samples: int, reference: int) -> int:
    """The paper's 5,000, or as many as the smaller set has."""
    return min(SIZE, samples, reference)
