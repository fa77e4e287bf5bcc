"""Kernel Inception Distance (Bińkowski et al. 2018, arXiv 1801.01401, section 4): squared MMD, polynomial kernel."""

import numpy as np
import torch

SUBSETS = 100
SUBSET_SIZE = 1000


def kernel_distance(
    samples: torch.Tensor,
    reference: torch.Tensor,
    *,
    subset_size: int,
    subsets: int = SUBSETS,
    seed: int = 0,
) -> tuple[float, float | None]:
    """Mean and standard deviation (over the subsets) of the unbiased squared MMD of random subsets.

    Where a subset is the whole of one set, or of both, all subsets are of the same vectors and their deviation says
    nothing of the estimate: it is None then.

    Args:
        samples: features ``[N, D]``.
        reference: features ``[M, D]``, on the same device.
        subset_size: vectors in a subset, of :func:`choose_subset_size`.
        subsets: how many pairs of subsets, each drawn without replacement.
        seed: of the draws, which depend on nothing else but N, M and ``subset_size``.
    """
    values = []
    for subset in range(subsets):
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, subset])))
        x, y = (
            features[torch.from_numpy(generator.choice(len(features), subset_size, replace=False)).to(features.device)]
            for features in (samples, reference)
        )
        values.append(unbiased_mmd2(x, y))
    varies = subset_size < min(len(samples), len(reference))
    return float(np.mean(values)), float(np.std(values)) if varies else None


def choose_subset_size(samples: int, reference: int) -> int:
    """The usual 1000, or as many as the smaller set has."""
    return min(SUBSET_SIZE, samples, reference)


def unbiased_mmd2(x: torch.Tensor, y: torch.Tensor) -> float:
    """Squared maximum mean discrepancy of ``[m, D]`` and ``[n, D]``, kernel (x·y / D + 1)³; the estimate may be < 0."""
    x, y = x.double(), y.double()
    within = sum((_kernel(z, z).sum() - _diagonal(z).sum()) / (len(z) * (len(z) - 1)) for z in (x, y))
    return float(within - 2 * _kernel(x, y).mean())


def _kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ y.T).div_(x.shape[1]).add_(1).pow_(3)


def _diagonal(x: torch.Tensor) -> torch.Tensor:
    """The kernel of each vector with itself, ``[n]``."""
    return (x.square().sum(1) / x.shape[1] + 1) ** 3
