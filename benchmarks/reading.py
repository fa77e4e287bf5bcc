"""How fast images are read back in random order by one worker, against PNGs in an HDF5 file.

    python benchmarks/reading.py --images /data/ILSVRC2012/train/n01440764

Ours: dataset.loader.BatchLoader with one thread over a packed dataset, codec raw and codec png.
Baseline: a torch DataLoader with one worker process, shuffled, over an HDF5 file of uncompressed PNGs, each decoded
with Pillow and made a tensor [3, H, W], collated into batches, as the neighbouring codebases do.
All files lie in the page cache: this measures the reader, not the disk. The three take turns, ``--repeats`` times, and
the medians are shown; each starts its workers before the clock does and then reads ``--batches`` batches.
"""

import contextlib
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import preprocessing
from benchmarks.preprocessing import pack_baseline, repeat_files
from dataset.images import open_images
from dataset.loader import BatchLoader
from dataset.order import SampleOrder
from runtime.cli import ArgumentParser, add_debug_argument, positive_int, run


class PngsInHdf5(Dataset):
    """The images of the baseline's file, uint8 [3, H, W]."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: h5py.File | None = None
        with h5py.File(path) as file:
            self._names = [f"{group}/{name}" for group in file for name in file[group]]

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, item: int) -> torch.Tensor:
        if self._file is None:  # a handle must not be shared with the process that forked this one
            self._file = h5py.File(self._path)
        encoded = self._file[self._names[item]][()].tobytes()
        pixels = np.array(Image.open(io.BytesIO(encoded)))
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def read_baseline(path: Path, batch_size: int) -> Iterator[torch.Tensor]:
    loader = DataLoader(
        PngsInHdf5(path / "images.h5"), batch_size, shuffle=True, num_workers=1, drop_last=True, persistent_workers=True
    )
    while True:
        yield from loader


def read_ours(path: Path, batch_size: int) -> Iterator[torch.Tensor]:
    images = open_images(path)
    with BatchLoader(images, SampleOrder(len(images), 0), batch_size=batch_size, num_workers=1) as loader:
        for (batch,) in loader:
            yield batch


def images_per_second(read: Callable[[Path, int], Iterator], path: Path, batch_size: int, batches: int) -> float:
    stream = read(path, batch_size)
    for _ in range(4):
        next(stream)
    begin = time.perf_counter()
    for _ in range(batches):
        next(stream)
    seconds = time.perf_counter() - begin
    stream.close()
    return batches * batch_size / seconds


def pack(folder: Path, scratch: Path, resolution: int) -> dict[str, tuple[Callable, Path]]:
    """Make the three files and say who reads which."""
    pack_baseline(folder, scratch / "hdf5", resolution, preprocessing.count_cores())
    for codec in ("raw", "png"):
        argv = ["--imagenet-path", str(folder), "--output-path", str(scratch / codec), "--codec", codec]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            preprocessing.main([*argv, "--resolution", str(resolution)])
    return {
        "baseline": (read_baseline, scratch / "hdf5"),
        "ours, raw": (read_ours, scratch / "raw"),
        "ours, png": (read_ours, scratch / "png"),
    }


def main(argv: Sequence[str]) -> int:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--images", type=Path, required=True, help="class folders of photographs")
    add("--resolution", type=positive_int, default=256, help="side of the crops in pixels")
    add("--copies", type=positive_int, default=5, help="times that each file is in the dataset")
    add("--batch-size", type=positive_int, default=64, help="images")
    add("--batches", type=positive_int, default=10, help="that the baseline reads in a run; ours ten times as many")
    add("--repeats", type=positive_int, default=5, help="runs of each")
    add_debug_argument(parser)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = repeat_files(args.images, args.copies, Path(scratch) / "photographs")
        readers = pack(folder, Path(scratch), args.resolution)
        results: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(args.repeats):
            for name, (read, path) in readers.items():
                batches = args.batches * (10 if name == "ours, raw" else 1)
                results[name].append(images_per_second(read, path, args.batch_size, batches))
    print(f"{'':12}{'images/s':>12}{'ratio':>8}")
    for name, rates in results.items():
        ratio = statistics.median(rate / base for rate, base in zip(rates, results["baseline"], strict=True))
        print(f"{name:12}{statistics.median(rates):12.0f}{ratio:8.1f}")
    print(f"{args.resolution} px, batches of {args.batch_size}, one worker each, median of {args.repeats}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
