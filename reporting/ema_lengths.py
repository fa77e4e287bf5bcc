"""The distance between generated and real images against the length of the average that made them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from formats.averages import MODEL, ema_names, posthoc_length
from formats.power_average import gamma_of, half_life
from reporting.results import Row
from reporting.runs import Run

OF_THE_AVERAGE = ("weights", "weights_sha256", "latent_statistics")  # of the settings of samples


@dataclass(frozen=True)
class LengthSeries:
    """Samples that differ in the average alone, by ascending length."""

    name: str  # of what tells them from the other lines; the metric's name where there are none
    weights: list[str]
    half_lives: list[float]  # steps within which half of an average's weight lies
    values: list[float]


@dataclass(frozen=True)
class LengthChart:
    """Lines of one metric."""

    title: str
    series: list[LengthSeries]


def length_charts(run: Run, rows: Sequence[Row]) -> list[LengthChart]:
    """One chart for each metric with which several averages of a run were measured alike.

    Args:
        run: the training.
        rows: measurements, those of other runs too; of several that are alike the newest counts.
    """
    found: dict[str, dict[tuple, dict[str, tuple[float, float]]]] = {}
    newest = sorted((row for row in rows if row.owner is run and row.samples), key=lambda row: row.measurement.created)
    for row in newest:
        metric = row.metric_of_images
        length = half_life_of(run, row) if metric else None
        if length is not None and math.isfinite(row.cells[metric].value):
            alike = row.samples.said(but=OF_THE_AVERAGE)
            key = tuple(sorted((alike | {"reference": row.reference, "images": f"{row.images:,}"}).items()))
            found.setdefault(metric, {}).setdefault(key, {})[row.weights] = (length, row.cells[metric].value)
    charts = []
    for metric, groups in found.items():
        several = {key: points for key, points in groups.items() if len(points) > 1}
        if several:
            lines = [
                _series(points, _name(dict(key), [*map(dict, several)]) or metric) for key, points in several.items()
            ]
            charts.append(LengthChart(metric, lines))
    return charts


def half_life_of(run: Run, row: Row) -> float | None:
    """Of the average that images were made with, in steps; None of weights as trained, and where it is unknown."""
    try:
        length = posthoc_length(row.weights)
        if length is not None:
            return half_life(row.samples.settings["train_steps"], gamma_of(length))
        if row.weights == MODEL:
            return None
        return math.log(0.5) / math.log(ema_names(run.arguments["ema_decay"])[row.weights])
    except (KeyError, ValueError, TypeError, ZeroDivisionError):  # of samples, or a run, that say something else
        return None


def _series(points: Mapping[str, tuple[float, float]], name: str) -> LengthSeries:
    ordered = sorted((length, value, weights) for weights, (length, value) in points.items())
    return LengthSeries(name, *([point[place] for point in ordered] for place in (2, 0, 1)))


def _name(settings: Mapping[str, Any], every: Sequence[Mapping[str, Any]]) -> str:
    """The settings that are not the same in all, in words."""
    differing = [key for key in settings if len({other.get(key) for other in every}) > 1]
    return ", ".join(f"{key.replace('_', ' ')} {settings[key]}" for key in differing)
