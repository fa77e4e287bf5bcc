"""Time and peak memory of the linear algebra behind FID, KID, Precision and Recall, from features in a file.

    python benchmarks/metrics.py

``--samples`` and ``--reference`` features of ``--dim`` dimensions (float32, rectified, of low rank like Inception's
are) are written to temporary files. Each part then runs in a process of its own, from reading its files to the value:

    FID                 statistics of the samples, batch after batch, and their distance to a reference's
    KID                 100 pairs of subsets of 1000
    precision, recall   k-nearest neighbours of all samples and of all reference vectors, and both ways across

Seconds are those of the clock and of the processors: where the first is more than the second divided by the number of
threads, something else was running. Peak memory is the process's, libraries included (0.3 GB).
"""

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from metrics.frechet import Gaussian, Moments, frechet_distance
from metrics.kid import choose_subset_size, kernel_distance
from metrics.precision_recall import precision_recall
from runtime.cli import ArgumentParser, add_debug_argument, positive_int, run

RANK = 300
CHUNK = 1000


def write_features(path: Path, count: int, dim: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(RANK, dim, generator=torch.Generator().manual_seed(0)) / RANK**0.5
    out = np.lib.format.open_memmap(path, "w+", np.float32, (count, dim))
    for first in range(0, count, CHUNK):
        rows = torch.randn(min(CHUNK, count - first), RANK, generator=generator) @ directions
        noise = torch.randn(rows.shape, generator=generator)
        out[first : first + CHUNK] = (rows + 0.2 * noise + 0.1 * seed).clamp_min(0).numpy()
    out.flush()


def load(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.load(path, allow_pickle=False))


def fid(samples: Path, reference: Path, batch: int = 64) -> float:
    """The reference's statistics are given, as in ADM's .npz."""
    features = np.load(samples, mmap_mode="r", allow_pickle=False)
    moments = Moments(features.shape[1])
    for first in range(0, len(features), batch):
        moments.update(torch.from_numpy(features[first : first + batch].copy()))
    ours = moments.gaussian()
    theirs = Gaussian(ours.mean + 0.01, ours.cov * 1.1 + 0.01 * np.eye(len(ours.mean)))
    return frechet_distance(ours, theirs)


def kid(samples: Path, reference: Path) -> float:
    x, y = load(samples), load(reference)
    return kernel_distance(x, y, subset_size=choose_subset_size(len(x), len(y)))[0]


def both(samples: Path, reference: Path) -> tuple[float, float]:
    return precision_recall(load(samples), load(reference))


PARTS: dict[str, Callable] = {"FID": fid, "KID": kid, "precision, recall": both}


def measure(part: str, threads: int, samples: Path, reference: Path) -> tuple[object, float, float, float]:
    """Value, seconds of the clock, seconds of processors, peak memory in GB."""
    torch.set_num_threads(threads)
    clock, processors = time.perf_counter(), time.process_time()
    value = PARTS[part](samples, reference)
    clock, processors = time.perf_counter() - clock, time.process_time() - processors
    scale = 1 if sys.platform == "darwin" else 1024
    return value, clock, processors, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9


def main(argv: Sequence[str]) -> int:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--samples", type=positive_int, default=50_000, help="vectors")
    add("--reference", type=positive_int, default=10_000, help="vectors")
    add("--dim", type=positive_int, default=2048, help="of a vector")
    add("--threads", type=positive_int, default=torch.get_num_threads(), help="of each part")
    add("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="what is measured")
    add_debug_argument(parser)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        paths = Path(scratch) / "samples.npy", Path(scratch) / "reference.npy"
        write_features(paths[0], args.samples, args.dim, seed=1)
        write_features(paths[1], args.reference, args.dim, seed=2)
        print(
            f"{args.samples} samples, {args.reference} reference vectors, {args.dim} dimensions, {args.threads} threads"
        )
        print(f"{'':20}{'seconds':>10}{'processors':>12}{'peak GB':>10}  value")
        for part in args.parts:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                value, clock, processors, memory = pool.apply(measure, (part, args.threads, *paths))
            print(f"{part:20}{clock:10.1f}{processors:12.1f}{memory:10.2f}  {value}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
