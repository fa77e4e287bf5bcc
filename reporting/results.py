"""Measurements of runs as rows of tables, each measured number with the published one to compare it with.

Only values of the same name and the same kind are compared: guided samples with guided ones, and the Fréchet distance
of another extractor (``FD-NAME``) never with an FID.
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

GENERATION, READING, RECONSTRUCTION = "Generated images", "Generated images, read", "Reconstruction"
FDR = "Generated images, FDr"  # ratios of Fréchet distances: not FDs, and not of one network
OTHER_FEATURES = ", features of "
PROBES = {
    "attributes": "Probe: attributes",
    "classes": "Probe: classes",
    "uniformity": "Probe: uniformity of latents",
    "discrimination": "Probe: discrimination of latents",
    "diffusability": "Probe: measures of latents",
}
SECTIONS = (GENERATION, FDR, READING, RECONSTRUCTION, *PROBES.values())
ORDER = ("FID", "sFID", "IS", "Precision", "Recall", "KID", "MIND", "FDr6", "FDr", "rFID", "PSNR", "SSIM", "LPIPS-alex",
         "LPIPS-vgg", "F1-macro", "F1-micro", "mAP", "top5-recall", "top1", "top5", "LDS", "CDS", "SRSS",
         "spectral-slope", "flip-error", "rotation-error", "shift-error", "scale-error", "channel-correlation",
         "sphere-uniformity", "participation-token", "participation-latent", "TwoNN", "velocity-gaussian",
         "velocity-variance")  # fmt: skip
GENERIC_NAMES = ("packed", "packed-val", "train", "val", "test")  # of a dataset: its parent's name says more
BENCHMARKS = ("celeba", "deepfashion", "awa")
PUBLISHED_RESOLUTION = 256  # of all published reconstructions
PUBLISHED_F1 = "F1-macro"  # compared with the published F1, whose averaging is not published


@dataclass(frozen=True)
class Cell:
    """A measured figure."""

    value: float  # as measured, or the mean over seeds
    std: float | None = None  # over seeds (of a sample), or of the estimate (KID's over its subsets)
    published: float | None = None  # of the same name and kind


@dataclass(frozen=True)
class Row:
    """One measurement, or the mean of several, which has no measurement, owner and samples."""

    section: str  # the table it belongs to, see ``SECTIONS``; generated images have one table per extractor
    run: str  # name of the run, or ``PRESET, mean of N``
    detail: str  # what of the run was measured and on what: the samples' folder, the data
    guidance: str  # ``none``, ``2.5 on [0, 0.75]``, also with ``, learned``, or ``unknown``; empty if it does not apply
    reference: str  # what generated images were compared with; empty if unknown
    images: int  # how many were measured
    cells: Mapping[str, Cell]  # by the metric's name
    published: PublishedRow | None = None  # to compare with
    preset: str | None = None  # that made the run
    changes: tuple[str, ...] = ()  # flags given in addition to the preset's that change what is done
    weights: str = ""  # which ones made generated images, see ``formats.averages``; empty if unknown
    labels: str = ""  # how classes of generated images were drawn: ``random`` or ``equal``; empty if unknown
    sampler: str = ""  # how images were made of noise, e.g. ``SDE, 250 steps``; empty if unknown
    seeds: int = 1  # how many measurements it is the mean of
    measurement: Measurement | None = None
    owner: Run | None = None
    samples: Samples | None = None

    @property
    def metric_of_images(self) -> str | None:
        """The measured distance between generated and real images: FID or FD-NAME."""
        if not self.section.startswith(GENERATION):
            return None
        return next((name for name in self.cells if name == "FID" or name.startswith("FD-")), None)


def published_rows(runs: Sequence[Run], given: Iterable[str], published: Published) -> dict[str, PublishedRow]:
    """Which published row each run reproduces, by the run's name: its preset's, unless ``RUN=ROW`` gives another.

    RUN is a name or a path. Raises UserError if there is no such run or row.
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
    return sorted(_with_resolutions(rows), key=lambda row: _section_order(row.section))


def _with_resolutions(rows: Sequence[Row]) -> list[Row]:
    """Reconstructions of several sides say which."""
    sides = [row.measurement.settings.get("resolution") if row.section == RECONSTRUCTION else None for row in rows]
    if len(set(filter(None, sides))) < 2:
        return list(rows)
    return [
        replace(row, detail=", ".join(filter(None, [row.detail, f"{side} px"]))) if side else row
        for row, side in zip(rows, sides, strict=True)
    ]


