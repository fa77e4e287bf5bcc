"""Correlation coefficients of few points, and how little they are known."""

import math
from collections.abc import Sequence
from statistics import correlation

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95
FEWEST = 3  # groups in a draw: the r of two points is ±1


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's correlation coefficient; NaN if one of the sequences is constant or not finite."""
    try:
        return correlation(x, y)
    except (ValueError, OverflowError):
        return math.nan


def partial_correlation(x: Sequence[float], y: Sequence[float], given: Sequence[float]) -> float:
    """Pearson's r of what a line in ``given`` leaves of x and of y; NaN where it leaves nothing, or of 3 points."""
    xy, xz, yz = pearson(x, y), pearson(x, given), pearson(y, given)
    left = (1 - xz**2) * (1 - yz**2)
    return (xy - xz * yz) / math.sqrt(left) if len(x) > 3 and left > 1e-12 else math.nan


def bootstrap_interval(x: Sequence[float], y: Sequence[float], groups: Sequence[str]) -> tuple[float, float]:
    """The percentile bootstrap's 95 % interval of Pearson's r, groups drawn as wholes; the same in every call.

    Draws of fewer than three different groups, or in which x or y is constant, have no r and are left out. NaN for
    fewer than four groups, of which there is only one such draw.

    Args:
        x, y: of n points.
        groups: which of the points are drawn together: SiTs on one VAE.
    """
    names, x, y = list(dict.fromkeys(groups)), np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(names) <= FEWEST or not np.isfinite([x, y]).all() or 0 in (np.ptp(x), np.ptp(y)):
        return math.nan, math.nan
    x, y = ((values - values.mean()) / values.std() for values in (x, y))
    members = np.array([[group == name for group in groups] for name in names], np.float64)
    drawn = np.random.default_rng(0).integers(len(names), size=(RESAMPLES, len(names)))
    times = np.stack([(drawn == number).sum(1) for number in range(len(names))], 1)  # how often each group is
    weights = times[(times > 0).sum(1) >= FEWEST] @ members
    weights /= weights.sum(1, keepdims=True)
    dx, dy = (values - (weights @ values)[:, None] for values in (x, y))
    products = (weights * dx * dy).sum(1)
    variances = (weights * dx**2).sum(1) * (weights * dy**2).sum(1)
    varied = variances > 1e-12
    if not varied.any():
        return math.nan, math.nan
    ends = np.quantile(products[varied] / np.sqrt(variances[varied]), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    low, high = ends.clip(-1, 1)
    return float(low), float(high)
