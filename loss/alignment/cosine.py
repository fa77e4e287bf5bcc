"""Cosines of predicted tokens and VFM features (Send-VAE's L_align; REPA's loss but for a constant)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def patch_cosine(tokens: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of every predicted token with its feature, in float32: two ``[B, N, D]`` → ``[B, N]``."""
    return F.cosine_similarity(tokens.float(), features.float(), dim=-1)


def patch_cosine_loss(tokens: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Mean over batch and patches of ``1 − cos(tokens, features)``."""
    return 1 - patch_cosine(tokens, features).mean()


def averaged(metric: str, encoders: Sequence[str], losses: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Terms of an alignment with one or several VFMs: their average is the one that is weighted.

    Args:
        metric: name of the average.
        encoders: names of the VFMs; of several, each one's loss is a term ``METRIC/NAME`` too, to be seen.
        losses: scalars, in the same order.
    """
    terms = {metric: torch.stack(list(losses)).mean()}
    if len(losses) > 1:
        terms |= {f"{metric}/{name}": loss.detach() for name, loss in zip(encoders, losses, strict=True)}
    return terms


def constant_predictor_cosine(unit_feature_sum: torch.Tensor, count: int) -> torch.Tensor:
    """Mean cosine of the best predictor that ignores the image: one vector a position, fitted on the same features.

    For unit features u the best constant is along their mean m, and the mean of cos(u, m) is exactly ‖m‖. An
    alignment is worth something only as far as it exceeds this on held-out images.

    Args:
        unit_feature_sum: sum over images of the features scaled to unit length, ``[N, D]``.
        count: number of images.
    """
    return (unit_feature_sum / count).norm(dim=-1).mean()
