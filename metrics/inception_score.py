"""Inception Score (Salimans et al. 2016, arXiv 1606.03498) as ADM evaluates it, from sums over each split."""

import torch

SPLIT_SIZE = 5000


class InceptionScore:
    """Mean over the splits of ``exp(E KL(p(y|x) ‖ p(y)))``, where ``p(y)`` is the split's mean.

    A split is ``SPLIT_SIZE`` successive images, the last one may be shorter. As the mean divergence is
    ``E[Σ p log p] − Σ p̄ log p̄``, sums of ``p`` and of ``Σ p log p`` suffice, in whatever order images come and on
    whatever process.

    Args:
        images: number of images.
        classes: C.
        split_size: images in a split.
        device: where the sums lie.
    """

    def __init__(
        self, images: int, classes: int, split_size: int = SPLIT_SIZE, device: torch.device | str = "cpu"
    ) -> None:
        self.split_size = split_size
        # for each split: sums of p over its images [C], sum of Σ p log p, count
        self.sums = torch.zeros(-(-images // split_size), classes + 2, dtype=torch.float64, device=device)

    def update(self, items: torch.Tensor, logits: torch.Tensor) -> None:
        """Add images number ``items`` (int64 ``[B]``) with logits ``[B, C]``."""
        log_p = logits.to(self.sums).log_softmax(dim=1)
        p = log_p.exp()
        rows = torch.cat([p, (p * log_p).sum(1, keepdim=True), torch.ones_like(p[:, :1])], dim=1)
        self.sums.index_add_(0, (items // self.split_size).to(self.sums.device), rows)

    def score(self) -> float:
        """The Inception Score of what was added."""
        sums = self.sums[self.sums[:, -1] > 0]
        mean_p, mean_negative_entropy = sums[:, :-2] / sums[:, -1:], sums[:, -2] / sums[:, -1]
        return float((mean_negative_entropy - torch.xlogy(mean_p, mean_p).sum(1)).exp().mean())
