"""What --dry-run measures: sizes, memory and seconds of two steps, with nothing kept."""

import argparse
import time
from typing import Any

import numpy as np
import torch

from dataset.images import ImageDataset
from dataset.loader import ImageBatch
from runtime.measure import count_parameters, peak_memory
from training.method import Method, micro_batch_size, train_step
from training.micro_batch import FOUND


def dry_run(method: Method, batch: Any, images: int, start_step: int = 0, steps: int = 2) -> None:
    """Print parameter counts, run ``steps`` steps, print their seconds, metrics and the peak memory.

    Args:
        method: what would be trained.
        batch: a micro-batch of each process.
        images: in it.
        start_step: the first of the steps, e.g. one that the discriminator takes part in.
        steps: how many.
    """
    accelerator = method.accelerator
    method.args.max_train_steps = method.args.max_train_steps or start_step + steps
    show = print if accelerator.is_main_process else lambda text: None
    networks = {name: network for name, network in method.networks_by_name().items() if network is not None}
    width = max(16, *map(len, networks))
    show(f"{'network':<{width}}{'parameters':>16}{'trained':>16}")
    for name, network in networks.items():
        total, trained = count_parameters(network)
        if total:
            show(f"{name:<{width}}{total:>16,}{trained:>16,}")
    for number in range(steps):
        begin = time.perf_counter()
        metrics = {name: value.item() for name, value in train_step(method, start_step + number, [batch]).items()}
        seconds = time.perf_counter() - begin
        values = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        rate = images * accelerator.num_processes / seconds
        show(f"step {number + 1}: {seconds:.2f} s, {rate:.2f} images/s  {values}")
    show(f"peak memory: {peak_memory(accelerator.device)}")
    if method.args.micro_batch_size == "auto" and accelerator.device.type == "cuda":
        show(f"{FOUND.format(images)}, {method.args.gradient_accumulation_steps} times a step")


def batch_size(args: argparse.Namespace, method: Method) -> int:
    """Images at once on a process in a dry run: a training's on a GPU, to see whether they fit, at most 2 on a CPU."""
    images = max(1, micro_batch_size(args, method.accelerator))
    return images if method.accelerator.device.type == "cuda" else min(2, images)


def image_batch(images: ImageDataset | None, count: int, resolution: int, num_classes: int) -> ImageBatch:
    """Real images where there are some, spread over the set, else random ones."""
    pixels = torch.randint(0, 256, (count, 3, resolution, resolution), dtype=torch.uint8)
    labels = torch.linspace(0, num_classes - 1, count).long()
    if images is not None:
        items = np.linspace(0, len(images) - 1, count).astype(np.int64)
        images.read_into(items, pixels.numpy())
        labels = torch.from_numpy(images.labels[items])
    return ImageBatch(pixels, labels)
