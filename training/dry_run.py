"""What --dry-run measures: sizes, memory and seconds of two steps, with nothing kept."""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from dataset.images import ImageDataset
from dataset.loader import ImageBatch
from runtime.measure import count_parameters, peak_memory
from training.method import micro_batch_size, train_step
from training.micro_batch import FOUND, Trial

STEPS = 2


def dry_run(
    args: argparse.Namespace,
    accelerator: Accelerator,
    trial: Trial,
    prepare: Callable[[Any], object] = lambda method: None,
) -> None:
    """Print parameter counts, run ``STEPS`` steps and ``trial.later``, print their seconds, metrics, the peak memory.

    Args:
        args: the flags of ``training.arguments``.
        accelerator: precision and processes.
        trial: what would be trained, and on what.
        prepare: is called with the method before its steps.
    """
    trial.find(args, accelerator)
    method = trial.build()
    prepare(method)
    steps = [trial.step + number for number in range(STEPS)]
    if trial.later is not None and trial.later not in steps:
        steps.append(trial.later)
    args.max_train_steps = args.max_train_steps or max(steps) + 1
    images = max(1, micro_batch_size(args, accelerator))
    if accelerator.device.type != "cuda":  # on a GPU a training's, to see whether they fit
        images = min(2, images)
    batch = trial.batch_of(method, images)
    show = print if accelerator.is_main_process else lambda text: None
    networks = {name: network for name, network in method.networks_by_name().items() if network is not None}
    width = max(16, *map(len, networks))
    show(f"{'network':<{width}}{'parameters':>16}{'trained':>16}")
    for name, network in networks.items():
        total, trained = count_parameters(network)
        if total:
            show(f"{name:<{width}}{total:>16,}{trained:>16,}")
    for number, step in enumerate(steps, start=1):
        begin = time.perf_counter()
        metrics = {name: value.item() for name, value in train_step(method, step, [batch]).items()}
        seconds = time.perf_counter() - begin
        values = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        rate = images * accelerator.num_processes / seconds
        what = f"step {number}" if step != trial.later else f"as after step {step}"
        show(f"{what}: {images} images at once, {seconds:.2f} s, {rate:.2f} images/s  {values}")
    show(f"peak memory: {peak_memory(accelerator.device)}")
    if args.micro_batch_size == "auto" and accelerator.device.type == "cuda":
        show(f"{FOUND.format(images)}, {args.gradient_accumulation_steps} times a step")


def image_batch(images: ImageDataset | None, count: int, resolution: int, num_classes: int) -> ImageBatch:
    """Real images where there are some, spread over the set, else random ones."""
    pixels = torch.randint(0, 256, (count, 3, resolution, resolution), dtype=torch.uint8)
    labels = torch.linspace(0, num_classes - 1, count).long()
    if images is not None:
        items = np.linspace(0, len(images) - 1, count).astype(np.int64)
        images.read_into(items, pixels.numpy())
        labels = torch.from_numpy(images.labels[items])
    return ImageBatch(pixels, labels)
