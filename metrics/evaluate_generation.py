"""What evaluate.py generation does."""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataset.loader import read_batches
from dataset.verification import verify_on_all
from errors import UserError
from metrics.arguments import INCEPTION
from metrics.features import Extractor, Features, build_extractor
from metrics.generation import (
    Settings,
    check_reference,
    check_samples,
    check_statistics,
    choose_metrics,
    evaluate,
    measurement,
    measurement_name,
    table,
)
from metrics.record import check_name, default_name, write_record
from metrics.sources import ImageSet, open_image_set
from runtime.measure import count_parameters, peak_memory
from runtime.processes import Process, process_group, set_inference_numerics, this_process

FEW_IMAGES = 10_000
EVALUATION_LOCK_NAME = ".evaluation.lock"  # of a folder of samples, held by the process that measures it


def run(args: argparse.Namespace) -> int:
    process = this_process()
    set_inference_numerics(process, "no", allow_tf32=False)
    check_name(args.name)
    settings = settings_of(
        args, num_samples=args.num_samples, batch_size=args.batch_size, num_workers=args.num_workers, seed=args.seed
    )
    samples = open_image_set(args.samples, "--samples")
    check_samples(samples, settings)
    evaluation = plan(args, args.ref, "--ref", samples.images.resolution, settings, process)
    if args.dry_run:
        dry_run(samples, evaluation, process)
        return 0
    with process_group(process):
        verify_on_all((samples.images, evaluation.reference.images), process)
        evaluation.measure(samples, process, args.name)
    return 0


@dataclass(frozen=True)
class GenerationEvaluation:
    """A measurement that can be made: the reference fits, the network has its weights."""

    reference: ImageSet
    extractor: Extractor
    settings: Settings

    def measure(self, samples: ImageSet, process: Process, name: str | None = None) -> None:
        """Measure, print the table, write ``metrics/NAME.json``; all processes call it, in a group."""
        extractor, reference = self.extractor.to(process.device), self.reference
        if name is None:
            usual = measurement_name(samples, extractor.name)
            images = reference.images
            fingerprint = images.fingerprint if images is not None else lambda: None
            name = default_name(samples.metrics_folder, usual, reference.path, fingerprint)
        values = evaluate(samples, reference, extractor, self.settings, process)
        if values is None:
            return
        found = measurement(values, samples, reference, extractor, self.settings, name)
        path = write_record(found, samples.metrics_folder)
        network = extractor.describe()["name"]
        print(f"{found.count} images of {samples.path} against {reference.path}, {network}:\n{table(values)}")
        if found.count < FEW_IMAGES and "fid" in self.settings.metrics:
            print(f"note: Fréchet distances grow as images get fewer; compare with others of {found.count} images")
        print(f"written to {path}")


def plan(
    args: argparse.Namespace, ref: Path, ref_flag: str, resolution: int, settings: Settings, process: Process
) -> GenerationEvaluation:
    """Open and check all that a measurement of samples of a resolution, in pixels, needs; generate.py does it first."""
    reference = open_image_set(ref, ref_flag, args.features)
    check_reference(reference, resolution, settings, args.features)
    extractor = extractor_of(args, process)
    check_statistics(reference, extractor, resolution)
    return GenerationEvaluation(reference, extractor, settings)


def settings_of(args: argparse.Namespace, **others) -> Settings:
    """From the flags of :func:`add_metric_arguments`, and the rest of :class:`Settings`."""
    wanted = None if args.metrics is None else [part.strip() for part in args.metrics.split(",")]
    return Settings(choose_metrics(wanted, args.features), ref_cache=args.ref_cache, **others)


def extractor_of(args: argparse.Namespace, process: Process) -> Extractor:
    """The network of ``--features``, on the CPU; a dry run does without weights."""
    checkpoint = args.inception_ckpt if args.features == INCEPTION else args.enc_ckpt
    try:
        extractor = build_extractor(args.features, checkpoint)
    except UserError as error:
        if not args.dry_run or checkpoint is not None:
            raise
        extractor = build_extractor(args.features, random_weights=True)
        if process.is_main:
            print(f"random weights, as this is a dry run: {error}", file=sys.stderr)
    return extractor


def dry_run(samples: ImageSet, evaluation: GenerationEvaluation, process: Process) -> None:
    """Two batches of the samples, and how long all would take at that rate."""
    reference, settings = evaluation.reference, evaluation.settings
    extractor = evaluation.extractor.to(process.device)
    features, seconds, batch = time_batches(samples, extractor, settings)
    if not process.is_main:
        return
    count = samples.count(settings.num_samples)
    theirs = 0 if reference.images is None else len(reference.images)
    rate = batch / seconds[-1]
    print(f"samples: {count} images of {samples.images.resolution} px; reference: {theirs} images")
    print(f"{extractor.describe()['name']}: {count_parameters(extractor)[0]:,} parameters")
    print("features: {} pooled, {} spatial, {} logits; {}".format(*features.dims, extractor.precision))
    print(f"metrics: {', '.join(settings.metrics)}")
    total = (count + theirs) / rate / process.world_size
    print(
        f"batch of {batch}: {seconds[0]:.2f} s, then {seconds[1]:.2f} s, {rate:.1f} images/s; about {total / 60:.1f} "
        f"minutes for all with {process.world_size} processes, less where the reference's features are kept"
    )
    print(f"peak memory: {peak_memory(process.device)}; nothing was written")


def time_batches(samples: ImageSet, extractor: Extractor, settings: Settings) -> tuple[Features, list[float], int]:
    """Features of the second of two batches, the seconds that each took, and its images."""
    batch = min(settings.batch_size, len(samples.images))
    batches = [np.arange(number * batch, (number + 1) * batch) % len(samples.images) for number in range(2)]
    seconds = []
    for images in read_batches(samples.images, batches):
        begin = time.perf_counter()
        features = extractor(images.to(extractor.device))
        features.pooled.cpu()
        seconds.append(time.perf_counter() - begin)
    return features, seconds, batch
