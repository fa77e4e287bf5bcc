"""What evaluate.py reconstruction does."""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from dataset.images import DEFAULT_RESOLUTION, ImageDataset, open_images
from dataset.loader import read_batches
from dataset.verification import verify_on_all
from errors import UserError
from inference.latent_cache import ChunkEncoder, autocast_for, chunk_size, one_thread_each
from loss.perceptual import TRUNKS, build_lpips
from metrics.arguments import INCEPTION, LPIPS_FLAGS
from metrics.arguments import RECONSTRUCTION_METRICS as METRICS
from metrics.encoding import chunked, whole_chunks
from metrics.evaluate_generation import FEW_IMAGES, extractor_of
from metrics.features import Extractor
from metrics.frechet import Gaussian, Moments, frechet_distance
from metrics.reconstruction import PairScores, reconstruct, summary, worst, write_table
from metrics.record import Measurement, check_name, default_name, metrics_folder, write_measurement
from metrics.subject import (
    Subject,
    file_suffix,
    open_vae,
    output_folder,
    output_subject,
)
from metrics.summary import NOT_FINITE, Needs, Summary, SummaryCache
from runtime.log import progress_bar
from runtime.measure import count_parameters, peak_memory
from runtime.pictures import save_grid
from runtime.processes import Process, agree_on, process_group, set_inference_numerics, this_process

GRID_COLUMNS = 8
BOTH = ORIGINALS, RECONSTRUCTIONS = "originals", "reconstructions"


def _metric_names(text: str) -> list[str]:
    names = [name.strip().lower() for name in text.split(",")]
    for name in names:
        if name not in METRICS:
            raise UserError(f"--metrics {name} is not known; there are {', '.join(METRICS)}")
    return names


