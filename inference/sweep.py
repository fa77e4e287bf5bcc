"""Points of guidance: scales and intervals, one or those of ``generate.py --sweep``. Needs no torch."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from runtime.cli import flag_of, fraction, non_negative_float

# Axes of a sweep, by the flag in whose place each is.
AXES = {"low": "guidance_low", "high": "guidance_high", "scale": "cfg_scale", "guide": "guide_scale"}
KINDS = {"low": fraction, "high": fraction, "scale": non_negative_float, "guide": non_negative_float}
DEFAULT_SAMPLES = 5000


@dataclass(frozen=True)
class Point:
    """``scale`` while ``low ≤ t ≤ high``: flags ``--cfg-scale``, ``--guidance-low`` and ``--guidance-high``.

    Attributes:
        guide: ``--guide-scale``, of a guide that the null class is added to; None: of none, or of one in its place.
    """

    scale: float
    low: float = 0.0
    high: float = 1.0
    guide: float | None = None

    @property
    def is_guided(self) -> bool:
        return self.scale != 1 or self.guide not in (None, 1)

    @property
    def has_guide(self) -> bool:
        """Whether a guide acts, if there is one."""
        return self.guide != 1 if self.guide is not None else self.scale != 1

    @property
    def has_both(self) -> bool:
        """Whether a guide and the null class act."""
        return self.scale != 1 and self.guide not in (None, 1)

    def flags(self) -> list[str]:
        """As words of a command line."""
        names = ["scale", "low", "high"] if self.scale != 1 else []
        names += ["guide"] if self.guide not in (None, 1) else []
        return [word for name in names for word in (flag_of(AXES[name]), f"{getattr(self, name):.12g}")]


def point_of(args: argparse.Namespace) -> Point:
    """What the flags say."""
    return Point(**{name: getattr(args, flag) for name, flag in AXES.items()})


def settle(args: argparse.Namespace, point: Point) -> None:
    """Give the flags the values of a point, as few as say the same: a guide alone has the null class's place."""
    for name, flag in AXES.items():
        setattr(args, flag, getattr(point, name))
    if point.guide is not None and point.scale == 1:
        args.cfg_scale, args.guidance_low, args.guidance_high = point.guide, args.guide_low, args.guide_high
    if point.guide == 1 or point.scale == 1:
        args.guide_scale = None
    if not point.has_guide:
        args.guide = None
    if args.guide_scale is None:
        args.guide_low, args.guide_high = 0.0, 1.0
    if args.cfg_scale == 1:  # nothing is guided, at any time
        args.guidance_low, args.guidance_high, args.guidance_channels = 0.0, 1.0, None


def axis(text: str) -> tuple[str, tuple[float, ...]]:
    """An argparse type: ``NAME=A,B,…`` of :data:`AXES`."""
    name, _, values = text.partition("=")
    if name not in AXES or not values:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give scale=A,B,… and, if wanted, high=A,B,…, low=A,B,… and guide=A,B,…"
        )
    return name, tuple(KINDS[name](value) for value in values.split(","))


def points_of(axes: Sequence[tuple[str, tuple[float, ...]]], others: Mapping[str, float | None]) -> list[Point]:
    """Every combination, once: at scale 1 there is no interval, and one that ends before it begins is none.

    Args:
        axes: of :func:`axis`, each name at most once.
        others: the value of each axis that is not swept.
    """
    grid = dict(axes)
    combinations = product(*(grid.get(name, (others[name],)) for name in AXES))
    points = (
        Point(scale, low, high, guide) if scale != 1 else Point(1.0, guide=guide)
        for low, high, scale, guide in combinations
        if low <= high
    )
    return sorted(
        dict.fromkeys(points),
        key=lambda point: (
            *(point.is_guided, point.guide or 0.0, point.scale != 1),
            *(point.low, point.high, point.scale),
        ),
    )
