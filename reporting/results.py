"""Measurements of runs as rows of tables, with the published number beside each measured one.

A measured value stands beside a published one of the same name and the same kind only: guided samples beside guided
ones, and a Fréchet distance of another extractor (``FD-NAME``) never beside an FID.
"""

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from errors import UserError
from metrics.published import Published, PublishedRow
from metrics.record import Measurement, label_of
from reporting.runs import Run, Samples

GENERATION, RECONSTRUCTION = "Generated images", "Reconstruction"
OTHER_FEATURES = ", features of "
PROBES = {
    "attributes": "Probe: attributes",
    "classes": "Probe: classes",
    "uniformity": "Probe: uniformity of latents",
    "discrimination": "Probe: discrimination of latents",
}
SECTIONS = (GENERATION, RECONSTRUCTION, *PROBES.values())
ORDER = ("FID", "sFID", "IS", "Precision", "Recall", "KID", "rFID", "PSNR", "SSIM", "LPIPS-alex", "LPIPS-vgg",
         "F1-macro", "F1-micro", "mAP", "top5-recall", "top1", "top5")  # fmt: skip
GENERIC_NAMES = ("packed", "packed-val", "train", "val", "test")  # of a dataset: its parent's name says more
BENCHMARKS = ("celeba", "deepfashion", "awa")
PUBLISHED_F1 = "F1-macro"  # what a published F1 stands beside; its averaging is not published


