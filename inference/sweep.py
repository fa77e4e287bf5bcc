"""The points of ``generate.py --sweep``: scales and intervals of guidance. Needs no torch."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from runtime.cli import fraction, non_negative_float

AXES = {"low": fraction, "high": fraction, "scale": non_negative_float}
DEFAULT_SAMPLES = 5000


@dataclass(frozen=True)
class Point:
    """``scale`` while ``low ≤ t ≤ high``: flags ``--cfg-scale``, ``--guidance-low`` and ``--guidance-high``."""

    scale: float
    low: float = 0.0
    high: float = 1.0

    @property
    def is_guided(self) -> bool:
        return self.scale != 1

    def flags(self) -> list[str]:
        """As words of a command line."""
        named = (("--cfg-scale", self.scale), ("--guidance-low", self.low), ("--guidance-high", self.high))
        return [word for name, value in named for word in (name, f"{value:.12g}")] if self.is_guided else []


def axis(text: str) -> tuple[str, tuple[float, ...]]:
    """An argparse type: ``NAME=A,B,…`` of :data:`AXES`."""
    name, _, values = text.partition("=")
    if name not in AXES or not values:
        raise argparse.ArgumentTypeError(f"{text!r}: give scale=A,B,… and, if wanted, high=A,B,… and low=A,B,…")
    return name, tuple(AXES[name](value) for value in values.split(","))


def points_of(axes: Sequence[tuple[str, tuple[float, ...]]], others: Mapping[str, float]) -> list[Point]:
    """Every combination, once: without guidance there is no interval, and one that ends before it begins is none.

    Args:
        axes: of :func:`axis`, each name at most once.
        others: the value of each axis that is not swept.
    """
    grid = dict(axes)
    combinations = product(*(grid.get(name, (others[name],)) for name in AXES))
    points = (Point(scale, low, high) if scale != 1 else Point(1.0) for low, high, scale in combinations if low <= high)
    return sorted(dict.fromkeys(points), key=lambda point: (point.is_guided, point.low, point.high, point.scale))
