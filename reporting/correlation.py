"""Probes of VAEs against the images that diffusion models make with them: the paper's Figure 1 from one's own runs.

Beside attribute F1 stand all the measures of ``probe.py diffusability`` that were made on the same data.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from statistics import fmean

from formats.averages import MAIN
from metrics.published import Published
from reporting.coefficients import bootstrap_interval, partial_correlation, pearson
from reporting.results import BENCHMARKS, PROBES, PUBLISHED_F1, RECONSTRUCTION, Row, short_name
from reporting.tables import NOTHING, Column, aligned, markdown_table, number_word

ATTRIBUTES = "attributes/"
MAIN_METRIC = f"{ATTRIBUTES}{PUBLISHED_F1}"
MEASURES = "diffusability/"
COMPARED = (MAIN_METRIC, *(f"{ATTRIBUTES}{name}" for name in ("F1-micro", "mAP", "top5-recall")))
ENOUGH = 3  # a correlation of two points is ±1
FEW = 10  # VAEs, below which an interval says little
PICTURE_SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Point:
    """One VAE: what a probe finds in its latents, and what a SiT trained on them generates."""

    vae: str  # names of the runs
    sit: str
    checksum: str  # of the VAE
    probes: Mapping[str, float]  # attribute metrics and measures of the VAE, by name
    distance: float  # of the SiT's images
    reconstructions: Mapping[str, float]  # that distance of the VAE's reconstructions, by the set, the largest first


@dataclass(frozen=True)
class View:
    """Points that may be compared: one probe, one measure of images made alike, SiTs of one size and length."""

    data: str  # that was probed
    metric: str  # of the images, ``FID`` or ``FD-NAME``
    guidance: str  # of the samples
    reference: str  # that they were compared with
    sit: str  # model, steps and weights of the SiTs
    images: int  # of a sample
    labels: str  # how their classes were drawn
    sampler: str  # how they were made of noise
    points: list[Point]  # one for each SiT

    @property
    def vaes(self) -> int:
        return len({point.checksum for point in self.points})

    @property
    def title(self) -> str:
        guided = "" if self.guidance in ("none", "") else f", guidance {self.guidance}"
        labels = f"{self.labels} labels" if self.labels else ""
        reference = f"reference {self.reference}" if self.reference else ""
        images = ", ".join(filter(None, [f"{self.images:,} images", labels, self.sampler, reference]))
        what = "Probe F1" if self.has_f1 else "Measures of latents"
        return f"{what}{f' on {self.data}' if self.data else ''} against {self.metric} ({self.sit}{guided}; {images})"

    @property
    def has_f1(self) -> bool:
        return all(MAIN_METRIC in point.probes for point in self.points)

    @property
    def is_drawn(self) -> bool:
        """Whether it makes a Figure 1."""
        return self.has_f1 and self.vaes >= ENOUGH

    @property
    def names(self) -> list[str]:
        """The probes' metrics that all points have."""
        first, *others = (point.probes for point in self.points)
        return [name for name in first if all(name in probes for probes in others)]

    def correlations(self) -> dict[str, float]:
        """Pearson's r of each metric that all points have with the distance; NaN where one does not vary."""
        return {name: pearson(*self._pairs(name)) for name in self.names}

    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 95 % interval of each, by a bootstrap over VAEs."""
        groups = [point.checksum for point in self.points]
        return {name: bootstrap_interval(*self._pairs(name), groups) for name in self.names}

    @property
    def reconstructed(self) -> str | None:
        """The set that all VAEs' reconstructions were measured on, the largest of several; None if there is none."""
        first, *others = (point.reconstructions for point in self.points)
        return next((name for name in first if all(name in sets for sets in others)), None)

    def partial_correlations(self) -> dict[str, float]:
        """Each given the distance of the VAEs' reconstructions of one set; NaN where that leaves nothing."""
        if self.reconstructed is None:
            return {}
        given = [point.reconstructions[self.reconstructed] for point in self.points]
        return {name: partial_correlation(*self._pairs(name), given) for name in self.names}

    def _pairs(self, name: str) -> tuple[list[float], list[float]]:
        return [point.probes[name] for point in self.points], [point.distance for point in self.points]


