"""Generated images against a reference: FID, sFID, Inception Score, Precision, Recall (ADM's protocol), KID and MIND.

ADM (Dhariwal & Nichol 2021, arXiv 2105.05233): Inception-v3 of 2015-12-05; statistics of the reference as its ``.npz``
brings them; Precision and Recall with k = 3 on all samples and the reference's images; the Inception Score over splits
of 5000. With another network the same figures are FD-NAME, KID-NAME and so on, never FID.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from errors import UserError
from metrics.arguments import GENERATION_METRICS as METRICS
from metrics.arguments import INCEPTION
from metrics.features import Extractor, without_tf32
from metrics.frechet import frechet_distance
from metrics.inception_score import SPLIT_SIZE
from metrics.kid import SUBSETS, choose_subset_size, kernel_distance
from metrics.mind import PROJECTIONS, choose_size, monge_distance
from metrics.precision_recall import NEIGHBOUR, count_pairs, precision_recall
from metrics.record import Measurement
from metrics.sources import ImageSet
from metrics.summary import Needs, Summary, SummaryCache, summarise
from runtime.log import progress_bar
from runtime.processes import Process, agree_on

OF_INCEPTION = ("sfid", "is")
KIND = "generation"


@dataclass(frozen=True)
class Settings:
    """How it is measured; flags of the same names.

    Attributes:
        metrics: of :data:`METRICS`.
        num_samples: the first so many images; None: all.
        batch_size: images at once on a process.
        num_workers: reading threads.
        seed: of KID's subsets and MIND's draws.
        ref_cache: folder that keeps the reference's features; None: next to the reference.
    """

    metrics: tuple[str, ...]
    num_samples: int | None = None
    batch_size: int = 64
    num_workers: int = 4
    seed: int = 0
    ref_cache: Path | None = None


def choose_metrics(wanted: Sequence[str] | None, features: str) -> tuple[str, ...]:
    """The metrics of ``--metrics``, in a fixed order; by default all that the network has."""
    possible = [metric for metric in METRICS if features == INCEPTION or metric not in OF_INCEPTION]
    if wanted is None:
        return tuple(possible)
    for metric in wanted:
        if metric not in METRICS:
            raise UserError(f"--metrics {metric} is not known; there are {', '.join(METRICS)}, separated by commas")
        if metric not in possible:
            raise UserError(
                f"--metrics {metric} is defined for Inception alone; with --features {features}: fid,pr,kid,mind"
            )
    return tuple(metric for metric in METRICS if metric in wanted)


def check_samples(samples: ImageSet, settings: Settings) -> None:
    """Refuse samples that cannot be measured, before any image is read."""
    check_count(str(samples), samples.count(settings.num_samples), settings)


def check_reference(reference: ImageSet, resolution: int, settings: Settings, features: str) -> None:
    """Refuse a reference that samples of a resolution, in pixels, cannot be compared with."""
    if reference.images is not None:
        check_count(str(reference), len(reference.images), settings)
        if reference.images.resolution != resolution:
            raise UserError(
                f"the samples have {resolution} px, {reference} {reference.images.resolution} px; give a "
                "reference of the samples' resolution"
            )
        return
    lacking = [metric for metric in settings.metrics if metric != "is" and not _brings(reference, metric, features)]
    if lacking:
        raise UserError(
            f"{reference} has no images (arr_0), which {', '.join(lacking)} need; give another reference, "
            "or --metrics without them"
        )


def check_statistics(reference: ImageSet, extractor: Extractor, resolution: int) -> None:
    """Refuse statistics of another network than the extractor, by their width."""
    if reference.images is not None or extractor.is_inception:
        return
    width = extractor(torch.zeros(1, 3, resolution, resolution, dtype=torch.uint8)).dims[0]
    if len(reference.pooled.mean) != width:
        raise UserError(
            f"{reference}: mu has {len(reference.pooled.mean)} numbers, {extractor.name} gives {width}: give that "
            "network's statistics, or images"
        )


def check_count(what: str, count: int, settings: Settings) -> None:
    """Refuse fewer images than the metrics are defined for."""
    least = NEIGHBOUR + 1 if "pr" in settings.metrics else 2
    if count < least:
        raise UserError(
            f"{what}: too few images ({count}), {','.join(settings.metrics)} needs at least {least}; give more"
        )


def evaluate(
    samples: ImageSet, reference: ImageSet, extractor: Extractor, settings: Settings, process: Process
) -> dict[str, float | None] | None:
    """Measure; all processes call it, in ``runtime.processes.process_group``. Rank 0 gets the values by name.

    Args:
        samples: the generated images, checked by :func:`check_samples`.
        reference: what they are compared with, checked by :func:`check_reference`.
        extractor: on the process's device.
        settings: what and how.
        process: who this is.
    """
    theirs = summarise_reference(reference, extractor, settings, process)
    metrics = settings.metrics
    needs = Needs(
        pooled="fid" in metrics,
        spatial="sfid" in metrics,
        scores="is" in metrics,
        features=not {"pr", "kid", "mind"}.isdisjoint(metrics),
    )
    ours = summarise(
        samples.images,
        samples.count(settings.num_samples),
        extractor,
        needs,
        process,
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
        description="samples",
    )
    return compare(ours, theirs, extractor.name, settings) if ours is not None else None


def summarise_reference(
    reference: ImageSet, extractor: Extractor, settings: Settings, process: Process, description: str = "reference"
) -> Summary | None:
    """What the metrics need of the reference: what it brings, what is kept of it, and the rest from its images."""
    metrics, name = settings.metrics, extractor.name
    needs = Needs(
        pooled="fid" in metrics and not _brings(reference, "fid", name),
        spatial="sfid" in metrics and not _brings(reference, "sfid", name),
        scores=False,
        features=not {"pr", "kid", "mind"}.isdisjoint(metrics),
    )
    summary = Summary(0)
    if needs != Needs(False, False, False, False):
        images = reference.images
        cache = SummaryCache(reference.path, images, extractor, settings.ref_cache)
        kept = cache.load(needs) if process.is_main else None
        if agree_on(lambda: kept is None):
            kept = summarise(
                images,
                len(images),
                extractor,
                needs,
                process,
                batch_size=settings.batch_size,
                num_workers=settings.num_workers,
                description=description,
            )
            if kept is not None:
                cache.keep(kept)
        if kept is None:  # another rank
            return None
        summary = kept
    if extractor.name == reference.statistics_of:
        summary.pooled, summary.spatial = reference.pooled or summary.pooled, reference.spatial or summary.spatial
    return summary


def figure_name(metric: str, features: str) -> str:
    """What ``fid`` and ``mind`` of a network's features are called."""
    names = {"fid": "FID" if features == INCEPTION else "FD", "mind": "MIND"}
    return names[metric] if features == INCEPTION else f"{names[metric]}-{features}"


