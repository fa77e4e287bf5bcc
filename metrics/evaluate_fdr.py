"""What evaluate.py fdr does."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dataset.verification import verify_on_all
from errors import UserError
from metrics.arguments import FEATURES_FLAG, INCEPTION, INCEPTION_FLAG, network_label
from metrics.evaluate_generation import time_batches
from metrics.fdr import KIND, SIX, Comparison, Ratio, mean_name, measure, measurement, table
from metrics.features import Extractor, build_extractor
from metrics.frechet import Gaussian
from metrics.generation import Settings, check_reference, check_samples
from metrics.inception import FILE_NAME
from metrics.record import check_name, default_name, write_record
from metrics.representations import REPRESENTATIONS
from metrics.sources import POOLED_KEYS, ImageSet, open_image_set, read_statistics
from models.weight_files import MissingWeightsError
from runtime.measure import count_parameters, peak_memory
from runtime.processes import Process, process_group, set_inference_numerics, this_process

NETWORKS_FLAG = "--networks"
RELEASED = "huggingface.co/jjiaweiyang/FD-Loss, data/fid_stats"
PUBLISHED_SIDE = 256


def run(args: argparse.Namespace) -> int:
    process = this_process()
    set_inference_numerics(process, "no", allow_tf32=False)
    check_name(args.name)
    comparison = plan(args)
    missing = check_weights(args)
    if args.dry_run:
        dry_run(args, comparison, missing, process)
        return 0
    if missing:
        raise UserError(missing)
    name = args.name or usual_name(args, comparison)
    with process_group(process):
        verify_on_all([each.images for each in comparison.sets], process)
        # each network is gone before the next one is built
        ratios = {
            network: measure(comparison, build(network, args).to(process.device), process) for network in args.networks
        }
    if process.is_main:
        path = write_record(measurement(comparison, ratios, name), comparison.samples.metrics_folder)
        report(comparison, ratios)
        print(f"written to {path}")
    return 0


def plan(args: argparse.Namespace) -> Comparison:
    """Open and check everything but the networks."""
    settings = Settings(("fid",), args.num_samples, args.batch_size, args.num_workers, ref_cache=args.ref_cache)
    samples = open_image_set(args.samples, "--samples")
    check_samples(samples, settings)
    side, validation = samples.images.resolution, None
    reference, statistics = open_reference(args.ref, args.networks)
    if reference.images is not None:
        check_reference(reference, side, settings, INCEPTION)
    if args.val is not None:
        validation = replace(open_image_set(args.val, "--val"), pooled=None, spatial=None)
        validation.count(None)
        check_reference(validation, side, settings, INCEPTION)
        if args.val.resolve() == args.ref.resolve():
            raise UserError(f"{validation} is the reference: give held-out images that are not in it")
    elif unknown := [name for name in args.networks if name not in REPRESENTATIONS]:
        raise UserError(f"{NETWORKS_FLAG} {','.join(unknown)}: no FD of real images was published; give them as --val")
    elif side != PUBLISHED_SIDE:
        raise UserError(f"{samples} has {side} px, published FDs are of {PUBLISHED_SIDE} px: give real images as --val")
    return Comparison(samples, reference, statistics, validation, settings)


def open_reference(path: Path, networks: Sequence[str]) -> tuple[ImageSet, dict[str, Gaussian]]:
    """The reference, and what statistics there are of it: released ones in a folder, or Inception's in an ``.npz``."""
    if any((path / spec.statistics).is_file() for spec in REPRESENTATIONS.values()):
        files = {name: path / REPRESENTATIONS[name].statistics for name in networks if name in REPRESENTATIONS}
        lacking = {name: files[name].name if name in files else "not released" for name in networks}
        if lacking := [f"{network_label(n)} ({file})" for n, file in lacking.items() if not (path / file).is_file()]:
            raise UserError(
                f"--ref {path} has no statistics for {', '.join(lacking)}: download them ({RELEASED}), give images as "
                f"--ref, or leave these out of {NETWORKS_FLAG}"
            )
        statistics = {n: read_statistics(file, POOLED_KEYS, REPRESENTATIONS[n].width) for n, file in files.items()}
        return ImageSet(path, "--ref", None), statistics
    reference = open_image_set(path, "--ref")
    if reference.images is None and set(networks) != {INCEPTION}:
        raise UserError(
            f"{reference} holds Inception's statistics and no images; give images or released statistics ({RELEASED}), "
            f"or {NETWORKS_FLAG} {INCEPTION}"
        )
    return reference, {INCEPTION: reference.pooled} if reference.pooled is not None and INCEPTION in networks else {}