def views(rows: Sequence[Row]) -> list[View]:
    """All comparable sets of points, those of most VAEs first; without guidance before with, FID before others.

    A VAE is identified by the checksum in its measurement, in whatever folder. Several probes of one VAE on the same
    data are averaged. VAEs without F1 are views of their own.
    """
    probed: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.section in (PROBES["attributes"], PROBES["diffusability"]) and row.measurement:
            checksum = row.measurement.subject.get("vae_checksum")
            if checksum:  # raw pixels have none
                probed.setdefault((checksum, row.detail), []).append(row)
    found: dict[tuple, list[Point]] = {}
    for row in rows:
        metric = row.metric_of_images
        if metric is None or row.owner is None:
            continue
        made_with = _vae_of(row)
        for (checksum, data), same in probed.items():
            if checksum == made_with:
                reconstructions = _reconstructions(rows, checksum, f"r{metric}")
                probes, distance = _mean_probe(same), row.cells[metric].value
                point = Point(same[0].run, row.run, checksum, probes, distance, reconstructions)
                made = (row.guidance, row.reference, _sit_of(row), row.images, row.labels, row.sampler)
                key = (data, metric, *made)
                found.setdefault((MAIN_METRIC in probes, *key), []).append(point)
    made = (View(*key, points) for (_, *key), points in found.items())
    return sorted(
        (view for view in made if view.names),
        key=lambda view: (not view.has_f1, -view.vaes, view.guidance != "none", view.metric != "FID", view.metric),
    )


def _mean_probe(rows: Sequence[Row]) -> dict[str, float]:
    """Means over the measurements of each figure, attribute metrics first; without measures that are not defined."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, cell in row.cells.items():
            found.setdefault(name, []).append(cell.value)
    names = [name for name in COMPARED if name in found]
    names += [name for name, values in found.items() if name.startswith(MEASURES) and all(map(math.isfinite, values))]
    return {name: fmean(found[name]) for name in names}


def _reconstructions(rows: Sequence[Row], checksum: str, metric: str) -> dict[str, float]:
    """Of a VAE, by the set that was reconstructed, the largest first; of several of one set the newest."""
    measured = [row for row in rows if row.section == RECONSTRUCTION and metric in row.cells and row.measurement]
    measured = [row for row in measured if row.measurement.subject.get("vae_checksum") == checksum]
    measured.sort(key=lambda row: (-row.images, row.detail, row.measurement.created))
    return {_set_of(row): row.cells[metric].value for row in measured if math.isfinite(row.cells[metric].value)}


def _set_of(row: Row) -> str:
    sampled = ", posterior samples" if row.measurement.settings.get("latent") == "sample" else ""
    return f"{row.images:,} images of {row.detail}{sampled}"


def points_table(view: View) -> tuple[list[Column], list[list[str]]]:
    """The points, best images first."""
    metrics = view.names
    columns = [Column("VAE", is_number=False), Column("SiT", is_number=False)]
    columns += [Column(short_name(name), name) for name in metrics] + [Column(view.metric, view.metric)]
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
    """One record for each view, for ``--format json``; what fewer than ``ENOUGH`` VAEs do not tell is null."""
    return [
        asdict(view)
        | {
            "vaes": view.vaes,
            "pearson": {name: _known(view, r) for name, r in view.correlations().items()},
            "interval": {name: [_known(view, end) for end in ends] for name, ends in view.intervals().items()},
            "reconstructed": view.reconstructed,
            "given_reconstruction": {name: _known(view, r) for name, r in view.partial_correlations().items()},
        }
        for view in found
    ]


def _known(view: View, r: float) -> float | None:
    return r if view.vaes >= ENOUGH and math.isfinite(r) else None


def correlation_lines(view: View, published: Published) -> list[str]:
    """Pearson's r in words with its interval, the published one after them."""
    if view.vaes < ENOUGH:
        return [f"Pearson's r: {ENOUGH} VAEs are needed, there are {view.vaes}"]
    intervals, partial = view.intervals(), view.partial_correlations()
    lines = []
    for name, r in view.correlations().items():
        what = f"Pearson's r of {short_name(name)} with {view.metric}"
        low, high = (_word(end, 2) for end in intervals[name])
        between = f"; 95 % interval {low} to {high}" if low != NOTHING else ""
        given = f"; given r{view.metric} {_word(partial[name], 2)}" if name in partial else ""
        lines.append(f"{what}: {_word(r)} ({len(view.points)} SiTs, {view.vaes} VAEs){between}{given}")
    if view.reconstructed is not None:
        lines.append(f"r{view.metric} is that of {view.reconstructed}")
    elif any(point.reconstructions for point in view.points):
        lines.append(f"given r{view.metric}: nothing, because no set was reconstructed with each of the VAEs")
    if view.vaes < FEW:
        lines.append(
            f"{view.vaes} VAEs are few: their interval is a hint at best, and of many measures some fit by chance"
        )
    if view.has_f1:
        other = published.correlations["figure1"]
        lines.append(f"published: {other.value} over {other.vaes} VAEs ({other.label}; {other.source})")
    return lines


def _word(r: float, digits: int = 4) -> str:
    return f"{r:.{digits}f}" if math.isfinite(r) else NOTHING


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
