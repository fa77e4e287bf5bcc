"""Probes of VAEs against the images that diffusion models make with them: the paper's Figure 1 from one's own runs."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from statistics import correlation, fmean

from formats.averages import MAIN
from metrics.published import Published
from reporting.results import BENCHMARKS, PROBES, PUBLISHED_F1, Row
from reporting.tables import NOTHING, Column, aligned, markdown_table, number_word

ATTRIBUTES = "attributes/"
MAIN_METRIC = f"{ATTRIBUTES}{PUBLISHED_F1}"
COMPARED = (MAIN_METRIC, *(f"{ATTRIBUTES}{name}" for name in ("F1-micro", "mAP", "top5-recall")))
ENOUGH = 3  # a correlation of two points is ±1
PICTURE_SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Point:
    """One VAE: what a probe finds in its latents, and what a SiT trained on them generates."""

    vae: str  # names of the runs
    sit: str
    checksum: str  # of the VAE
    probes: Mapping[str, float]  # attribute metrics of the VAE, by name
    distance: float  # of the SiT's images


@dataclass(frozen=True)
class View:
    """Points that may be compared: the same probe, the same measure of images, SiTs of one size and length."""

    data: str  # that was probed
    metric: str  # of the images, ``FID`` or ``FD-NAME``
    guidance: str  # of the samples
    reference: str  # that they were compared with
    sit: str  # model, steps and weights of the SiTs
    points: list[Point]  # one for each SiT

    @property
    def vaes(self) -> int:
        return len({point.checksum for point in self.points})

    @property
    def title(self) -> str:
        guided = "" if self.guidance in ("none", "") else f", guidance {self.guidance}"
        return f"Probe F1{f' on {self.data}' if self.data else ''} against {self.metric} ({self.sit}{guided})"

    def correlations(self) -> dict[str, float]:
        """Pearson's r of each attribute metric that all points have with the distance; NaN where one does not vary."""
        shared = set.intersection(*(set(point.probes) for point in self.points))
        names = [name for name in COMPARED if name in shared]
        distances = [point.distance for point in self.points]
        return {name: pearson([point.probes[name] for point in self.points], distances) for name in names}


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's correlation coefficient; NaN if one of the sequences is constant or not finite."""
    try:
        return correlation(x, y)
    except (ValueError, OverflowError):
        return math.nan


def views(rows: Sequence[Row]) -> list[View]:
    """All comparable sets of points, those of most VAEs first; without guidance before with, FID before others.

    A VAE is identified by the checksum in its measurement, in whatever folder. Several probes of one VAE on the same
    data are averaged.
    """
    probed: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.section == PROBES["attributes"] and row.measurement and MAIN_METRIC in row.cells:
            checksum = row.measurement.subject.get("vae_checksum")
            if checksum:  # raw pixels have none
                probed.setdefault((checksum, row.detail), []).append(row)
    found: dict[tuple, list[Point]] = {}
    for row in rows:
        if row.metric_of_images is None or row.owner is None:
            continue
        made_with = _vae_of(row)
        for (checksum, data), same in probed.items():
            if checksum == made_with:
                distance = row.cells[row.metric_of_images].value
                point = Point(same[0].run, row.run, checksum, _mean_probe(same), distance)
                key = (data, row.metric_of_images, row.guidance, row.reference, _sit_of(row))
                found.setdefault(key, []).append(point)
    made = [View(*key, points) for key, points in found.items()]
    return sorted(made, key=lambda view: (-view.vaes, view.guidance != "none", view.metric != "FID", view.metric))


def _mean_probe(rows: Sequence[Row]) -> dict[str, float]:
    names = [name for name in COMPARED if all(name in row.cells for row in rows)]
    return {name: fmean(row.cells[name].value for row in rows) for name in names}


def points_table(view: View) -> tuple[list[Column], list[list[str]]]:
    """The points, best images first."""
    metrics = list(view.correlations())
    columns = [Column("VAE", is_number=False), Column("SiT", is_number=False)]
    columns += [Column(name.removeprefix(ATTRIBUTES), name) for name in metrics] + [Column(view.metric, view.metric)]
    rows = []
    for point in sorted(view.points, key=lambda point: point.distance):
        figures = [number_word(name, point.probes[name]) for name in metrics]
        rows.append([point.vae, point.sit, *figures, number_word(view.metric, point.distance)])
    return columns, rows