@dataclass
class ReconstructionEvaluation:
    """What is needed for a batch.

    Attributes:
        data: where the images lie.
        name: of the files that are written.
        subject: the VAE.
        images: the dataset, of which ``items`` are measured.
        items: int64 ``[N]``.
        scores: of pairs of images.
        extractor: whose features rFID compares; None without rFID.
        vae_worker, score_worker: in whose chunks the networks run; scores are never made in low precision.
        sample_seed: None decodes posterior means.
        compares: whose features are computed, of :data:`BOTH`.
    """

    data: Path
    name: str
    subject: Subject
    images: ImageDataset
    items: np.ndarray
    scores: PairScores
    extractor: Extractor | None
    vae_worker: ChunkEncoder
    score_worker: ChunkEncoder
    sample_seed: int | None
    compares: tuple[str, ...] = BOTH

    def pairs(self, items: np.ndarray, originals: torch.Tensor) -> torch.Tensor:
        """uint8 ``[n, 3, H, W]`` → originals and reconstructions ``[n, 6, H, W]``."""
        found = reconstruct(self.subject.tokenizer, self.vae_worker, originals, items, self.sample_seed)
        return torch.cat([originals, found], 1)

    def measure(self, items: np.ndarray, originals: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Scores float64 ``[n, scores]``; features ``[n, D]`` of those that are compared, if there are any."""
        pairs = self.pairs(items, originals)
        scores = chunked(self.score_worker, self.scores, pairs)
        if self.extractor is None:
            return scores, []
        images = [part for name, part in zip(BOTH, pairs.chunk(2, 1), strict=True) if name in self.compares]
        return scores, [chunked(self.score_worker, self.pooled, part.contiguous()) for part in images]

    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        return self.extractor(images).pooled

    def close(self) -> None:
        self.vae_worker.close()
        self.score_worker.close()


def run(args: argparse.Namespace) -> int:
    if not args.data:
        raise UserError("--data is needed: held-out images, a packed dataset, a tree of class folders or a zip")
    check_name(args.name)
    args.metrics = None if args.metrics is None else _metric_names(args.metrics)
    process = this_process()
    set_inference_numerics(process, args.mixed_precision, args.allow_tf32)
    sets = {path: open_images(path, args.resolution, default=DEFAULT_RESOLUTION) for path in args.data}
    subject = open_vae(args, process)
    names = [""] * len(sets) if args.dry_run else names_of(args, sets, subject)
    check_resolutions(sets, subject)
    scores = PairScores(build_networks(args, process, min(images.resolution for images in sets.values())))
    extractor = build_extractor(args, process, sets)
    if args.dry_run and process.is_main:
        describe(subject, scores, extractor)
    with one_thread_each() if process.device.type == "cpu" else nullcontext(1) as threads, process_group(process):
        if not args.dry_run:
            verify_on_all(list(sets.values()), process)
        measurements = []
        for (path, images), name in zip(sets.items(), names, strict=True):
            evaluation = build_evaluation(args, path, name, subject, images, scores, extractor, process, threads)
            try:
                if args.dry_run:
                    dry_run(args, evaluation, process)
                else:
                    measurements.append(evaluate(args, evaluation, process))
            finally:
                evaluation.close()
    if process.is_main and len(measurements) > 1:
        print_table(measurements)
    if process.is_main and args.dry_run:
        print(f"peak memory: {peak_memory(process.device)}; nothing was written")
    return 0


def names_of(args: argparse.Namespace, sets: Mapping[Path, ImageDataset], subject: Subject) -> list[str]:
    """Names of the measurements: as if the sets were measured one command each."""
    if args.name and len(sets) == 1:
        return [args.name]
    place = metrics_folder(output_subject(args))
    usual = args.name or f"reconstruction{file_suffix(args)}"
    names: list[str] = []
    for path, images in sets.items():
        names.append(default_name(place, usual, path, images.fingerprint, subject.description, names))
    return names


def check_resolutions(sets: Mapping[Path, ImageDataset], subject: Subject) -> None:
    """Refuse sets whose images the VAE cannot take."""
    for path, images in sets.items():
        try:
            subject.tokenizer.latent_shape(images.resolution)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error


def build_networks(args: argparse.Namespace, process: Process, resolution: int) -> dict[str, nn.Module]:
    """LPIPS by its trunks; one without weights is left out with a line, or refused where it was asked for."""
    networks = {}
    for net, flag in LPIPS_FLAGS.items():
        if args.metrics is not None and f"lpips-{net}" not in args.metrics:
            continue
        file = getattr(args, flag.removeprefix("--").replace("-", "_"))
        others = ",".join(name for name in args.metrics or METRICS if name != f"lpips-{net}") or "psnr"
        try:
            if resolution < TRUNKS[net].min_resolution:
                raise UserError(
                    f"lpips-{net} needs images of {TRUNKS[net].min_resolution} px or more, not {resolution}; take "
                    f"larger ones, or --metrics {others}"
                )
            networks[net] = build_lpips(file, args.dry_run and not file, net, flag, f"--metrics {others}")
        except UserError as error:
            if file or args.metrics is not None:
                raise
            if process.is_main:
                print(f"LPIPS-{net} is left out: {error}", file=sys.stderr)
            continue
        networks[net].to(process.device)
    return networks


def build_extractor(args: argparse.Namespace, process: Process, sets: Mapping[Path, ImageDataset]) -> Extractor | None:
    """The network whose features rFID compares; as with LPIPS, one without weights is left out unless asked for."""
    wanted = args.metrics is not None or args.features is not None
    if args.metrics is not None and "rfid" not in args.metrics:
        return None
    args.features = args.features or INCEPTION
    try:
        for path, images in sets.items():
            if min(args.num_images or len(images), len(images)) < 2:
                raise UserError(f"{path}: rFID needs at least 2 images; give more, or --metrics without rfid")
        return extractor_of(args, process).to(process.device)
    except UserError as error:
        if wanted or args.inception_ckpt or args.enc_ckpt:
            raise
        if process.is_main:
            print(f"rFID is left out: {error}", file=sys.stderr)
        return None


def build_evaluation(
    args: argparse.Namespace,
    path: Path,
    name: str,
    subject: Subject,
    images: ImageDataset,
    scores: PairScores,
    extractor: Extractor | None,
    process: Process,
    threads: int,
) -> ReconstructionEvaluation:
    count = min(args.num_images or len(images), len(images))
    chunk = chunk_size(images.resolution, process.device)
    return ReconstructionEvaluation(
        path,
        name,
        subject,
        images,
        np.linspace(0, len(images) - 1, count).round().astype(np.int64),
        scores,
        extractor,
        ChunkEncoder(process.device, chunk, threads, autocast_for(process.device, args.mixed_precision)),
        ChunkEncoder(process.device, chunk, threads, nullcontext),
        args.seed if args.sample else None,
    )


def evaluate(args: argparse.Namespace, evaluation: ReconstructionEvaluation, process: Process) -> Measurement | None:
    """Measure all images over all processes; the main one writes and returns the measurement."""
    items, size = evaluation.items, whole_chunks(args.batch_size, evaluation.vae_worker.chunk)
    places = [np.arange(first, min(first + size, len(items))) for first in range(0, len(items), size)]
    mine = [places[number] for number in process.share(len(places))]
    values = torch.zeros(len(items), len(evaluation.scores.names), dtype=torch.float64)
    shares = [
        sum(len(places[number]) for number in range(r, len(places), process.world_size))
        for r in range(process.world_size)
    ]
    cache, kept = kept_originals(args, evaluation, process)
    moments: list[Moments] = []
    with progress_bar(shares[process.rank], 0, "reconstructing", "img", process.is_main) as progress:
        read = read_batches(evaluation.images, [items[place] for place in mine], num_workers=args.num_workers)
        for place, originals in zip(mine, read, strict=True):
            values[place], features = evaluation.measure(items[place], originals)
            moments = moments or [Moments(part.shape[1]) for part in features]
            for total, part in zip(moments, features, strict=True):
                total.update(part)
            progress.update(len(place))
    if process.world_size > 1:
        dist.all_reduce(values)  # every row is zero but in one process: a sum that rounds nothing
        collect(moments, shares, process)
    gaussians = [part.gaussian() for part in moments] if process.is_main else []
    if agree_on(lambda: not all(np.isfinite(gaussian.mean).all() for gaussian in gaussians)):
        raise UserError(NOT_FINITE)
    if not process.is_main:
        return None
    if kept is not None:
        gaussians.insert(0, kept.pooled)
    elif cache is not None:
        cache.keep(Summary(len(items), pooled=gaussians[0]))
    return write_results(args, evaluation, values.numpy(), gaussians)


def kept_originals(
    args: argparse.Namespace, evaluation: ReconstructionEvaluation, process: Process
) -> tuple[SummaryCache | None, Summary | None]:
    """Where the features of a whole set are kept, and on rank 0 what is kept of them.

    They are the same for every VAE, and as a reference of generated images. Where they are there, ``evaluation`` no
    longer makes them.
    """
    images, extractor = evaluation.images, evaluation.extractor
    if extractor is None or len(evaluation.items) < len(images):
        return None, None
    cache = SummaryCache(evaluation.data, images, extractor, args.ref_cache)
    needs = Needs(pooled=True, spatial=False, scores=False, features=False)
    kept = cache.load(needs) if process.is_main else None
    if not agree_on(lambda: kept is None):
        evaluation.compares = (RECONSTRUCTIONS,)
    return cache, kept


def collect(moments: list[Moments], shares: list[int], process: Process) -> None:
    """Add the other processes' moments to those of rank 0; ``shares`` are the images of each process."""
    for total in moments:
        total.flush()
        if not process.is_main:
            dist.send(total.mean, 0)
            dist.send(total.scatter, 0)
            continue
        for rank in range(1, process.world_size):
            if shares[rank]:
                mean, scatter = torch.empty_like(total.mean), torch.empty_like(total.scatter)
                dist.recv(mean, rank)
                dist.recv(scatter, rank)
                total.merge(shares[rank], mean, scatter)


def write_results(
    args: argparse.Namespace, evaluation: ReconstructionEvaluation, values: np.ndarray, gaussians: list[Gaussian]
) -> Measurement:
    """The values on the terminal, the record, the CSV and the grid."""
    names, items = evaluation.scores.names, evaluation.items
    chosen = [place for place, name in enumerate(names) if args.metrics is None or name.lower() in args.metrics]
    names, scores = [names[place] for place in chosen], values[:, chosen]
    folder = output_folder(args)
    write_table(folder / f"{evaluation.name}.csv", names, scores, evaluation.images, items)
    if args.worst:
        save_worst(folder / f"{evaluation.name}-worst.png", evaluation, worst(values[:, 0], args.worst))
    averages, extractor = summary(names, scores), evaluation.extractor
    if extractor is not None:
        name = "rFID" if extractor.is_inception else f"rFD-{extractor.name}"
        averages = {name: frechet_distance(*gaussians)} | averages
    measurement = Measurement(
        name=evaluation.name,
        kind="reconstruction",
        values=averages,
        count=len(items),
        subject=evaluation.subject.description,
        reference={
            "path": str(evaluation.data),
            "what": "the same images, cropped alike",
            "fingerprint": evaluation.images.fingerprint(),
            "count": len(items),
        },
        extractor=extractor.describe() if extractor is not None else None,
        settings={
            "resolution": evaluation.images.resolution,
            "latent": "sample" if args.sample else "mean",
            "seed": args.seed if args.sample else None,
            "precision": "bf16" if args.mixed_precision == "bf16" else "tf32" if args.allow_tf32 else "float32",
            "compared_as": "uint8, clamped and rounded",
            "lpips_sha256": evaluation.scores.checksums,
        },
    )
    path = write_measurement(measurement, output_subject(args))
    for name, value in averages.items():
        print(f"{name:<{max(map(len, averages))}}{value:>10.4f}")
    if extractor is not None and len(items) < FEW_IMAGES:
        print(f"note: Fréchet distances of {len(items)} images are larger than those of 50000; compare like with like")
    print(f"{len(items)} images of {evaluation.data}; {path}")
    return measurement


def print_table(measurements: Sequence[Measurement]) -> None:
    """A row a set."""
    rows = [["set", "px", "images", *measurements[0].values]]
    for each in measurements:
        values = [f"{value:.4f}" for value in each.values.values()]
        rows.append([each.reference["path"], str(each.settings["resolution"]), str(each.count), *values])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for name, *others in rows:
        right = [word.rjust(width) for word, width in zip(others, widths[1:], strict=True)]
        print("  ".join([name.ljust(widths[0]), *right]))


def save_worst(path: Path, evaluation: ReconstructionEvaluation, places: np.ndarray) -> None:
    """Originals above reconstructions, the worst first, in rows of eight."""
    items = evaluation.items[places]
    side = evaluation.images.resolution
    originals = torch.empty(len(items), 3, side, side, dtype=torch.uint8)
    evaluation.images.read_into(items, originals.numpy())
    pairs = evaluation.pairs(items, originals)
    columns = min(GRID_COLUMNS, len(items))
    missing = -len(items) % columns
    pairs = torch.cat([pairs, torch.full((missing, 6, side, side), 255, dtype=torch.uint8)])
    save_grid([row for part in pairs.split(columns) for row in part.chunk(2, 1)], path)


def describe(subject: Subject, scores: PairScores, extractor: Extractor | None) -> None:
    """The networks, for a dry run."""
    print(f"VAE: {count_parameters(subject.tokenizer)[0]:,} parameters")
    features = [] if extractor is None else [f"features of {extractor.describe()['name']}"]
    print(f"{', '.join(scores.names + features)}; LPIPS with random weights where no file is given")


def dry_run(args: argparse.Namespace, evaluation: ReconstructionEvaluation, process: Process) -> None:
    """Two batches, and what the whole would take."""
    size = whole_chunks(min(args.batch_size, 4 * evaluation.vae_worker.chunk), evaluation.vae_worker.chunk)
    items = evaluation.items[np.arange(size) % len(evaluation.items)]
    side = evaluation.images.resolution
    originals = torch.empty(size, 3, side, side, dtype=torch.uint8)
    evaluation.images.read_into(items, originals.numpy())
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        evaluation.measure(items, originals)
        seconds.append(time.perf_counter() - begin)
    if not process.is_main:
        return
    rate = size / seconds[-1] * process.world_size
    which = f"{evaluation.data}, {side} px: " if len(args.data) > 1 else ""
    print(
        f"{which}batches of {size}: {seconds[0]:.2f} and {seconds[1]:.2f} s; {rate:.2f} images/s with "
        f"{process.world_size} processes, about {len(evaluation.items) / rate / 60:.1f} minutes for "
        f"{len(evaluation.items)} images"
    )