def with_means(rows: Sequence[Row]) -> list[Row]:
    """Add the mean and standard deviation after the rows of a preset that was run several times (seeds).

    Runs that changed flags of the preset are averaged only with runs that changed the same flags. A run counts once,
    with its newest measurement of that name, number of images and reference.
    """
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        what = (
            row.section,
            row.detail,
            row.weights,
            row.labels,
            row.sampler,
            row.guidance,
            row.reference,
            row.images,
            _usual_name(row.measurement),
        )
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
    """Its name without that of the data, which only some of the seeds' measurements may have as a suffix."""
    data = (measurement.reference or {}).get("path") or measurement.settings.get("data")
    return measurement.name.removesuffix(f"-{label_of(Path(str(data)))}") if data else measurement.name


def _mean(rows: Sequence[Row], changes: Sequence[str]) -> Row:
    """The mean over seeds; ``changes`` distinguish it from other means of the same preset."""
    cells = {}
    for metric, cell in rows[0].cells.items():
        values = [row.cells[metric].value for row in rows]
        finite = all(map(math.isfinite, values))
        mean, std = (statistics.fmean(values), statistics.stdev(values)) if finite else (math.nan, math.nan)
        cells[metric] = Cell(mean, std, cell.published)
    name = " ".join([rows[0].preset, *changes]) + f", mean of {len(rows)}"
    return replace(rows[0], run=name, seeds=len(rows), cells=cells, measurement=None, owner=None, samples=None)


def notes(rows: Iterable[Row]) -> list[str]:
    """What a reader must know: where the published numbers come from, and which are not comparable as they stand."""
    used: dict[str, PublishedRow] = {}
    warnings = []
    for row in rows:
        if all(cell.published is None for cell in row.cells.values()):
            continue
        used[row.published.id] = row.published
        if row.changes:
            how = f"run with {' '.join(row.changes)}, not as its preset {row.preset}"
            warnings.append(f"{row.run}: {how}: not the published setting")
        usual = row.published.images
        if usual is not None and row.images != usual and not row.section.startswith("Probe"):
            warnings.append(
                f"{row.run}: measured on {row.images:,} images, published on {usual:,}: not comparable as they stand"
            )
    tables: dict[str, list[str]] = {}
    for row in used.values():
        table, _, name = row.id.partition("/")
        label = f"{name}: {row.label}{f' ({row.note})' if row.note else ''}"
        tables.setdefault(f"published {table}: {row.source}. {row.setting}. ", []).append(label)
    return list(dict.fromkeys(warnings)) + [source + "; ".join(labels) for source, labels in tables.items()]


