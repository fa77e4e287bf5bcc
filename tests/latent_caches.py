"""Latent caches for the tests: written directly, without a VAE, or by cache_latents.py."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from dataset.latents import FLIPPED_NAME, STATISTICS_NAME, features_name
from dataset.packing import PackingJob
from dataset.shards import ShardSpec
from formats.vae import load_tokenizer
from models.latent_statistics import LatentStatistics
from tests.command_line import argv_of

SHAPE = (4, 8, 8)  # C, h, w of f4d4-tiny at 32 px


def pack(folder: Path, kind: str, arrays: np.ndarray, labels: Sequence[int], source: dict, shard_size: int = 7) -> None:
    """Write arrays ``[N, …]`` as a packed folder."""
    job = PackingJob(folder, ShardSpec(kind, arrays.shape[1:], str(arrays.dtype)), source)
    assert not job.begin()
    shards = range(0, len(arrays), shard_size)
    for number, first in enumerate(shards):
        part = arrays[first : first + shard_size]
        with job.shard(number) as writer:
            writer.create(len(part))
            with writer:
                sizes = [writer.put(slot, np.ascontiguousarray(item)) for slot, item in enumerate(part)]
            writer.finish(sizes, labels[first : first + len(part)])
    assert job.finish(len(shards), [f"class{number}" for number in range(max(labels) + 1)])


def random_moments(count: int, seed: int, dtype: str = "float16", shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """Means and standard deviations ``[count, 2C, h, w]``."""
    generator = np.random.default_rng(seed)
    mean = generator.normal(0.3, 1.5, (count, *shape))
    std = generator.uniform(0.01, 0.5, mean.shape)
    return np.concatenate([mean, std], 1).astype(dtype)


def write_cache(
    folder: Path,
    count: int = 30,
    *,
    classes: int = 3,
    hflip: bool = False,
    features: str | None = None,
    feature_shape: tuple[int, int] = (4, 6),
    dataset: str = "dataset",
    resolution: int = 32,
    shape: tuple[int, int, int] = SHAPE,
    shard_size: int = 7,
) -> dict[str, np.ndarray]:
    """A complete cache of random numbers; returns its arrays: moments, flipped, features, features_flipped, labels."""
    labels = (np.arange(count) % classes).tolist()
    source = {"dataset": dataset, "resolution": resolution, "dtype": "float16", "precision": "float32", "vae": "x"}
    arrays = {"moments": random_moments(count, 1, shape=shape), "labels": np.array(labels, np.int64)}
    pack(folder, "latents", arrays["moments"], labels, source, shard_size)
    if hflip:
        arrays["flipped"] = random_moments(count, 2, shape=shape)
        pack(folder / FLIPPED_NAME, "latents", arrays["flipped"], labels, source, shard_size)
    if features is not None:
        for key, flipped in (("features", False), ("features_flipped", True))[: 2 if hflip else 1]:
            arrays[key] = np.random.default_rng(3 + flipped).normal(size=(count, *feature_shape)).astype(np.float16)
            pack(folder / features_name(features, flipped), "features", arrays[key], labels, source, shard_size)
    statistics = LatentStatistics(shape[0])
    mean, std = np.split(arrays["moments"].astype(np.float64), 2, axis=1)
    statistics.mean.copy_(torch.from_numpy(mean.mean((0, 2, 3))))
    statistics.var.copy_(torch.from_numpy(mean.var((0, 2, 3)) + (std**2).mean((0, 2, 3))))
    save_file(statistics.tensors(), folder / STATISTICS_NAME)
    (folder / "vae").mkdir()
    config = {"_class_name": "AutoencoderKL", "latent_channels": shape[0]}
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    return arrays


def save_vae(folder: Path, seed: int = 0, change=lambda tokenizer: None) -> Path:
    """An f4d4-tiny with random weights, as a run leaves it: ``folder/vae``."""
    torch.manual_seed(seed)
    tokenizer, _ = load_tokenizer("f4d4-tiny", "none")
    change(tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / "vae")
    return folder / "vae"


@torch.no_grad()
def overflow(tokenizer) -> None:
    """Weights that are all finite, and latents that are not: infinities of both signs meet in the last layer."""
    tokenizer.network.encoder.conv_norm_out.weight *= 1e20
    tokenizer.network.encoder.conv_out.weight *= 1e20


@torch.no_grad()
def too_large(tokenizer) -> None:
    """Latents that are finite, but not in float16."""
    tokenizer.network.quant_conv.weight[:4] *= 1e6


def flags(data, vae, name: str | Path, **changes) -> list[str]:
    """Flags of cache_latents.py; ``changes`` replace or add (True: a bare flag, None: leave out)."""
    values = {"data_dir": data, "vae": vae, "vae_latents_name": name, "num_workers": 1} | changes
    return argv_of(values)