def as_text(view: View, published: Published) -> str:
    """The points as a table, and the correlations below."""
    return "\n".join([view.title, aligned(*points_table(view)), *correlation_lines(view, published)])


def as_markdown(view: View, published: Published) -> str:
    """The same as GitHub shows it."""
    lines = "\n".join(f"- {line}" for line in correlation_lines(view, published))
    return f"### {view.title}\n\n{markdown_table(*points_table(view))}\n\n{lines}"


def records(found: Iterable[View]) -> list[dict[str, object]]:
    """One record for each view, for ``--format json``; a correlation of fewer than ``ENOUGH`` VAEs is null."""
    return [
        asdict(view)
        | {"vaes": view.vaes}
        | {
            "pearson": {
                k: r if view.vaes >= ENOUGH and math.isfinite(r) else None for k, r in view.correlations().items()
            }
        }
        for view in found
    ]


def correlation_lines(view: View, published: Published) -> list[str]:
    """Pearson's r in words, the published one after it."""
    if view.vaes < ENOUGH:
        return [f"Pearson's r: {ENOUGH} VAEs are needed, there are {view.vaes}"]
    lines = [
        f"Pearson's r of {name.removeprefix(ATTRIBUTES)} with {view.metric}: "
        f"{NOTHING if math.isnan(r) else f'{r:.4f}'} ({len(view.points)} SiTs, {view.vaes} VAEs)"
        for name, r in view.correlations().items()
    ]
    other = published.correlations["figure1"]
    return [*lines, f"published: {other.value} over {other.vaes} VAEs ({other.label}; {other.source})"]


def published_points(view: View, published: Published) -> list[tuple[str, float, float]]:
    """``(label, F1, gFID)`` of Table 8, where the view shows the same: FID without guidance, and that benchmark."""
    benchmark = next((name for name in BENCHMARKS if name in view.data.lower()), None)
    if view.metric != "FID" or view.guidance != "none" or benchmark is None:
        return []
    rows = (row for row in published.rows.values() if f"probe/{benchmark}/F1" in row.values)
    return [(row.label, row.values[f"probe/{benchmark}/F1"], row.values["generation/FID"]) for row in rows]


def labelled_points(view: View) -> list[tuple[str, float, float]]:
    """``(label, F1, distance)`` of each SiT; only the first of a VAE has a label, its name without what all share."""
    first = {point.checksum: point for point in reversed(view.points)}
    labels = dict(zip(first, distinguishing_parts([point.vae for point in first.values()]), strict=True))
    return [
        (labels[point.checksum] if first[point.checksum] is point else "", point.probes[MAIN_METRIC], point.distance)
        for point in view.points
    ]


def distinguishing_parts(names: Sequence[str]) -> list[str]:
    """``["study-none-vae", "study-depth1-vae"]`` → ``["none", "depth1"]``: without what all begin or end with."""
    if len(set(names)) < 2:
        return list(names)
    parts = [name.split("-") for name in names]
    most = min(map(len, parts)) - 1  # something is always left
    ahead = min(most, _shared(parts))
    behind = min(most - ahead, _shared([each[::-1] for each in parts]))
    return ["-".join(each[ahead : len(each) - behind]) for each in parts]


def _shared(parts: Sequence[Sequence[str]]) -> int:
    """How many first parts are the same in all."""
    return sum(1 for _ in takewhile(lambda each: len(set(each)) == 1, zip(*parts, strict=False)))


def _vae_of(row: Row) -> str | None:
    """The checksum of the VAE that images were made with."""
    settings = row.samples.settings if row.samples else {}
    return settings.get("vae") or row.owner.arguments.get("vae_checksum")


def _sit_of(row: Row) -> str:
    settings = row.samples.settings if row.samples else {}
    arguments = row.owner.arguments
    model = arguments.get("model") or (arguments.get("denoiser") or {}).get("model") or "SiT"
    steps = settings.get("train_steps") or row.owner.status.get("step")
    sit = f"{model}, {steps:,} steps" if steps else str(model)
    return sit if row.weights in ("", MAIN) else f"{sit}, {row.weights}"
