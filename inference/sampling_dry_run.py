"""What generate.py --dry-run says: what all samples, or all points of a sweep, would take."""

import argparse
import time

import torch

from dataset.npz import npz_bytes
from diffusion.samplers import model_velocity
from inference.sample_folder import Job, at_point, build_sampler, sampler_settings
from inference.sampling import NPZ_NAME, ImageSampler
from models.denoisers import Denoiser
from models.denoisers.sprint import Shortcut
from runtime.measure import count_parameters, peak_memory


def dry_run(args: argparse.Namespace, job: Job) -> None:
    """Two images in two steps, and what all of them would take at the rate of a forward pass."""
    trained, process, steps, points = job.trained, job.process, args.num_steps, args.points
    runs = [at_point(args, point, trained) for point in points]
    counts = [sampler_settings(own, trained).passes(own.guide is not None) for own in runs]
    passes, of_guide = (sum(numbers) for numbers in zip(*counts, strict=True))
    runs[-1].num_steps = min(2, steps)
    networks = job.networks()
    sampler = build_sampler(runs[-1], trained, networks, process)
    items = torch.arange(2, device=process.device)
    labels = items % len(trained.class_names)
    with torch.inference_mode():
        sampler(items, labels)[0].cpu()  # warms up, or compiles
        z = sampler.noise(items, 0)
        own_seconds = pass_seconds(networks.model, sampler, z, labels)
        is_internal = networks.guide is networks.model
        has_pass = networks.guide is not None and not is_internal  # one on the way needs no pass of its own
        guide_seconds = pass_seconds(networks.guide, sampler, z, labels) if has_pass else 0.0
        begin = time.perf_counter()
        sampler.decode(networks.model.unpack(z)[0]).cpu()
        decode_seconds = time.perf_counter() - begin
    if not process.is_main:
        return
    count, share = args.num_fid_samples * len(points), args.num_fid_samples / process.world_size
    seconds = (passes * own_seconds + of_guide * guide_seconds + len(points) * decode_seconds) / 2 * share
    size = len(points) * npz_bytes(args.num_fid_samples, trained.resolution)
    print(
        f"{trained.config.model}, checkpoint {trained.label} ({trained.weights}): "
        f"{count_parameters(networks.model)[0]:,} parameters"
    )
    if is_internal:
        print(f"guide: {trained.guide.as_guide}: an output after block {trained.config.guide_depth}, in the same pass")
    elif networks.guide is not None:
        own = isinstance(networks.guide, Shortcut)
        what = "blocks of its own" if own else f"{count_parameters(networks.guide)[0]:,} parameters"
        print(f"guide: {trained.guide.as_guide}: {what}, {guide_seconds:.3f} s a forward pass")
    print(f"VAE: {count_parameters(networks.tokenizer)[0]:,} parameters")
    print(f"batch of 2: {own_seconds:.3f} s a forward pass, {decode_seconds:.3f} s to decode")
    and_guide = f" and {of_guide} of the guide" if has_pass else ""
    of_sweep = "" if args.sweep is None else f" over the {len(points)} points of the sweep"
    print(
        f"{passes} forward passes{and_guide} an image{of_sweep} ({args.mode}, {steps} steps): about "
        f"{seconds / 3600:.2f} hours for {count} images with {process.world_size} processes at this rate; larger "
        "batches are faster"
    )
    print(f"{size} bytes of shards" + (f", {size} of {NPZ_NAME}" if args.npz else ""))
    print(f"peak memory: {peak_memory(process.device)}; nothing was written")


def pass_seconds(network: Denoiser, sampler: ImageSampler, x: torch.Tensor, labels: torch.Tensor) -> float:
    """Of one forward pass; a first one is not counted."""
    velocity = model_velocity(network, sampler.autocast)
    velocity(x, 1.0, labels).cpu()
    begin = time.perf_counter()
    velocity(x, 1.0, labels).cpu()
    return time.perf_counter() - begin
