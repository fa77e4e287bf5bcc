"""The weighted sum of loss terms, each with a name of its own and a weight."""

from typing import Any

import torch


def total(terms: dict[str, torch.Tensor], weights: dict[str, float | torch.Tensor]) -> torch.Tensor:
    """Σ weight·term.

    Raises:
        ValueError: a term without a weight.
    """
    if missing := terms.keys() - weights.keys():
        raise ValueError(f"no weight for {', '.join(sorted(missing))}; there are weights for {', '.join(weights)}")
    return sum(weights[name] * term for name, term in terms.items())


def joined(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Terms, or weights, of two parts of a loss.

    Raises:
        ValueError: a name that both have: one of the two terms would be lost.
    """
    if twice := ours.keys() & theirs.keys():
        raise ValueError(f"two parts of the loss have a term {', '.join(sorted(twice))}; give one another name")
    return ours | theirs
