"""What --dry-run measures: sizes, memory and seconds of two steps, with nothing kept."""

import time
from collections.abc import Callable, Mapping

import torch
from torch import nn

from runtime.measure import count_parameters, peak_memory

NUM_CLASSES = 1000  # of a SiT that is built without data: ImageNet's
DEFAULT_VAE = "f16d32"  # of latents that are made up


def report(
    networks: Mapping[str, nn.Module | None],
    step: Callable[[int], dict[str, torch.Tensor]],
    images_per_step: int,
    device: torch.device,
    *,
    shown: bool,
    steps: int = 2,
) -> None:
    """Print parameter counts, run ``steps`` steps, print their seconds, metrics and the peak memory."""
    show = print if shown else lambda text: None
    width = max(16, *(len(name) for name, network in networks.items() if network is not None))
    show(f"{'network':<{width}}{'parameters':>16}{'trained':>16}")
    for name, network in networks.items():
        if network is not None:
            total, trained = count_parameters(network)
            show(f"{name:<{width}}{total:>16,}{trained:>16,}")
    for number in range(steps):
        begin = time.perf_counter()
        metrics = {name: value.item() for name, value in step(number).items()}
        seconds = time.perf_counter() - begin
        values = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        show(f"step {number + 1}: {seconds:.2f} s, {images_per_step / seconds:.2f} images/s  {values}")
    show(f"peak memory: {peak_memory(device)}")
