"""A file of random Inception weights whose features have the size and spread of real ones, for tests."""

import math
from pathlib import Path

import torch

from metrics.inception import build_inception


def write_inception_weights(path: Path, seed: int = 0) -> Path:
    """In torch-fidelity's layout; made once."""
    if not path.exists():
        network = build_inception(random_weights=True).network
        generator = torch.Generator().manual_seed(seed)
        state = network.state_dict()
        for name, tensor in state.items():
            if name.endswith("conv.weight"):
                tensor.normal_(std=math.sqrt(2.5 / tensor[0].numel()), generator=generator)
        torch.save(state, path)
    return path
