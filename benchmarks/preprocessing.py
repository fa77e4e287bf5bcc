"""How fast photographs are packed, against a plain tool that does the same work an image at a time.

    python benchmarks/preprocessing.py --images /data/ILSVRC2012/train/n01440764

Ours: preprocessing.py as a user runs it (``--codec raw``), start of the processes, checksums and flushing included.
Shards are small (64 files), so that finishing one overlaps with packing the next as in a large dataset.
Baseline: a process pool decodes and crops, one image a task (``imap``); the parent receives the pixels and writes each
as an uncompressed PNG into an HDF5 file, as the tools of the neighbouring codebases do.
Both do the same crop with the same number of workers on the same files, in turn, ``--repeats`` times; shown: medians.
Images a second are wall-clock time, divided by the workers; CPU seconds are user and system time of all processes.
"""

import contextlib
import io
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import preprocessing
from dataset.layouts import open_source
from runtime.cli import ArgumentParser, add_debug_argument, positive_int, run


def crop(path: Path, resolution: int) -> np.ndarray:
    """ADM's definition in plain Pillow, uint8 [H, W, 3]."""
    image = Image.open(path).convert("RGB")
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    y, x = (pixels.shape[0] - resolution) // 2, (pixels.shape[1] - resolution) // 2
    return pixels[y : y + resolution, x : x + resolution]


def pack_baseline(folder: Path, output: Path, resolution: int, num_workers: int) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    output.mkdir()
    with h5py.File(output / "images.h5", "w") as file, get_context("fork").Pool(num_workers) as pool:
        for number, pixels in enumerate(pool.imap(partial(crop, resolution=resolution), paths)):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
            file.create_dataset(
                f"{number // 1000:05d}/{number:08d}.png", data=np.frombuffer(buffer.getvalue(), np.uint8)
            )


def pack_ours(folder: Path, output: Path, resolution: int, num_workers: int) -> None:
    argv = ["--imagenet-path", str(folder), "--output-path", str(output), "--resolution", str(resolution)]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        preprocessing.main([*argv, "--num-workers", str(num_workers), "--shard-size", "64"])


def measure(pack: Callable[[Path, Path, int, int], None], *arguments) -> tuple[float, float]:
    """Wall-clock and CPU seconds."""
    with tempfile.TemporaryDirectory() as scratch:
        begin, cpu = time.perf_counter(), cpu_seconds()
        pack(arguments[0], Path(scratch) / "out", *arguments[1:])
        return time.perf_counter() - begin, cpu_seconds() - cpu


def cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def repeat_files(folder: Path, times: int, scratch: Path) -> Path:
    """Class folders in which every file stands several times, as links."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        for number in range(times):
            target = scratch / path.parent.name / f"{path.stem}-{number}{path.suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path.resolve())
    return scratch


def main(argv: Sequence[str]) -> int:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--images", type=Path, required=True, help="class folders of photographs")
    add("--resolution", type=positive_int, default=256, help="side of the crops in pixels")
    add("--num-workers", type=positive_int, default=preprocessing.count_cores(), help="processes of either")
    add("--copies", type=positive_int, default=3, help="times that each file is used in a run")
    add("--repeats", type=positive_int, default=5, help="runs of each")
    add_debug_argument(parser)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = repeat_files(args.images, args.copies, Path(scratch))
        count = len(open_source(folder))
        results = compare(folder, args)
    report(results, count, args.num_workers)
    print(f"{count} files, {args.resolution} px, {args.num_workers} workers, median of {args.repeats} runs")
    return 0


def compare(folder: Path, args) -> dict[str, list[tuple[float, float]]]:
    packers = {"baseline": pack_baseline, "ours": pack_ours}
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in packers}
    for _ in range(args.repeats):
        for name, pack in packers.items():
            results[name].append(measure(pack, folder, args.resolution, args.num_workers))
    return results


def report(results: dict[str, list[tuple[float, float]]], count: int, num_workers: int) -> None:
    print(f"{'':10}{'images/s/core':>15}{'CPU ms/image':>15}")
    for name, runs in results.items():
        wall, cpu = (statistics.median(values) for values in zip(*runs, strict=True))
        print(f"{name:10}{count / wall / num_workers:15.1f}{1000 * cpu / count:15.2f}")
    pairs = list(zip(results["baseline"], results["ours"], strict=True))
    wall, cpu = (statistics.median(base[k] / ours[k] for base, ours in pairs) for k in (0, 1))
    print(f"{'ratio':10}{wall:15.2f}{cpu:15.2f}")


if __name__ == "__main__":
    sys.exit(run(main))
