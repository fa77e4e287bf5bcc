"""Improved Precision and Recall (Kynkäänniemi et al. 2019, arXiv 1904.06991) with ADM's conventions.

A set's manifold is a ball around each of its vectors that reaches to its third nearest neighbour (index 3 of the sorted
distances, its own zero being index 0). Precision is the share of samples inside the reference's manifold, Recall the
share of reference vectors inside the samples'.

Distances come from float32 matrix products, block by block. What those cannot decide is settled in float64: a radius
is the third of the nearest few candidates' exact distances; a pair at a ball's surface, to rounding, is compared again.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

NEIGHBOUR = 3
CANDIDATES = 8  # neighbours by float32 distance, among which the third is found in float64
BLOCK = 4096  # vectors: a block of distances is 64 MB
UNSURE = 1e-5  # share of the squared norms by which a float32 distance may be wrong; a tenth of it was seen
EXACT_PAIRS = 256  # pairs whose exact distances are computed at once: 4 MB at 2048 dimensions, within the cache


@dataclass(frozen=True)
class Manifold:
    """A set of features ``[N, D]`` and the squared radius of the ball around each, float64 ``[N]``."""

    features: torch.Tensor
    squared_radii: torch.Tensor


def precision_recall(
    samples: torch.Tensor, reference: torch.Tensor, compared: Callable[[int], object] = lambda pairs: None
) -> tuple[float, float]:
    """Precision and Recall of two sets of features.

    Args:
        samples: float32 ``[N, D]``, at least 4 vectors.
        reference: float32 ``[M, D]``, at least 4 vectors, on the same device.
        compared: is told of pairs as they are done; :func:`count_pairs` says how many there are.
    """
    centre = reference.mean(0)  # vectors of smaller norm lose fewer digits
    ours, theirs = (Manifold(x, squared_radii(x, centre, compared)) for x in (samples, reference))
    in_theirs, in_ours = (torch.zeros(len(x), dtype=torch.bool, device=x.device) for x in (samples, reference))
    for rows in _blocks(len(samples)):
        for columns in _blocks(len(reference)):
            distances, unsure = _distances(samples[rows] - centre, reference[columns] - centre)
            _mark(in_theirs, ours.features, rows, theirs, columns, distances, unsure)
            _mark(in_ours, theirs.features, columns, ours, rows, distances.T, unsure)
            compared(distances.numel())
    return in_theirs.double().mean().item(), in_ours.double().mean().item()


def count_pairs(samples: int, reference: int) -> int:
    """Pairs that :func:`precision_recall` compares: each set's own, once for both directions, and all across."""
    pairs = samples * reference
    for count in (samples, reference):
        sizes = [block.stop - block.start for block in _blocks(count)]
        pairs += sum(size * sum(sizes[number:]) for number, size in enumerate(sizes))
    return pairs


def squared_radii(
    features: torch.Tensor, centre: torch.Tensor, compared: Callable[[int], object] = lambda pairs: None
) -> torch.Tensor:
    """Squared distance of each vector of ``[N, D]`` to its third nearest neighbour, float64 ``[N]``.

    Args:
        features: at least 4 vectors.
        centre: ``[D]``, subtracted before distances are computed.
        compared: is told of pairs as they are done.
    """
    count = len(features)
    if count <= NEIGHBOUR:
        raise ValueError(f"the neighbour at index {NEIGHBOUR} of {count} vectors")
    candidates = min(CANDIDATES, count - 1)
    near = features.new_full((count, candidates), torch.inf)
    who = torch.zeros(count, candidates, dtype=torch.int64, device=features.device)
    for rows in _blocks(count):
        for columns in _blocks(count, rows.start):
            distances, _ = _distances(features[rows] - centre, features[columns] - centre)
            if columns == rows:
                distances.fill_diagonal_(torch.inf)
            else:
                _keep_nearest(near, who, columns, distances.T.contiguous(), rows.start)
            _keep_nearest(near, who, rows, distances, columns.start)
            compared(distances.numel())
    items = torch.arange(count, device=features.device).repeat_interleave(candidates)
    exact = _exact_distances(features, items, features, who.flatten()).view(count, candidates)
    return exact.sort(1).values[:, NEIGHBOUR - 1]  # the vector itself, index 0, is not among the candidates


def _blocks(count: int, first: int = 0) -> Iterator[slice]:
    for start in range(first, count, BLOCK):
        yield slice(start, min(start + BLOCK, count))


def _distances(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Squared distances ``[n, m]`` of ``[n, D]`` and ``[m, D]``, and by how much each may be wrong."""
    x_norms, y_norms = x.square().sum(1, keepdim=True), y.square().sum(1)
    distances = torch.addmm(y_norms, x, y.T, alpha=-2).add_(x_norms)
    return distances, UNSURE * float(x_norms.max() + y_norms.max())


def _keep_nearest(
    near: torch.Tensor, who: torch.Tensor, rows: slice, distances: torch.Tensor, first_column: int
) -> None:
    """Keep the nearest candidates of ``rows`` among those so far and a block of distances ``[rows, columns]``."""
    found, place = distances.topk(min(near.shape[1], distances.shape[1]), dim=1, largest=False)
    both, numbers = torch.cat([near[rows], found], 1), torch.cat([who[rows], place + first_column], 1)
    near[rows], best = both.topk(near.shape[1], dim=1, largest=False)
    who[rows] = numbers.gather(1, best)


def _mark(
    inside: torch.Tensor,
    points: torch.Tensor,
    rows: slice,
    manifold: Manifold,
    columns: slice,
    distances: torch.Tensor,
    unsure: float,
) -> None:
    """Mark the points ``rows`` that lie in a ball of ``columns``, by squared distances ``[rows, columns]``.

    A point that no ball holds for sure is compared in float64 with the ball it is deepest in, or closest to.
    """
    gap, ball = (distances - manifold.squared_radii[columns].to(distances)).min(1)
    inside[rows] |= gap < -unsure
    at_surface = torch.nonzero(~inside[rows] & (gap <= unsure)).squeeze(1)
    items, balls = at_surface + rows.start, ball[at_surface] + columns.start
    exact = _exact_distances(points, items, manifold.features, balls)
    inside[items] = exact <= manifold.squared_radii[balls]


def _exact_distances(x: torch.Tensor, x_items: torch.Tensor, y: torch.Tensor, y_items: torch.Tensor) -> torch.Tensor:
    """Squared distances of pairs of vectors, float64 ``[n]``, for int64 ``[n]`` of their numbers."""
    parts = [
        (x[i].double() - y[j].double()).square().sum(1)
        for i, j in zip(x_items.split(EXACT_PAIRS), y_items.split(EXACT_PAIRS), strict=True)
    ]
    return torch.cat(parts)
