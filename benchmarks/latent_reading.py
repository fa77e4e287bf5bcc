"""How fast latents are read back in random order by one worker, against one file a latent.

    python benchmarks/latent_reading.py --num-images 8192

Ours: dataset.loader.BatchLoader with one thread over a latent cache, held in memory and read from its files.
Baseline: a torch DataLoader with one worker process, shuffled, over a folder with one .npy file a latent, each loaded
and made a tensor, collated into batches, as the neighbouring codebases do.
All files lie in the page cache: this measures the reader, not the disk. They take turns, ``--repeats`` times, and the
medians are shown; each starts its workers before the clock does.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.latents import LatentDataset
from dataset.loader import BatchLoader
from dataset.order import SampleOrder
from runtime.cli import ArgumentParser, add_debug_argument, positive_int, run
from tests.latent_caches import write_cache


class FilePerLatent(Dataset):
    """What neighbouring codebases read: ``000000.npy`` … and the labels in one file."""

    def __init__(self, folder: Path) -> None:
        self._paths = sorted(folder.glob("[0-9]*.npy"))
        self._labels = np.load(folder / "labels.npy")

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, item: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(np.load(self._paths[item])), int(self._labels[item])


def write_files(folder: Path, moments: np.ndarray, labels: np.ndarray) -> None:
    folder.mkdir()
    for item, latent in enumerate(moments):
        np.save(folder / f"{item:06d}.npy", latent)
    np.save(folder / "labels.npy", labels)


def read_baseline(folder: Path, batch_size: int) -> Iterator:
    loader = DataLoader(
        FilePerLatent(folder), batch_size, shuffle=True, num_workers=1, drop_last=True, persistent_workers=True
    )
    while True:
        yield from loader


def read_ours(dataset: LatentDataset, batch_size: int) -> Iterator:
    with BatchLoader(dataset, SampleOrder(len(dataset), 0), batch_size=batch_size, num_workers=1) as loader:
        for (batch,) in loader:
            yield batch


def items_per_second(stream: Iterator, batch_size: int, batches: int) -> float:
    for _ in range(4):
        next(stream)
    begin = time.perf_counter()
    for _ in range(batches):
        next(stream)
    seconds = time.perf_counter() - begin
    stream.close()
    return batches * batch_size / seconds


def main(argv: Sequence[str]) -> int:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--num-images", type=positive_int, default=8192, help="latents")
    add("--channels", type=positive_int, default=32, help="of the latent (f16d32: 32)")
    add("--side", type=positive_int, default=16, help="of the latent (f16d32 at 256 px: 16)")
    add("--batch-size", type=positive_int, default=256, help="latents")
    add("--batches", type=positive_int, default=30, help="that a run reads")
    add("--repeats", type=positive_int, default=5, help="runs of each")
    add_debug_argument(parser)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shape = (args.channels, args.side, args.side)
        arrays = write_cache(folder / "cache", args.num_images, shape=shape, shard_size=1024)
        write_files(folder / "files", arrays["moments"], arrays["labels"])
        held, read = LatentDataset(folder / "cache"), LatentDataset(folder / "cache", memory_limit=0)
        if not held.held_bytes:
            raise MemoryError("the latents do not fit in memory; take fewer --num-images")
        readers = {
            "one file a latent": lambda: read_baseline(folder / "files", args.batch_size),
            "ours, from files": lambda: read_ours(read, args.batch_size),
            "ours, in memory": lambda: read_ours(held, args.batch_size),
        }
        results: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(args.repeats):
            for name, reader in readers.items():
                results[name].append(items_per_second(reader(), args.batch_size, args.batches))
    baseline = results["one file a latent"]
    print(f"{'':20}{'latents/s':>12}{'ratio':>8}")
    for name, rates in results.items():
        ratio = statistics.median(rate / base for rate, base in zip(rates, baseline, strict=True))
        print(f"{name:20}{statistics.median(rates):12.0f}{ratio:8.1f}")
    print(f"float16 {arrays['moments'].shape}, batches of {args.batch_size}, one worker, median of {args.repeats}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
