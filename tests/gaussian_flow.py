"""Gaussian data, for which everything about a flow is known in closed form; derived here anew, in float64."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GaussianFlow:
    """Data from N(mean, covariance) on a path ``x_t = α·x + σ·ε``.

    Attributes:
        mean: float64 ``[d]``.
        covariance: float64 ``[d, d]``.
        path_type: ``"linear"`` or ``"cosine"``.
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    path_type: str

    def coefficients(self, t: float) -> tuple[float, float, float, float]:
        """α, σ and their derivatives."""
        if self.path_type == "linear":
            return 1 - t, t, -1.0, 1.0
        angle = math.pi * t / 2
        return math.cos(angle), math.sin(angle), -math.pi / 2 * math.sin(angle), math.pi / 2 * math.cos(angle)

    def marginal(self, t: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and covariance of x_t."""
        alpha, sigma, _, _ = self.coefficients(t)
        return alpha * self.mean, alpha**2 * self.covariance + sigma**2 * torch.eye(len(self.mean)).double()

    def score(self, x: torch.Tensor, t: float) -> torch.Tensor:
        """∇ log p_t at ``x`` ``[B, d]``."""
        mean, covariance = self.marginal(t)
        return -torch.linalg.solve(covariance, (x - mean).T).T

    def data_and_noise(self, x: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Conditional expectations of x and ε given x_t, by regression: cov(x, x_t)·cov(x_t)⁻¹, and likewise for ε."""
        alpha, sigma, _, _ = self.coefficients(t)
        mean, covariance = self.marginal(t)
        whitened = torch.linalg.solve(covariance, (x - mean).T).T
        return self.mean + alpha * whitened @ self.covariance, sigma * whitened

    def velocity(self, x: torch.Tensor, t: float, y: torch.Tensor | None = None) -> torch.Tensor:
        """E[α̇·x + σ̇·ε | x_t]."""
        _, _, alpha_rate, sigma_rate = self.coefficients(t)
        data, noise = self.data_and_noise(x, t)
        return alpha_rate * data + sigma_rate * noise


def gaussian_flow(path_type: str, diagonal: bool = False) -> GaussianFlow:
    """Three dimensions, mean not zero, standard deviations from 0.5 to 1.5, correlated unless ``diagonal``."""
    mean = torch.tensor([0.7, -1.1, 0.4], dtype=torch.float64)
    scales = torch.tensor([0.5, 1.5, 1.0], dtype=torch.float64)
    correlation = torch.tensor([[1.0, 0.6, -0.3], [0.6, 1.0, 0.2], [-0.3, 0.2, 1.0]], dtype=torch.float64)
    if diagonal:
        correlation = torch.eye(3).double()
    return GaussianFlow(mean, scales[:, None] * correlation * scales, path_type)
