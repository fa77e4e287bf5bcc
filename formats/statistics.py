"""Latent statistics as others store them, and where they lie when nobody says.

======================================  ==============================================================================
ours, ``latents_stats.safetensors``     ``mean``, ``std``, ``var``, each ``[C]``; ``std = sqrt(var + 1e-4)``
LightningDiT, ``latents_stats.pt``      ``mean``, ``std``, each ``[1, C, 1, 1]``
REPA-E, ``X-latents-stats.pt``          ``latents_bias`` = mean, ``latents_scale`` = var^(-1/2), each ``[1, C, 1, 1]``
REPA-E, a training checkpoint           ``bn.running_mean`` and ``bn.running_var`` in its ``ema``
diffusers, ``config.json``              ``latents_mean``, ``latents_std`` (and ``scaling_factor``), lists
======================================  ==============================================================================

REPA-E trains on ``(z − mean) / sqrt(var + 1e-4)`` (its BatchNorm) and decodes ``z·sqrt(var) + mean``. Here var is
taken over, so that latents are normalised to the same numbers, and decoding is the exact inverse; against REPA-E's that
is a relative difference of 5e-5 / var, which no image shows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from formats.run_folders import WEIGHT_SUFFIXES
from models.latent_statistics import LatentStatistics
from models.tokenizers import STATISTICS_FILE
from models.weight_files import NotWeightsError, check_plain, read_contents

LIGHTNINGDIT_FILE = "latents_stats.pt"
REPAE_SUFFIX = "-latents-stats"
DISCRIMINATOR_SUFFIX = "-discriminator-ckpt"
REPA = "repa"  # --vae-latents-stats repa: what REPA normalises with, whose checkpoints hold no statistics
REPA_SCALE = 0.18215  # Stable Diffusion's factor, and no mean
REPA_CHANNELS = 4


@dataclass(frozen=True)
class FoundStatistics:
    """Per-channel statistics of latents, each ``[C]``, as they were found.

    Attributes:
        mean: of the latents.
        std: what they are divided by; None where only var is stored.
        var: to which 1e-4 is added before the root; None where only std is stored.
        source: where they come from, for messages.
    """

    mean: torch.Tensor
    std: torch.Tensor | None
    var: torch.Tensor | None
    source: str

    def check(self, channels: int) -> None:
        """Refuse what no latents of ``channels`` channels can be normalised with.

        Raises:
            NotWeightsError: they are of another number of channels, not finite, or some std is zero.
        """
        for name, tensor in (("mean", self.mean), ("std", self.std), ("var", self.var)):
            if tensor is None:
                continue
            if tensor.numel() != channels:
                raise NotWeightsError(f"statistics of {tensor.numel()} channels for a VAE with {channels}")
            if not tensor.isfinite().all():
                raise NotWeightsError(f"the {name} of channel {_first(~tensor.isfinite())} is not finite")
        # latents are divided by it; a single variance of zero is harmless, because 1e-4 is added
        if self.std is not None and (self.std <= 0).any():
            raise NotWeightsError(f"the std of channel {_first(self.std <= 0)} is not positive")
        if self.var is not None and (self.var < 0).any():
            raise NotWeightsError(f"the variance of channel {_first(self.var < 0)} is negative")
        if self.var is not None and not self.var.any():
            raise NotWeightsError("the variance is 0 in every channel: they were never measured")

    def load_into(self, statistics: LatentStatistics) -> None:
        """Hand them to their owner.

        Raises:
            NotWeightsError: as :meth:`check`.
        """
        self.check(statistics.mean.numel())
        if self.std is None:
            statistics.mean.copy_(self.mean)
            statistics.var.copy_(self.var)
        else:
            statistics.load(self.mean, self.std, self.var)


def repa_statistics() -> FoundStatistics:
    """What REPA normalises Stable Diffusion's latents with: no mean, one factor."""
    source = f"REPA (mean 0, scale {REPA_SCALE})"
    return FoundStatistics(torch.zeros(REPA_CHANNELS), torch.full((REPA_CHANNELS,), 1 / REPA_SCALE), None, source)


def read_statistics(path: Path) -> FoundStatistics:
    """Latent statistics from a file.

    Raises:
        NotWeightsError: it holds none.
    """
    contents = read_contents(Path(path))
    found = statistics_in(contents, str(path))
    if found is None:
        some = ", ".join(map(str, list(contents)[:3])) if isinstance(contents, dict) else type(contents).__name__
        raise NotWeightsError(
            f"it holds no latent statistics (mean and std, or latents_scale and latents_bias), but {some}"
        )
    return found


