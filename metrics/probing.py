"""Linear probes: how much of a label can be read off features with one matrix. Deterministic, nothing is drawn.

Features are standardised with the training images' mean and standard deviation, a linear layer is fitted by full-batch
L-BFGS from zero, for every strength of the L2 penalty from the strongest to the weakest (each from the one before), and
the validation images choose among these. Test images are seen once, by what was chosen.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from torch import Tensor

from dataset.latents import available_memory

ROWS = 4096  # features that are multiplied at once
PENALTIES = (10.0, 1.0, 0.1, 0.01, 0.001, 0.0001)
MAX_ITERATIONS = 100
HISTORY = 10  # gradients that L-BFGS remembers: with 1000 classes and 8192 features 33 MB each, twice
MIN_STD = 1e-6  # of a feature; below it, it says nothing and is left out


class ProbeFeatures:
    """Standardised feature vectors, a block at a time.

    Args:
        values: float32 ``[N, D]``, on the CPU.
        items: which of them, int64 ``[n]``.
        mean, scale: ``[D]``; what is subtracted, then multiplied by.
        device: where they are used; kept there where half of its free memory suffices.
    """

    def __init__(self, values: Tensor, items: np.ndarray, mean: Tensor, scale: Tensor, device: torch.device):
        self._values, self._items = values, torch.from_numpy(np.asarray(items, np.int64))
        self._mean, self._scale, self._device = mean.to(device), scale.to(device), device
        self._kept: list[Tensor] | None = None
        needed = len(items) * values.shape[1] * 4
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
        if needed < free // 2:
            self._kept = list(self.blocks())

    def __len__(self) -> int:
        return len(self._items)

    def blocks(self) -> Iterator[Tensor]:
        """In order, float32 ``[≤ ROWS, D]``."""
        if self._kept is not None:
            yield from self._kept
            return
        for part in self._items.split(ROWS):
            yield self._values[part].to(self._device).sub_(self._mean).mul_(self._scale)  # of a copy: indexing made one


def standardisation(values: Tensor, items: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal standard deviation ``[D]`` of some rows of ``[N, D]``; 0 for a feature that is constant."""
    total = torch.zeros(values.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    parts = torch.from_numpy(np.asarray(items, np.int64)).split(ROWS)
    for part in parts:
        total += values[part].double().sum(0)
    mean = total / len(items)
    for part in parts:  # a second pass, because the difference of large squares would be lost
        squares += (values[part].double() - mean).square().sum(0)
    std = (squares / len(items)).sqrt()
    scale = torch.where(std > MIN_STD, 1 / std.clamp_min(MIN_STD), 0.0)
    return mean.float(), scale.float()


@dataclass(frozen=True)
class LinearProbe:
    """``weight`` ``[A, D]`` and ``bias`` ``[A]`` over standardised features."""

    weight: Tensor
    bias: Tensor

    def scores(self, features: ProbeFeatures) -> Tensor:
        """Logits float32 ``[N, A]``, on the CPU."""
        return torch.cat([F.linear(block, self.weight, self.bias).cpu() for block in features.blocks()])


@dataclass(frozen=True)
class ChosenProbe:
    """What :func:`choose_probe` found.

    Attributes:
        probe: the one with the smallest validation loss.
        penalty: its L2 penalty.
        losses: the validation loss for each penalty.
    """

    probe: LinearProbe
    penalty: float
    losses: dict[float, float]


def data_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """Summed over images: cross-entropy for classes ``[n]``; for attributes ``[n, A]`` the sum of A binary ones.

    Args:
        scores: logits ``[n, A]``.
        targets: classes 0…A − 1, or attributes 0 and 1.
    """
    if targets.ndim == 1:
        return F.cross_entropy(scores, targets, reduction="sum")
    return F.binary_cross_entropy_with_logits(scores, targets.to(scores.dtype), reduction="sum")


def fit_probe(
    features: ProbeFeatures,
    targets: Tensor,
    outputs: int,
    penalty: float,
    start: LinearProbe | None = None,
    max_iterations: int = MAX_ITERATIONS,
) -> LinearProbe:
    """Minimise ``data_loss / N + penalty / 2 · |W|²`` (the bias is free) by L-BFGS with a strong Wolfe line search.

    Args:
        features: N of them.
        targets: as of :func:`data_loss`, on the CPU.
        outputs: A.
        penalty: of the squared weights.
        start: where to begin; by default at zero.
        max_iterations: of L-BFGS.
    """
    first = next(features.blocks())
    if start is None:
        start = LinearProbe(first.new_zeros(outputs, first.shape[1]), first.new_zeros(outputs))
    weight, bias = (tensor.clone().requires_grad_() for tensor in (start.weight, start.bias))
    targets = targets.to(first.device)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        history_size=HISTORY,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        total, done = torch.zeros((), dtype=torch.float64, device=first.device), 0
        for block in features.blocks():
            scores = F.linear(block, weight, bias).double()  # in float32 the line search would stop at rounding errors
            loss = data_loss(scores, targets[done : done + len(block)]) / len(features)
            loss.backward()
            total += loss.detach()
            done += len(block)
        regulariser = 0.5 * penalty * weight.double().square().sum()
        regulariser.backward()
        return total + regulariser.detach()

    optimizer.step(closure)
    return LinearProbe(weight.detach(), bias.detach())


def choose_probe(
    train: ProbeFeatures,
    train_targets: Tensor,
    validation: ProbeFeatures,
    validation_targets: Tensor,
    outputs: int,
    penalties: Sequence[float] = PENALTIES,
    after_each: Callable[[], object] = lambda: None,
) -> ChosenProbe:
    """Fit a probe for each penalty, from the strongest to the weakest, and take the one of the least validation loss.

    ``after_each`` is called after each of them.
    """
    probe, best, losses = None, None, {}
    for penalty in sorted(penalties, reverse=True):
        probe = fit_probe(train, train_targets, outputs, penalty, probe)
        loss = float(data_loss(probe.scores(validation).double(), validation_targets)) / len(validation)
        if best is None or loss < min(losses.values()):
            best = ChosenProbe(probe, penalty, losses)
        losses[penalty] = loss
        after_each()
    return best


def attribute_scores(scores: np.ndarray, targets: np.ndarray, k: int = 5) -> dict[str, float]:
    """How well binary attributes are predicted.

    - ``F1-macro``: mean over attributes of 2·TP / (2·TP + FP + FN), a probability of at least 0.5 being a prediction;
      ``F1-micro``: the same from the counts of all attributes together.
    - ``mAP``: mean over attributes of the average precision Σ (Rₙ − Rₙ₋₁)·Pₙ over the ranked images.
    - ``top5-recall``: of all pairs (image, attribute that it has), the share whose attribute is among the image's five
      best scored (equal scores: the first in the table wins). This is DeepFashion's top-k recall rate, the overall
      recall of Gong et al. 2014 (arXiv 1312.4894).

    Means are over the attributes that some image of the set has; of the others there is nothing to find.

    Args:
        scores: logits ``[N, A]``.
        targets: bool ``[N, A]``.
        k: of the recall.
    """
    has_any = targets.any(0)
    f1, precision = (column[has_any] for column in each_attribute(scores, targets))
    return {
        "F1-macro": float(f1.mean()),
        "F1-micro": float(_f1(scores.reshape(-1, 1), targets.reshape(-1, 1))[0]),
        "mAP": float(precision.mean()),
        f"top{k}-recall": top_k_recall(scores, targets, k),
    }


def each_attribute(scores: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """F1 and average precision of each attribute, ``[A]``; NaN for one that no image has."""
    precision = [
        average_precision_score(target, score) if target.any() else np.nan
        for score, target in zip(scores.T, targets.T, strict=True)
    ]
    return np.where(targets.any(0), _f1(scores, targets), np.nan), np.array(precision)


def top_k_recall(scores: np.ndarray, targets: np.ndarray, k: int = 5) -> float:
    """Of all (image, attribute that it has), the share among the image's k best scored attributes."""
    if not targets.any():
        return float("nan")
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return float(np.take_along_axis(targets, best, 1).sum() / targets.sum())


def class_scores(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """``top1`` and ``top5`` accuracy of logits ``[N, C]`` for classes ``[N]``; equal scores: the first class wins."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :5] == labels[:, None]
    return {"top1": float(best[:, 0].mean()), "top5": float(best.any(1).mean())}


def _f1(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """2·TP / (2·TP + FP + FN) of each column; 0 where nothing is there and nothing is predicted."""
    predicted = scores >= 0.0  # a probability of at least 0.5
    return 2 * (predicted & targets).sum(0) / np.maximum(predicted.sum(0) + targets.sum(0), 1)
