"""Averages of any relative length, put together after the training (EDM2, arXiv 2312.02696, section 3.2).

A run with ``--posthoc-ema`` keeps ``snapshots/``: at many steps its averages by power functions, in float16.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from files import read_safetensors
from formats.averages import POSTHOC, posthoc_length
from formats.power_average import combination, gamma_of
from runtime.checkpoint import Checkpoint

NEGLIGIBLE = 1e-6  # a share that moves no weight by more than float16 rounds it
MOST_MISSED = 0.05  # of the profile's norm
LARGEST_SHARES = 16.0  # 2-norm, by which float16's rounding of 2e-4 grows


class Part(NamedTuple):
    """One stored average and its share."""

    snapshot: Checkpoint
    name: str
    share: float


class PosthocCheckpoint(Checkpoint):
    """A snapshot; its weights of the length asked for are a sum of what the snapshots up to it hold.

    Args:
        folder: e.g. ``exps/NAME/snapshots/0050000``.
        weights: e.g. ``posthoc_0.08``; statistics of that name are put together likewise.
    """

    def __init__(self, folder: Path, weights: str):
        super().__init__(folder)
        self.weights = weights

    @cached_property
    def _stored(self) -> list[tuple[Checkpoint, str]]:
        """Every average in every snapshot up to this one."""
        folders = sorted(path for path in self.folder.parent.glob("[0-9]*") if path.name.isdigit())
        snapshots = [Checkpoint(path) for path in folders if int(path.name) <= self.step]
        return [(each, path.stem) for each in snapshots for path in sorted(each.folder.glob(f"{POSTHOC}*.safetensors"))]

    @cached_property
    def _combination(self) -> tuple[np.ndarray, float]:
        steps = np.array([snapshot.step for snapshot, _ in self._stored])
        gammas = np.array([gamma_of(posthoc_length(name)) for _, name in self._stored])
        return combination(steps, gammas, self.step, gamma_of(posthoc_length(self.weights)))

    @property
    def parts(self) -> list[Part]:
        """The stored averages that count, and their shares."""
        shares, _ = self._combination
        return [Part(*each, float(x)) for each, x in zip(self._stored, shares, strict=True) if abs(x) > NEGLIGIBLE]

    def doubts(self) -> str | None:
        """Why this length is not what its name says, or None."""
        shares, missed = self._combination
        size = float(np.linalg.norm(shares))
        if missed <= MOST_MISSED and size <= LARGEST_SHARES:
            return None
        count = len({part.snapshot.step for part in self.parts})
        why = f"has shares up to {abs(shares).max():.0f}"
        if missed > MOST_MISSED:
            why = f"misses its profile by {missed:.0%}"
        return (
            f"{self.weights} at step {self.step}, out of {count} snapshots, {why}: a length nearer to those of "
            "--posthoc-ema is truer, and so are more snapshots (--posthoc-steps of the training)"
        )

    def fault(self, module: str | None = None) -> str | None:
        prefix = self._prefix(module)
        if prefix is None:
            return super().fault(module)
        for part in self.parts:
            if fault := part.snapshot.fault(f"{prefix}{part.name}"):
                return f"{part.snapshot.folder}: {fault}; without that folder the other snapshots serve"
        return None

    def read_module(self, name: str) -> dict[str, torch.Tensor]:
        prefix = self._prefix(name)
        if prefix is None:
            return super().read_module(name)
        total: dict[str, torch.Tensor] = {}
        for part in self.parts:
            tensors = read_safetensors(part.snapshot.folder / f"{prefix}{part.name}.safetensors")
            floats = {key: tensor.float() for key, tensor in tensors.items() if tensor.is_floating_point()}
            if not total:
                total = {key: torch.zeros_like(tensor) for key, tensor in floats.items()}
            torch._foreach_add_([total[key] for key in floats], list(floats.values()), alpha=part.share)
        return total | {key: tensor for key, tensor in tensors.items() if key not in total}

    def checksum(self, module: str) -> str:
        """Of everything that the weights follow from."""
        if self._prefix(module) is None:
            return super().checksum(module)
        sources = [[each.step, name, each.checksum(name)] for each, name in self._stored]
        return hashlib.sha256(json.dumps([self.weights, self.step, sources]).encode()).hexdigest()

    def _prefix(self, module: str | None) -> str | None:
        """What stands before the name of a stored average, of a module that is put together; None of another."""
        if module is None or not module.endswith(self.weights):
            return None
        return module.removesuffix(self.weights)