@dataclass(frozen=True)
class Cell:
    """A measured figure.

    Attributes:
        value: as measured, or the mean over seeds.
        std: over seeds (of a sample); for a single measurement, of the estimate (KID's over its subsets), or None.
        published: of the same name and kind, or None.
    """

    value: float
    std: float | None = None
    published: float | None = None


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        section: which table it belongs to, see ``SECTIONS``; generated images have a table for each extractor.
        run: name of the run, or ``PRESET, mean of N``.
        detail: what of the run was measured and on what: the samples' folder, the data.
        guidance: ``none``, ``2.5 on [0, 0.75]``, or ``unknown``; empty where there is none to speak of.
        reference: what generated images were compared with; empty where nobody knows.
        images: how many were measured.
        cells: by the metric's name.
        published: the row whose numbers stand beside, or None.
        preset: that made the run, or None.
        changes: flags that were given beside the preset and change what is done.
        seeds: how many measurements it is the mean of.
        measurement: it is from; None for a mean.
        owner: the run; None for a mean.
        samples: that were measured, or None.
    """

    section: str
    run: str
    detail: str
    guidance: str
    reference: str
    images: int
    cells: Mapping[str, Cell]
    published: PublishedRow | None = None
    preset: str | None = None
    changes: tuple[str, ...] = ()
    seeds: int = 1
    measurement: Measurement | None = None
    owner: Run | None = None
    samples: Samples | None = None

    @property
    def metric_of_images(self) -> str | None:
        """The name of the distance between generated and real images that was measured: FID or FD-NAME."""
        if not self.section.startswith(GENERATION):
            return None
        return next((name for name in self.cells if name == "FID" or name.startswith("FD-")), None)


def published_rows(runs: Sequence[Run], given: Iterable[str], published: Published) -> dict[str, PublishedRow]:
    """Which published row each run reproduces, by the run's name: its preset's, unless one is given.

    Args:
        runs: of the report.
        given: ``RUN=ROW`` each, RUN a name or a path.

    Raises:
        UserError: no such run, no such row.
    """
    rows = {run.name: published.row(run.preset.published) for run in runs if run.preset and run.preset.published}
    for text in given:
        name, equals, row_id = text.rpartition("=")
        if not equals or not name:
            raise UserError(f"--published {text}: give RUN=ROW, e.g. {runs[0].name}=table1/sendvae-80")
        chosen = [run for run in runs if name == run.name or Path(name).resolve() == run.folder.resolve()]
        if not chosen:
            raise UserError(f"--published {text}: no run {name} here; there are {', '.join(run.name for run in runs)}")
        rows[chosen[0].name] = published.row(row_id)
    return rows


def result_rows(runs: Sequence[Run], reproduced: Mapping[str, PublishedRow], published: Published) -> list[Row]:
    """All measurements of all runs, in the order of ``SECTIONS`` and of the runs."""
    rows = []
    for run in runs:
        row = reproduced.get(run.name)
        places = [(None, m) for m in run.measurements] + [(s, m) for s in run.samples for m in s.measurements]
        rows += [_row(run, samples, measurement, row, published) for samples, measurement in places]
    return sorted(rows, key=lambda row: _section_order(row.section))


def with_means(rows: Sequence[Row]) -> list[Row]:
    """Add the mean and standard deviation wherever one preset was run several times (seeds), after its rows.

    Runs with other flags than the preset's are runs of one kind only with each other.

    A run counts once: what was measured under one name, of as many images, against the same; the newest where a run has
    several of these.
    """
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        what = (row.section, row.detail, row.guidance, row.reference, row.images, _usual_name(row.measurement))
        key = (row.preset, row.changes, *what, tuple(row.cells)) if row.preset else (id(row),)
        groups.setdefault(key, []).append(row)
    found = []
    for group in groups.values():
        found += group
        newest = {row.run: row for row in sorted(group, key=lambda row: row.measurement.created)}
        if len(newest) > 1:
            kinds = {row.changes for row in rows if row.preset == group[0].preset}
            found.append(_mean(list(newest.values()), group[0].changes if len(kinds) > 1 else ()))
    return found


def _usual_name(measurement: Measurement) -> str:
    """Its name without that of the data, which some of several runs alike may have behind it."""
    data = (measurement.reference or {}).get("path") or measurement.settings.get("data")
    return measurement.name.removesuffix(f"-{label_of(Path(str(data)))}") if data else measurement.name


def _mean(rows: Sequence[Row], changes: Sequence[str]) -> Row:
    """The mean of runs of one kind; ``changes`` tell it from other kinds of the same preset."""
    cells = {}
    for metric, cell in rows[0].cells.items():
        values = [row.cells[metric].value for row in rows]
        finite = all(map(math.isfinite, values))
        mean, std = (statistics.fmean(values), statistics.stdev(values)) if finite else (math.nan, math.nan)
        cells[metric] = Cell(mean, std, cell.published)
    name = " ".join([rows[0].preset, *changes]) + f", mean of {len(rows)}"
    nobody = {"measurement": None, "owner": None, "samples": None}
    return replace(rows[0], run=name, seeds=len(rows), cells=cells, **nobody)


def notes(rows: Iterable[Row]) -> list[str]:
    """What a reader must know: where the published numbers come from, and which are not comparable as they stand."""
    used: dict[str, PublishedRow] = {}
    warnings = []
    for row in rows:
        if all(cell.published is None for cell in row.cells.values()):
            continue
        used[row.published.id] = row.published
        if row.changes:
            warnings.append(
                f"{row.run}: run with {' '.join(row.changes)}, not as its preset {row.preset}: another setting than "
                "the published one"
            )
        usual = row.published.images
        if usual is not None and row.images != usual and not row.section.startswith("Probe"):
            warnings.append(
                f"{row.run}: measured on {row.images:,} images, published on {usual:,}: not comparable as they stand"
            )
    tables: dict[tuple[str, str, str], list[PublishedRow]] = {}
    for row in used.values():
        tables.setdefault((row.id.partition("/")[0], row.source, row.setting), []).append(row)
    lines = []
    for (table, source, setting), found in tables.items():
        named = [f"{row.id.partition('/')[2]}: {row.label}{f' ({row.note})' if row.note else ''}" for row in found]
        lines.append(f"published {table}: {source}. {setting}. {'; '.join(named)}")
    return list(dict.fromkeys(warnings)) + lines


def records(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """One flat record for each figure, for ``--format csv`` and ``json``."""
    return [
        {
            "run": row.run,
            "folder": str(row.owner.folder) if row.owner else None,
            "preset": row.preset,
            "section": row.section,
            "detail": row.detail,
            "guidance": row.guidance or None,
            "reference": row.reference or None,
            "images": row.images,
            "metric": metric,
            "measured": cell.value,
            "std": cell.std,
            "seeds": row.seeds,
            "published": cell.published,
            "published_row": row.published.id if cell.published is not None else None,
        }
        for row in rows
        for metric, cell in row.cells.items()
    ]


def metric_order(metric: str) -> tuple[int, str]:
    """A key that sorts metrics as tables show them; those of other extractors after the usual ones."""
    name = short_name(metric)
    return (ORDER.index(name) if name in ORDER else len(ORDER), metric)


def short_name(metric: str) -> str:
    """``attributes/mAP → mAP``; ``FD-timm/resnet50`` stays."""
    probe, _, name = metric.partition("/")
    return name if name and probe.isalpha() else metric


def dataset_of(measurement: Measurement) -> str:
    """The name of the data that a VAE was measured on; empty where the record does not tell."""
    places = [measurement.settings.get("data"), (measurement.reference or {}).get("path")]
    path = next((Path(str(place)) for place in places if place), None)
    if path is None:
        return ""
    return "/".join(path.parts[-2:]) if path.name in GENERIC_NAMES else path.name


def benchmark_of(measurement: Measurement) -> str | None:
    """Which published benchmark of attributes was probed, if one was."""
    text = f"{measurement.settings.get('attributes_of', '')} {measurement.name} {dataset_of(measurement)}"
    words = re.findall("[a-z]+", text.lower())
    return next((name for name in BENCHMARKS if name in words), None)


def _row(
    run: Run, samples: Samples | None, measurement: Measurement, row: PublishedRow | None, published: Published
) -> Row:
    section, guidance, detail, reference = RECONSTRUCTION, "", dataset_of(measurement), ""
    if measurement.kind == "generation":
        section, guidance = _generation_section(measurement), _guidance(measurement, samples)
        detail, reference = samples.path.name if samples else "", detail
    elif measurement.kind == "probe":
        section = _probe_section(measurement)
        if measurement.settings.get("features") == "pixels":
            detail = ", ".join([*([detail] if detail else []), "raw pixels"])
    cells = {}
    for metric in sorted(measurement.values, key=metric_order):
        if metric.endswith("-std") and metric.removesuffix("-std") in measurement.values:
            continue  # of the estimate before it
        value = _figure(run, measurement, metric)
        beside = _published_value(row, section, guidance, metric, measurement, published) if row else None
        cells[metric] = Cell(value, _spread(run, measurement, metric), beside)
    return Row(
        section=section,
        run=run.name,
        detail=detail,
        guidance=guidance,
        reference=reference,
        images=measurement.count,
        cells=cells,
        published=row,
        preset=run.preset.name if run.preset else None,
        changes=run.preset.changes if run.preset else (),
        measurement=measurement,
        owner=run,
        samples=samples,
    )


def _spread(run: Run, measurement: Measurement, metric: str) -> float | None:
    there = measurement.values.get(f"{metric}-std") is not None
    return _figure(run, measurement, f"{metric}-std") if there else None


def _figure(run: Run, measurement: Measurement, metric: str) -> float:
    value = measurement.values[metric]
    if value is None:
        return float("nan")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(
            f"{run.folder}: measurement {measurement.name}: {metric} is {value!r}, not a number; measure again"
        )
    return float(value)


def _guidance(measurement: Measurement, samples: Samples | None) -> str:
    settings = (samples.settings if samples else {}) or measurement.subject.get("made_by") or {}
    scale = settings.get("cfg_scale")
    if scale is None:
        return "unknown"
    low, high = settings.get("guidance_low", 0.0), settings.get("guidance_high", 1.0)
    if scale == 1:
        return "none"
    return f"{scale:g}" if (low, high) == (0, 1) else f"{scale:g} on [{low:g}, {high:g}]"


def _generation_section(measurement: Measurement) -> str:
    """Images compared by another network's features stand in a table of their own."""
    name = next((metric.removeprefix("FD-") for metric in measurement.values if metric.startswith("FD-")), None)
    return GENERATION if name is None else f"{GENERATION}{OTHER_FEATURES}{name}"


def _section_order(section: str) -> tuple[int, str]:
    base = section.partition(OTHER_FEATURES)[0]
    return (SECTIONS.index(base) if base in SECTIONS else len(SECTIONS), section)


def _probe_section(measurement: Measurement) -> str:
    prefix = next(iter(measurement.values), "").partition("/")[0]
    return PROBES.get(prefix, f"Probe: {prefix}" if prefix else "Probe")


def _published_value(
    row: PublishedRow, section: str, guidance: str, metric: str, measurement: Measurement, published: Published
) -> float | None:
    if section.startswith(GENERATION):
        group = {"unknown": None, "none": "generation"}.get(guidance, "guided")
        return published.value(row, group, metric) if group else None
    if section == RECONSTRUCTION:
        return published.value(row, "reconstruction", metric)
    benchmark = benchmark_of(measurement)
    if benchmark and metric == f"attributes/{PUBLISHED_F1}":
        return published.value(row, "probe", f"{benchmark}/F1")
    return None