def usual_name(args: argparse.Namespace, comparison: Comparison) -> str:
    """``fdr``, with the networks where they are not the six, and the ``.npz`` that has a name of its own."""
    samples, images = comparison.samples, comparison.reference.images
    labels = [] if mean_name(args.networks) == SIX else map(network_label, args.networks)
    usual = "-".join([KIND, *samples.own_name, *labels]).replace("/", "-")
    return default_name(samples.metrics_folder, usual, args.ref, lambda: images and images.fingerprint())


def check_weights(args: argparse.Namespace) -> str:
    """Build each network once, so that none turns out to be missing or damaged hours later.

    Returns:
        What is missing and where to put it; empty where nothing is.
    """
    files = {name: f" ({spec.timm_name}.safetensors)" for name, spec in REPRESENTATIONS.items()}
    files[INCEPTION] = f" ({INCEPTION_FLAG} {FILE_NAME})"
    missing = []
    for name in args.networks:
        try:
            build(name, args)
        except MissingWeightsError:
            missing.append(network_label(name) + files.get(name, ""))
        except UserError as error:  # the same network, asked for by another flag
            raise UserError(str(error).replace(FEATURES_FLAG, NETWORKS_FLAG)) from error
    remedy = f"put the files into the folder that $VFM_DIR names, or leave these out of {NETWORKS_FLAG}"
    return f"no weights for {', '.join(missing)}: {remedy}" if missing else ""


def build(name: str, args: argparse.Namespace, random_weights: bool = False) -> Extractor:
    return build_extractor(name, args.inception_ckpt if name == INCEPTION else None, random_weights)


def report(comparison: Comparison, ratios: Mapping[str, Ratio]) -> None:
    """Print the table and what its figures hold for."""
    count, reference, validation = comparison.count, comparison.reference, comparison.validation
    print(f"{count} images of {comparison.samples.path} against {reference.path}:\n{table(ratios)}")
    if validation is None:
        print(
            "denominators: published, of ImageNet's 50,000 validation images; they hold against its training set and "
            f"for 50,000 samples; these are {count:,}"
        )
    else:
        print(f"denominators: measured, of {len(validation.images):,} images of {validation.path}")
        if len(validation.images) != count:
            print(f"note: FD grows as images get fewer; {count:,} validation images would make a fair ratio")
    if reference.images is not None and comparison.statistics and len(ratios) > 1:
        print(f"note: inception's are statistics of the file; the others' are of its {len(reference.images):,} images")


def dry_run(args: argparse.Namespace, comparison: Comparison, missing: str, process: Process) -> None:
    """Two batches of the samples by each network, and how long all would take at that rate."""
    samples, lines, seconds = comparison.samples, [], 0.0
    for name in args.networks:
        try:
            extractor = build(name, args)
        except MissingWeightsError:
            extractor = build(name, args, random_weights=True)
        features, (first, second), batch = time_batches(samples, extractor.to(process.device), comparison.settings)
        lines.append(
            f"{network_label(name)}: {count_parameters(extractor)[0]:,} parameters, {features.dims[0]} features in "
            f"{extractor.precision}; batch of {batch}: {first:.2f} s, {second:.2f} s: {batch / second:.3g} images/s"
        )
        del extractor  # before the next one is built
        others = [each for each in comparison.sets[1:] if each.flag == "--val" or name not in comparison.statistics]
        seconds += (comparison.count + sum(len(each.images) for each in others)) / batch * second
    if not process.is_main:
        return
    if missing:
        print(f"random weights, as this is a dry run: {missing}", file=sys.stderr)
    print(f"samples: {comparison.count} images of {samples.images.resolution} px; denominators: ", end="")
    print("\n".join([comparison.denominators, *lines]))
    minutes = seconds / 60 / process.world_size
    print(
        f"about {minutes:.1f} minutes for all with {process.world_size} processes, less where --ref and --val are known"
    )
    print(f"peak memory: {peak_memory(process.device)}; nothing was written")
