"""How large networks are, and how much memory was used."""

import resource
import sys

import torch
from torch import nn


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """(all parameters, those that are trained) of a module."""
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def peak_memory(device: torch.device) -> str:
    """The most memory that was in use: the device's on CUDA, else the process's."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on {torch.cuda.get_device_name(device)}"
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30:.2f} GiB of the process, on the CPU"
