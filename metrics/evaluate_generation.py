"""evaluate.py generation: its flags and what it does."""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataset.loader import read_batches
from errors import UserError
from metrics.features import CHECKPOINT_FLAG, FLAG, INCEPTION, Extractor, build_extractor
from metrics.generation import (
    METRICS,
    Settings,
    check_reference,
    check_samples,
    choose_metrics,
    evaluate,
    measurement,
    measurement_name,
    table,
)
from metrics.inception import FLAG as INCEPTION_FLAG
from metrics.record import default_name, write_record
from metrics.sources import ImageSet, open_image_set
from runtime.cli import add_debug_argument, non_negative_int, positive_int
from runtime.measure import count_parameters, peak_memory
from runtime.processes import Process, process_group, set_inference_numerics, this_process

HELP = "generated images against a reference: FID, sFID, Inception Score, Precision, Recall, KID"
DESCRIPTION = """Compare generated images with a reference.

  python evaluate.py generation --samples exps/ldm/samples-… --ref VIRTUAL_imagenet256_labeled.npz

Samples and reference are an .npz (arr_0, uint8 [N, H, W, 3]; of a reference also mu, sigma, mu_s, sigma_s, as ADM's
have them), a folder of images, a packed dataset, or what generate.py made. Any number of processes share the work. The
values go into metrics/NAME.json: in a packed folder, beside an .npz. A plain folder of images stays as it is: its
values go into FOLDER.metrics/NAME.json beside it."""
FEW_IMAGES = 10_000
NAME_HELP = (
    "of the file metrics/NAME.json, which is replaced (default: generation, and --features if given; where that is "
    "there already, against another reference, the reference's name behind it)"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sets = parser.add_argument_group("what is compared")
    sets.add_argument(
        "--samples", type=Path, required=True, metavar="PATH", help=".npz, folder, packed dataset, or run with samples"
    )
    sets.add_argument("--ref", type=Path, required=True, metavar="PATH", help=".npz, folder or packed dataset")
    sets.add_argument("--num-samples", type=positive_int, metavar="N", help="the first N images (default: all)")
    add_metric_arguments(parser.add_argument_group("metrics"))
    output = parser.add_argument_group("output and speed")
    output.add_argument("--name", help=NAME_HELP)
    output.add_argument("--batch-size", type=positive_int, default=64, metavar="N", help="images at once on a process")
    output.add_argument("--num-workers", type=non_negative_int, default=4, metavar="N", help="reading threads")
    output.add_argument("--seed", type=non_negative_int, default=0, metavar="N", help="of KID's subsets")
    output.add_argument(
        "--dry-run", action="store_true", help="two batches, random weights if need be; print sizes; write nothing"
    )
    add_debug_argument(output)


def add_metric_arguments(group: argparse._ArgumentGroup) -> None:
    """The flags that generate.py has too."""
    group.add_argument(
        "--metrics", metavar="A,B,…", help=f"of {', '.join(METRICS)} (default: all that --features allows)"
    )
    group.add_argument(
        FLAG,
        default=INCEPTION,
        metavar="NAME",
        help="whose features: inception, a name of --enc-type, or timm/NAME; all but inception give FD-NAME, not FID",
    )
    group.add_argument(
        INCEPTION_FLAG, metavar="FILE", help="weights-inception-2015-12-05-6726825d.pth (default: torch's hub cache)"
    )
    group.add_argument(
        CHECKPOINT_FLAG, metavar="FILE", help="weights of another network of --features (default: searched)"
    )
    group.add_argument(
        "--ref-cache", type=Path, metavar="DIR", help="keeps the reference's features (default: REF.features beside it)"
    )


def run(args: argparse.Namespace) -> int:
    process = this_process()
    set_inference_numerics(process, "no", allow_tf32=False)
    if args.name is not None and (not args.name or "/" in args.name or args.name.startswith(".")):
        raise UserError(f"--name {args.name} is no name of a file; give one without slashes")
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
        evaluation.measure(samples, process, args.name)
    return 0


@dataclass(frozen=True)
class Evaluation:
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
) -> Evaluation:
    """Open and check all that a measurement of samples of a resolution, in pixels, needs; generate.py does it first."""
    reference = open_image_set(ref, ref_flag)
    check_reference(reference, resolution, settings, args.features)
    return Evaluation(reference, extractor_of(args, process), settings)


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


def dry_run(samples: ImageSet, evaluation: Evaluation, process: Process) -> None:
    """Two batches of the samples, and how long all would take at that rate."""
    reference, settings = evaluation.reference, evaluation.settings
    extractor = evaluation.extractor.to(process.device)
    batch = min(settings.batch_size, len(samples.images))
    batches = [np.arange(number * batch, (number + 1) * batch) % len(samples.images) for number in range(2)]
    seconds = []
    for images in read_batches(samples.images, batches):
        begin = time.perf_counter()
        features = extractor(images.to(process.device))
        features.pooled.cpu()
        seconds.append(time.perf_counter() - begin)
    if not process.is_main:
        return
    count = settings.num_samples or len(samples.images)
    theirs = 0 if reference.images is None else len(reference.images)
    rate = batch / seconds[-1]
    print(f"samples: {count} images of {samples.images.resolution} px; reference: {theirs} images")
    print(f"{extractor.describe()['name']}: {count_parameters(extractor)[0]:,} parameters")
    print(f"features: {features.dims[0]} pooled, {features.dims[1]} spatial, {features.dims[2]} logits; float32")
    print(f"metrics: {', '.join(settings.metrics)}")
    total = (count + theirs) / rate / process.world_size
    print(
        f"batch of {batch}: {seconds[0]:.2f} s, then {seconds[1]:.2f} s, {rate:.1f} images/s; about {total / 60:.1f} "
        f"minutes for all with {process.world_size} processes, less where the reference's features are kept"
    )
    print(f"peak memory: {peak_memory(process.device)}; nothing was written")