def compare(ours: Summary, theirs: Summary, name: str, settings: Settings) -> dict[str, float | None]:
    """The values of :attr:`Settings.metrics` by name, in that order; KID's deviation None where it means nothing."""
    values: dict[str, float | None] = {}
    metrics, suffix = settings.metrics, "" if name == INCEPTION else f"-{name}"
    if "fid" in metrics:
        values[figure_name("fid", name)] = frechet_distance(ours.pooled, theirs.pooled)
    if "sfid" in metrics:
        values["sFID"] = frechet_distance(ours.spatial, theirs.spatial)
    if "is" in metrics:
        values["IS"] = ours.score
    with without_tf32():
        if "pr" in metrics:
            pairs = count_pairs(len(ours.features), len(theirs.features))
            with progress_bar(pairs, 0, "precision, recall", "pair", True) as progress:
                found = precision_recall(ours.features, theirs.features, progress.update)
            values[f"Precision{suffix}"], values[f"Recall{suffix}"] = found
        if "kid" in metrics:
            size = choose_subset_size(len(ours.features), len(theirs.features))
            mean, deviation = kernel_distance(ours.features, theirs.features, subset_size=size, seed=settings.seed)
            values[f"KID{suffix}"], values[f"KID{suffix}-std"] = mean, deviation
        if "mind" in metrics:
            size = choose_size(len(ours.features), len(theirs.features))
            values[figure_name("mind", name)] = monge_distance(
                ours.features, theirs.features, size=size, seed=settings.seed
            )
    return values


def measurement(
    values: Mapping[str, float | None],
    samples: ImageSet,
    reference: ImageSet,
    extractor: Extractor,
    settings: Settings,
    name: str,
) -> Measurement:
    """What is written next to the samples."""
    images = reference.images
    count = samples.count(settings.num_samples)
    return Measurement(
        name=name,
        kind=KIND,
        values=dict(values),
        count=count,
        subject=samples.describe(),
        reference=describe_reference(reference, extractor, settings),
        extractor=extractor.describe(),
        settings={
            "metrics": list(settings.metrics),
            "seed": settings.seed,
            "kid_subsets": SUBSETS,
            "kid_subset_size": choose_subset_size(count, len(images)) if images is not None else None,
            "mind_size": choose_size(count, len(images)) if images is not None else None,
            "mind_projections": PROJECTIONS,
            "is_split_size": SPLIT_SIZE,
            "neighbour": NEIGHBOUR,
            "precision": extractor.precision,
        },
    )


def describe_reference(reference: ImageSet, extractor: Extractor, settings: Settings) -> dict:
    """What a measurement says of the set that it was compared with."""
    images = reference.images
    return {
        "path": str(reference.path),
        "count": len(images) if images is not None else None,
        "fingerprint": images.fingerprint() if images is not None else None,
        "statistics_of_the_file": [name for name in settings.metrics if _brings(reference, name, extractor.name)],
    }


def measurement_name(samples: ImageSet, features: str) -> str:
    """``generation``, with the ``.npz`` it is of where that has a name of its own, and the network if not Inception."""
    parts = [KIND, *samples.own_name]
    if features != INCEPTION:
        parts.append(features.replace("/", "-"))
    return "-".join(parts)


def table(values: Mapping[str, float | None]) -> str:
    """The values in aligned lines, a mean with its standard deviation."""
    rows = {name: f"{value:.5g}" for name, value in values.items() if not name.endswith("-std")}
    for name in rows:
        if values.get(f"{name}-std") is not None:
            rows[name] += f" ± {values[f'{name}-std']:.2g}"
    width = max(map(len, rows), default=0)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())


def _brings(reference: ImageSet, metric: str, features: str) -> bool:
    """Whether the reference comes with the statistics that a metric needs."""
    stored = {"fid": reference.pooled, "sfid": reference.spatial}.get(metric)
    return features == reference.statistics_of and stored is not None
