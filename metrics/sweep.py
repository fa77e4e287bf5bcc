"""What generate.py --sweep measures: a figure for each point, how far it is from the best, how much of that is noise.

Every point has the same labels and noise, so that points are compared in pairs: leaving out the same random eighth of
the images from both says how much their difference owes to the images drawn. That is the delete-a-group jackknife,
``SE² = (K − 1)/K · Σ (d_k − mean d)²`` over K groups. The reference counts as fixed.
"""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from files import write_atomically, write_json
from inference.sweep import Point
from metrics.evaluate_generation import GenerationEvaluation
from metrics.frechet import Moments, frechet_distance
from metrics.generation import describe_reference, figure_name, measurement, summarise_reference
from metrics.mind import choose_size, monge_distance
from metrics.record import Measurement, metrics_folder, read_measurements, write_measurement
from metrics.sources import ImageSet
from metrics.summary import Needs, Summary, summarise
from runtime.processes import Process

TABLE_NAME = "sweep"  # .json, .csv, .png
GROUPS = 8
WITHOUT = "without_a_group"  # in a record's settings
FEW_ERRORS = 2.0  # standard errors that noise alone may make


def frechet(features: torch.Tensor, reference: Summary) -> float:
    """Fréchet distance of features ``[N, D]`` from those of the reference."""
    moments = Moments(features.shape[1], features.device)
    moments.update(features)
    return frechet_distance(moments.gaussian(), reference.pooled)


def sliced(features: torch.Tensor, reference: Summary) -> float:
    """MIND of features ``[N, D]`` and those of the reference."""
    size = choose_size(len(features), len(reference.features))
    return monge_distance(features, reference.features, size=size)


# Of metrics.arguments.SWEEP_METRICS: the smaller, the better. A reference has what summarise_reference gives for them.
MEASURES: dict[str, Callable[[torch.Tensor, Summary], float]] = {"fid": frechet, "mind": sliced}


@dataclass(frozen=True)
class Figure:
    """Of one point: ``value``, and what it is without each of :data:`GROUPS` groups of images, if there are enough."""

    value: float
    without: tuple[float, ...] = ()


@dataclass(frozen=True)
class Row:
    """Of the table.

    Attributes:
        point: scale and interval.
        name: of its folder.
        value: of the measure.
        error: standard error of the value; None where there are too few images to tell.
        behind: how much larger than the best.
        behind_error: standard error of that, with the same images left out of both.
    """

    point: Point
    name: str
    value: float
    error: float | None
    behind: float
    behind_error: float | None

    @property
    def is_noise(self) -> bool:
        """Whether other images might well have put this point first."""
        return self.behind_error is not None and 0 < self.behind < FEW_ERRORS * self.behind_error


class PointRecords:
    """The figures of a sweep's points, in ``metrics/`` of its folder: they stay where a point's images are deleted.

    Args:
        folder: of the sweep.
        evaluation: with which reference and network; its one metric is the measure.
    """

    def __init__(self, folder: Path, evaluation: GenerationEvaluation):
        self.folder, self.evaluation = folder, evaluation
        (self.metric,) = evaluation.settings.metrics

    @property
    def title(self) -> str:
        """What the measure is called."""
        return figure_name(self.metric, self.evaluation.extractor.name)

    @cached_property
    def _against(self) -> dict:
        evaluation = self.evaluation
        reference = describe_reference(evaluation.reference, evaluation.extractor, evaluation.settings)
        return {"reference": reference, "extractor": evaluation.extractor.describe()}

    def found(self) -> dict[str, Measurement]:
        """What was measured against the same reference by the same network, by name of the point."""
        records = read_measurements(metrics_folder(self.folder))
        return {
            record.name: record
            for record in records
            if self.title in record.values
            and {"reference": record.reference, "extractor": record.extractor} == self._against
        }

    def measure(self, name: str, samples: ImageSet, process: Process) -> None:
        """Measure a point's images, on one process, and keep the figure."""
        evaluation = self.evaluation
        extractor, alone = evaluation.extractor.to(process.device), Process(0, 1, process.device)
        reference = summarise_reference(evaluation.reference, extractor, evaluation.settings, alone)
        features = summarise(
            samples.images,
            len(samples.images),
            extractor,
            Needs(pooled=False, spatial=False, scores=False, features=True),
            alone,
            batch_size=evaluation.settings.batch_size,
            num_workers=evaluation.settings.num_workers,
            description=f"measuring {name}",
        ).features
        figure = figure_of(features, reference, MEASURES[self.metric])
        values = {self.title: figure.value}
        record = measurement(values, samples, evaluation.reference, extractor, evaluation.settings, name)
        record.settings[WITHOUT] = list(figure.without)
        write_measurement(record, self.folder)


