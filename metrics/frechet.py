"""Fréchet distance between Gaussians fitted to features, and the streaming moments that it needs.

FID (Heusel et al. 2017, arXiv 1706.08500, eq. 6): ``|m₁ − m₂|² + tr(C₁ + C₂ − 2 (C₁C₂)^½)``.
"""

from dataclasses import dataclass

import numpy as np
import torch

ROWS_AT_ONCE = 2048  # rows of features in one rank-k update of the scatter matrix


@dataclass(frozen=True)
class Gaussian:
    """``mean`` ``[D]`` and covariance ``cov`` ``[D, D]`` (unbiased), float64."""

    mean: np.ndarray
    cov: np.ndarray


class Moments:
    """Mean and scatter of any number of feature vectors, in float64, without keeping them.

    Batches are centred on their own mean before they are multiplied and then merged (Chan et al. 1979), so features far
    from the origin lose nothing. Partial moments, of other batches or other processes, merge in the same way.

    Args:
        dim: D.
        device: where the sums lie; features are moved there.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self._waiting: list[torch.Tensor] = []
        self._rows = 0  # that wait

    def update(self, features: torch.Tensor) -> None:
        """Add float ``[B, D]``; small batches wait until they are worth a matrix product."""
        self._waiting.append(features)
        self._rows += len(features)
        if self._rows >= ROWS_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Add what still waits."""
        waiting, self._waiting, self._rows = self._waiting, [], 0
        for rows in torch.cat(waiting).split(ROWS_AT_ONCE) if waiting else ():
            centred = rows.to(self.mean)
            mean = centred.mean(0)
            centred = centred - mean
            self._add(len(rows), mean)
            self.scatter.addmm_(centred.T, centred)

    def merge(self, count: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        """Add the moments of other features: how many, mean ``[D]``, sum of centred outer products ``[D, D]``."""
        self.flush()
        if count:
            self._add(count, mean.to(self.mean))
            self.scatter += scatter.to(self.mean)

    def gaussian(self) -> Gaussian:
        """What was seen so far, at least two vectors."""
        self.flush()
        if self.count < 2:
            raise ValueError(f"a covariance needs 2 vectors, there is {self.count}")
        return Gaussian(self.mean.cpu().numpy(), (self.scatter / (self.count - 1)).cpu().numpy())

    def _add(self, count: int, mean: torch.Tensor) -> None:
        """Move the mean, and add to the scatter what lies between both means."""
        total = self.count + count
        between = mean - self.mean
        self.mean += between * (count / total)
        self.scatter.addr_(between, between, alpha=self.count * count / total)
        self.count = total


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet distance of two Gaussians, at least 0; covariances may be singular.

    With ``C = F Fᵀ`` for each, ``tr (C₁C₂)^½`` is the sum of the singular values of ``F₁ᵀF₂``. Those are accurate to
    rounding, where the eigenvalues of a product of matrices lose half of the digits exactly when it is nearly singular.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {a.mean.shape[0]} and {b.mean.shape[0]} dimensions")
    shift = a.mean - b.mean
    overlap = torch.linalg.svdvals(_factor(a.cov).T @ _factor(b.cov)).sum().item()
    return max(0.0, float(shift @ shift + np.trace(a.cov) + np.trace(b.cov) - 2 * overlap))


def _factor(cov: np.ndarray) -> torch.Tensor:
    """``F`` with ``F Fᵀ = cov``: one column for each direction in which there is any variance, at least one."""
    values, vectors = torch.linalg.eigh(torch.from_numpy(cov))  # eigenvalues ascend
    is_variance = values > values[-1] * len(values) * torch.finfo(torch.float64).eps  # the rest is rounding
    is_variance[-1] = True
    return vectors[:, is_variance] * values[is_variance].clamp_min(0).sqrt()