def statistics_in(contents: object, source: str) -> FoundStatistics | None:
    """Latent statistics among what a file holds, or None.

    Raises:
        NotWeightsError: they are there, but incomplete.
    """
    if not isinstance(contents, Mapping):
        return None
    if isinstance(contents.get("ema"), Mapping):
        return batch_norm_statistics(contents["ema"], f"bn of ema in {source}")
    if "latents_scale" in contents or "latents_bias" in contents:
        scale, bias = (_channels(contents, name) for name in ("latents_scale", "latents_bias"))
        if (scale <= 0).any() or not scale.isfinite().all():
            raise NotWeightsError("latents_scale is not positive and finite everywhere")
        return FoundStatistics(bias, None, scale.double().square().reciprocal().float(), source)
    if "mean" in contents and ("std" in contents or "var" in contents):
        std, var = (_channels(contents, name) if name in contents else None for name in ("std", "var"))
        return FoundStatistics(_channels(contents, "mean"), std, var, source)
    return own_statistics(contents, source)


def own_statistics(contents: Mapping, source: str) -> FoundStatistics | None:
    """Those that our own checkpoints keep with the network."""
    for prefix in ("tokenizer.statistics.", "statistics."):
        if f"{prefix}mean" in contents and f"{prefix}var" in contents:
            mean, var = (_channels(contents, f"{prefix}{name}") for name in ("mean", "var"))
            return FoundStatistics(mean, None, var, source)
    return None


def batch_norm_statistics(state: Mapping, source: str) -> FoundStatistics | None:
    """Those of a SiT of REPA-E, which keeps them in a BatchNorm called ``bn``."""
    for prefix in ("bn.", "module.bn.", "_orig_mod.bn."):
        if f"{prefix}running_var" in state or f"{prefix}running_mean" in state:
            mean, var = (_channels(state, f"{prefix}running_{name}") for name in ("mean", "var"))
            return FoundStatistics(mean, None, var, source)
    return None


CONFIG_STATISTICS = "latents_mean and latents_std of"  # with what a source begins


def config_statistics(config: Mapping, source: str) -> FoundStatistics | None:
    """Those of a diffusers configuration.

    Its pipelines normalise to ``(z − latents_mean) · scaling_factor / latents_std``; so that is the std.
    """
    if config.get("latents_mean") is None or config.get("latents_std") is None:
        return None
    mean, std = (torch.tensor(config[name], dtype=torch.float64).flatten() for name in ("latents_mean", "latents_std"))
    return FoundStatistics(mean, std / config.get("scaling_factor", 1.0), None, source)


def find_beside(path: Path) -> Path | None:
    """The statistics' file that belongs to a VAE's file or folder.

    ``X-latents-stats.*`` belongs to ``X.*``; ``latents_stats.*`` to the folder it lies in, or to the one VAE there.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    candidates = [folder / STATISTICS_FILE, folder / LIGHTNINGDIT_FILE]
    if not path.is_dir():
        own = [path.with_name(f"{path.stem}{REPAE_SUFFIX}{suffix}") for suffix in (".pt", ".safetensors")]
        candidates = own + (candidates if vae_files(folder) == [path] else [])
    return next((candidate for candidate in candidates if candidate.exists()), None)


def discriminator_beside(path: Path) -> Path | None:
    """``X-discriminator-ckpt.*`` of a VAE's file ``X.*``; in a folder, the only one there."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    named = [file for file in _weight_files(folder) if file.stem.endswith(DISCRIMINATOR_SUFFIX)]
    if path.is_dir():
        return named[0] if len(named) == 1 else None
    return next((file for file in named if file.stem == f"{path.stem}{DISCRIMINATOR_SUFFIX}"), None)


def vae_files(folder: Path) -> list[Path]:
    """Files of weights in a folder that are neither statistics nor a discriminator's."""
    others = (REPAE_SUFFIX, DISCRIMINATOR_SUFFIX, "latents_stats", "discriminator")
    return [path for path in _weight_files(folder) if not path.stem.endswith(others)]


def _weight_files(folder: Path) -> list[Path]:
    return [path for path in sorted(Path(folder).iterdir()) if path.suffix in WEIGHT_SUFFIXES and path.is_file()]


def repae_tensors(statistics: LatentStatistics) -> dict[str, torch.Tensor]:
    """What REPA-E stores: ``latents_scale`` = var^(-1/2) and ``latents_bias`` = mean, each float32 ``[1, C, 1, 1]``."""
    scale = statistics.var.cpu().double().rsqrt().float()
    if not scale.isfinite().all():
        raise NotWeightsError(f"the variance of channel {_first(~scale.isfinite())} is 0, which REPA-E cannot store")
    return {"latents_scale": scale.view(1, -1, 1, 1), "latents_bias": statistics.mean.cpu().view(1, -1, 1, 1).clone()}


def _channels(contents: Mapping, name: str) -> torch.Tensor:
    """float32 ``[C]`` from a tensor with singleton dimensions around C."""
    tensor = contents.get(name)
    if not isinstance(tensor, torch.Tensor):
        raise NotWeightsError(f"{name} is {'missing' if tensor is None else 'not a tensor'}")
    check_plain(name, tensor)
    if tensor.numel() != max(tensor.shape, default=1):
        raise NotWeightsError(f"{name} of shape {tuple(tensor.shape)} is not one number a channel")
    return tensor.detach().float().flatten()


def _first(mask: torch.Tensor) -> int:
    return int(mask.nonzero()[0])