def figure_of(features: torch.Tensor, reference: Summary, measure: Callable[[torch.Tensor, Summary], float]) -> Figure:
    """Measure features ``[N, D]``, and again without each group; which image is in which depends on N alone."""
    value = measure(features, reference)
    count = min(GROUPS, len(features) // 2)
    if count < 2:
        return Figure(value)
    # at random, because labels may come in turn
    group = torch.from_numpy(np.random.default_rng(0).permutation(len(features)) % count).to(features.device)
    return Figure(value, tuple(measure(features[group != number], reference) for number in range(count)))


def jackknife_error(without: Sequence[float]) -> float | None:
    """Standard error from K values without one of K groups each; None where there are none."""
    if not without:
        return None
    spread = np.asarray(without) - np.mean(without)
    return float(np.sqrt((len(spread) - 1) / len(spread) * (spread**2).sum()))


def rank(points: Mapping[str, Point], figures: Mapping[str, Figure]) -> tuple[list[Row], Row]:
    """Rows in the order of the points, and the best one; of equals the first, which is guided less."""
    best = min(points, key=lambda name: figures[name].value)
    rows = []
    for name, point in points.items():
        figure, least = figures[name], figures[best]
        behind = [mine - theirs for mine, theirs in zip(figure.without, least.without, strict=True)]
        error = jackknife_error(figure.without)
        rows.append(Row(point, name, figure.value, error, figure.value - least.value, jackknife_error(behind)))
    return rows, next(row for row in rows if row.name == best)


def figures_of(records: Mapping[str, Measurement], title: str) -> dict[str, Figure]:
    """Of records as :meth:`PointRecords.found` gives them."""
    return {name: Figure(each.values[title], tuple(each.settings[WITHOUT])) for name, each in records.items()}


def table(rows: Sequence[Row], best: Row, title: str) -> str:
    """The rows in aligned columns, the best one marked."""
    has_guide = any(row.point.guide is not None for row in rows)
    lines = [("", *(["guide"] if has_guide else []), "scale", "low", "high", title, "±", "behind", "±")]
    for row in rows:
        point = row.point
        interval = (f"{point.low:g}", f"{point.high:g}") if point.scale != 1 else ("-", "-")
        mark = "*" if row is best else "~" if row.is_noise else ""
        figures = [(row.value, row.error), (row.behind, row.behind_error)]
        words = ["-" if number is None else f"{number:.4g}" for pair in figures for number in pair]
        guide = [f"{point.guide:g}"] if has_guide else []
        lines.append((mark, *guide, f"{point.scale:g}", *interval, *words))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)).rstrip() for line in lines)


def remarks(rows: Sequence[Row], best: Row, count: int) -> list[str]:
    """What the figures do not say, in sentences."""
    said = [f"note: at {count} images a distance is larger than at more; compare these with others of {count} only"]
    if best.error is None:
        return [*said, "note: too few images to say how much of the differences is noise"]
    close = sum(row.is_noise for row in rows)
    if close:
        said.append(
            f"note: {close} of the others (~) {'is' if close == 1 else 'are'} less than {FEW_ERRORS:g} standard errors "
            "behind the best (*): noise of the small sample; more --num-fid-samples tell them apart"
        )
    return said


def write_table(folder: Path, rows: Sequence[Row], best: Row, title: str, facts: Mapping) -> None:
    """``sweep.json`` and ``sweep.csv``; ``facts`` go into the first as they are."""
    listed = [
        asdict(row.point) | {key: value for key, value in asdict(row).items() if key != "point"} | {"measure": title}
        for row in rows
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, listed[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(listed)
    write_atomically(folder / f"{TABLE_NAME}.csv", text.getvalue().encode())
    write_json(folder / f"{TABLE_NAME}.json", {**facts, "best": best.name, "points": listed})
