"""How much of the bare encoder's speed cache_latents.py keeps.

    python benchmarks/caching.py --vae f16d32 --resolution 256 --num-images 256

Bare: the same VAE encodes one batch again and again, which lies on the device already; nothing is read or written.
Ours: the whole of inference.latent_cache: images read from a packed dataset, encoded in its fixed chunks, written in
float16, with checksums and statistics. On a CPU the bare encoder runs in its faster way: a batch in one call with all
threads, or chunks with one thread each. The two take turns, ``--repeats`` times; medians are shown. Random weights.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.images import ImageDataset, open_images
from dataset.packing import PackingJob
from dataset.shards import ShardSpec
from formats.vae import load_tokenizer
from inference.latent_cache import (
    Cacher,
    ChunkEncoder,
    MeasuredStatistics,
    Target,
    autocast_for,
    chunk_size,
    latents_encoder,
    one_thread_each,
)
from models.tokenizers import Tokenizer
from runtime.cli import ArgumentParser, add_debug_argument, positive_int, run
from runtime.processes import this_process


def write_images(folder: Path, count: int, resolution: int, shard_size: int) -> ImageDataset:
    """A packed dataset of noise."""
    job = PackingJob(folder, ShardSpec("images", (3, resolution, resolution), "uint8"), {})
    job.begin()
    generator, shards = np.random.default_rng(0), range(0, count, shard_size)
    for number, first in enumerate(shards):
        pixels = generator.integers(0, 256, (min(shard_size, count - first), 3, resolution, resolution), np.uint8)
        with job.shard(number) as writer:
            writer.create(len(pixels))
            with writer:
                sizes = [writer.put(slot, item) for slot, item in enumerate(pixels)]
            writer.finish(sizes, [0] * len(pixels))
    job.finish(len(shards), ["noise"])
    return open_images(folder)


@torch.inference_mode()
def bare(tokenizer: Tokenizer, batch: torch.Tensor, count: int, args) -> float:
    """Images a second of the encoder alone, in one call a batch."""
    device, encode = batch.device, latents_encoder(tokenizer, torch.float16)
    autocast = autocast_for(device, args.mixed_precision)
    begin = time.perf_counter()
    for _ in range(count // len(batch)):
        with autocast():
            encode(batch)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count // len(batch) * len(batch) / (time.perf_counter() - begin)


def bare_chunks(encoder: ChunkEncoder, target: Target, batch: torch.Tensor, count: int) -> float:
    """The same, chunks with one thread each."""
    begin = time.perf_counter()
    for wait in [encoder.start(batch, [target]) for _ in range(count // len(batch))]:
        wait()
    return count // len(batch) * len(batch) / (time.perf_counter() - begin)


def cached(
    folder: Path, images: ImageDataset, tokenizer: Tokenizer, encoder: ChunkEncoder, args, pinned: bool
) -> float:
    """Images a second of the whole job."""
    job = PackingJob(folder, ShardSpec("latents", tokenizer.stored_shape(images.resolution), "float16"), {})
    measured, shards = MeasuredStatistics(job, tokenizer), len(images.shard_counts)
    encode = latents_encoder(tokenizer, torch.float16)
    target = Target("latents", job, encode, False, ["noise"], lambda: measured.total(shards), measured.shard)
    begin = time.perf_counter()
    job.begin()
    cacher = Cacher(
        images,
        [target],
        encoder,
        batch_size=args.pproc_batch_size,
        num_workers=args.num_workers,
        pin_memory=pinned,
    )
    with tqdm(total=len(images), disable=True) as progress:
        cacher.run(range(shards), progress)
    if not target.finish(shards):
        raise RuntimeError("the cache is not complete")
    return len(images) / (time.perf_counter() - begin)


def main(argv: Sequence[str]) -> int:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--vae", default="f16d32", help="architecture")
    add("--resolution", type=positive_int, default=256, help="side of the images in pixels")
    add("--num-images", type=positive_int, default=256, help="in a run")
    add("--shard-size", type=positive_int, default=64, help="images")
    add("--pproc-batch-size", type=positive_int, default=64, help="images")
    add("--num-workers", type=positive_int, default=4, help="reading threads")
    add("--mixed-precision", choices=("no", "bf16"), default="no", help="precision of the VAE")
    add("--repeats", type=positive_int, default=3, help="runs of each")
    add_debug_argument(parser)
    args = parser.parse_args(argv)
    device = this_process().device
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    tokenizer, _ = load_tokenizer(args.vae, "none")
    tokenizer.requires_grad_(False).to(device)
    if device.type == "cpu":
        tokenizer.to(memory_format=torch.channels_last)
    chunk, count = chunk_size(args.resolution, device), args.num_images
    size = min(count, max(chunk, args.pproc_batch_size if device.type == "cuda" else 4 * chunk))
    batch = torch.randint(0, 256, (size, 3, args.resolution, args.resolution), dtype=torch.uint8).to(device)
    rates: dict[str, list[float]] = {"bare encoder": [], "cache_latents": []}
    threads = torch.get_num_threads()

    def new_encoder() -> ChunkEncoder:
        return ChunkEncoder(device, chunk, threads, autocast_for(device, args.mixed_precision))

    target = Target("latents", None, latents_encoder(tokenizer, torch.float16), False, ())
    with tempfile.TemporaryDirectory() as scratch:
        images = write_images(Path(scratch) / "images", count, args.resolution, args.shard_size)
        bare(tokenizer, batch, size, args)  # kernels are chosen and compiled at the first call
        for number in range(args.repeats):
            fastest = bare(tokenizer, batch, count, args)
            with one_thread_each():
                if device.type == "cpu":
                    fastest = max(fastest, bare_chunks(new_encoder(), target, batch, count))
                rate = cached(
                    Path(scratch) / str(number), images, tokenizer, new_encoder(), args, device.type == "cuda"
                )
            rates["bare encoder"].append(fastest)
            rates["cache_latents"].append(rate)
    ratio = statistics.median(
        ours / bare for bare, ours in zip(rates["bare encoder"], rates["cache_latents"], strict=True)
    )
    for name, values in rates.items():
        print(f"{name:16}{statistics.median(values):10.2f} images/s")
    print(f"ratio {ratio:.3f}: {args.vae}, {args.resolution} px, {count} images, {threads} threads, {device}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