def records(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """One flat record for each figure, for ``--format csv`` and ``json``."""
    return [
        {
            "run": row.run,
            "folder": str(row.owner.folder) if row.owner else None,
            "preset": row.preset,
            "section": row.section,
            "detail": row.detail,
            "weights": row.weights or None,
            "labels": row.labels or None,
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
    """Sorting key: the order of tables, metrics of other extractors after the usual ones."""
    name = short_name(metric)
    return (ORDER.index(name) if name in ORDER else len(ORDER), metric)


def short_name(metric: str) -> str:
    """``attributes/mAP → mAP``; ``FD-timm/resnet50`` stays."""
    probe, _, name = metric.partition("/")
    return name if name and probe.isalpha() else metric


def dataset_of(measurement: Measurement) -> str:
    """The name of the data that a VAE was measured on; empty if unknown."""
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
        section, guidance = _generation_section(measurement), guidance_of(measurement, samples)
        detail, reference = samples.path.name if samples else "", detail
    elif measurement.kind == "reading":
        section, guidance = READING, guidance_of(measurement, samples)
        detail, reference = samples.path.name if samples else "", detail
    elif measurement.kind == "fdr":
        section, guidance = FDR, guidance_of(measurement, samples)
        denominators = label_of(Path(str(measurement.settings.get("denominators"))))
        detail, reference = samples.path.name if samples else "", f"{detail}, denominators {denominators}"
    elif measurement.kind == "probe":
        section = _probe_section(measurement)
        if measurement.settings.get("features") == "pixels":
            detail = ", ".join([*([detail] if detail else []), "raw pixels"])
    cells = {}
    for metric in sorted(measurement.values, key=metric_order):
        if metric.endswith("-std") and metric.removesuffix("-std") in measurement.values:
            continue  # belongs to the estimate before it
        known = measurement.values.get(f"{metric}-std") is not None
        std = _figure(run, measurement, f"{metric}-std") if known else None
        compared = _published_value(row, section, guidance, metric, measurement, published) if row else None
        cells[metric] = Cell(_figure(run, measurement, metric), std, compared)
    preset = (run.preset.name, run.preset.changes) if run.preset else (None, ())
    what = (section, _name_of(run, measurement), detail, guidance, reference, measurement.count)
    made_by = _made_by(measurement, samples)
    how = (made_by.get("weights") or "", _labels(measurement, samples), sampler_of(made_by))
    return Row(*what, cells, row, *preset, *how, measurement=measurement, owner=run, samples=samples)


def _name_of(run: Run, measurement: Measurement) -> str:
    """The run's, or the VAE's own where several were measured into one folder."""
    vaes = {each.subject.get("vae_checksum") for each in run.measurements if each.subject.get("vae_checksum")}
    if len(vaes) < 2 or measurement not in run.measurements:
        return run.name
    path = Path(str(measurement.subject.get("path")))
    return path.parent.name if path.name == "vae" else path.name


def _figure(run: Run, measurement: Measurement, metric: str) -> float:
    value = measurement.values[metric]
    if value is None:
        return float("nan")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(
            f"{run.folder}: measurement {measurement.name}: {metric} is {value!r}, not a number; measure again"
        )
    return float(value)


def _made_by(measurement: Measurement, samples: Samples | None) -> Mapping[str, Any]:
    """How images were made, as far as it is known."""
    return (samples.settings if samples else {}) or measurement.subject.get("made_by") or {}


def _labels(measurement: Measurement, samples: Samples | None) -> str:
    settings = _made_by(measurement, samples)
    classes = settings.get("classes")
    of_some = "" if classes is None else f" of {len(classes)} classes"
    return f"{settings['label_sampling']}{of_some}" if settings.get("label_sampling") else ""


def sampler_of(made_by: Mapping[str, Any]) -> str:
    """By the settings of samples, ``ODE Heun, 20 steps, times shifted by 2``; empty if they do not say."""
    if made_by.get("mode") is None:
        return ""
    words = [f"{made_by['mode'].upper()}{' Heun' if made_by.get('heun') else ''}", f"{made_by.get('num_steps')} steps"]
    if made_by.get("time_shift") not in (None, 1):
        words.append(f"times shifted by {made_by['time_shift']:g}")
    if made_by.get("damped"):
        words.append("damped")
    if made_by.get("decoder"):
        words.append(f"decoded by {made_by['decoder']}")
    return ", ".join(words)


def guidance_of(measurement: Measurement, samples: Samples | None) -> str:
    """Of images, in words: what sampling gave, and what a flow map had learned."""
    settings = _made_by(measurement, samples)
    scale = settings.get("cfg_scale")
    if scale is None:
        return "unknown"
    learned = settings.get("learned_guidance")
    if scale == 1:
        return "none" if learned is None else f"{learned}, learned"
    channels = settings.get("guidance_channels")
    of_channels = "" if channels is None else f" of {channels} channels"
    by = "" if settings.get("guide") is None else f" by {settings['guide']}"
    and_guide = ""
    if settings.get("guide_scale") is not None:
        and_guide = f", and {settings['guide_scale']:g}{by}{of_channels}{_interval(settings, 'guide')}"
        by = ""
    given = f"{scale:g}{by}{of_channels}{_interval(settings, 'guidance')}{and_guide}"
    return given if learned is None else f"{given}, and {learned}, learned"


def _interval(settings: Mapping[str, Any], name: str) -> str:
    low, high = settings.get(f"{name}_low") or 0.0, settings.get(f"{name}_high")
    high = 1.0 if high is None else high
    return "" if (low, high) == (0, 1) else f" on [{low:g}, {high:g}]"


def _generation_section(measurement: Measurement) -> str:
    """Images compared by another network's features have a table of their own."""
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
        same = measurement.settings.get("resolution", PUBLISHED_RESOLUTION) == PUBLISHED_RESOLUTION
        return published.value(row, "reconstruction", metric) if same else None
    benchmark = benchmark_of(measurement)
    if benchmark and metric == f"attributes/{PUBLISHED_F1}":
        return published.value(row, "probe", f"{benchmark}/F1")
    return None
