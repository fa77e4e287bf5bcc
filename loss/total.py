"""The one place where weights meet terms."""

import torch


def total(terms: dict[str, torch.Tensor], weights: dict[str, float | torch.Tensor]) -> torch.Tensor:
    """Σ weight·term over ``terms``; every term must have a weight."""
    return sum(weights[name] * term for name, term in terms.items())
