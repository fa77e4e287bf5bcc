"""Photographs → packed image dataset: decoded once, centre-cropped as ADM does, in a few large files that read fast.

Takes class folders (ImageNet's layout; images may lie deeper in them), a folder with a dataset.json, a .zip of either,
or a folder of Hugging Face .parquet files. A run that was stopped continues when the same command is run again, and
ends with the same bytes. Files that are left out or cannot be used are listed, with the reason, in rejected.csv.
"""

import argparse
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dataset.layouts import open_source
from dataset.packing import PackingJob, check_space, given_back_if_refused, images_per_shard, sigterm_as_interrupt
from dataset.shards import (
    PackedReader,
    ShardRecord,
    ShardSpec,
    ShardWriter,
    read_records,
    write_index,
    write_rejected,
)
from dataset.sources import Source
from dataset.transforms import DEFAULT_MAX_PIXELS, BadImageError, encode_png, load_image
from dataset.trees import describe_left_out
from errors import UserError
from runtime.cli import ArgumentParser, add_debug_argument, positive_int, run

MAX_REJECTED = 0.01  # share of the files above which --allow-rejected is needed
PNG_RATIO = 0.65  # of the raw size: photographs at 256 px give 0.62
CHUNK_FILES = 32
FLAGS = {"kind": "--imagenet-path", "fingerprint": "--imagenet-path", "files": "--max-images"}  # of settings
DEFAULTS = {"exif_rotate": False}  # of settings that an older dataset was packed without

EXAMPLES = """examples:
  # ImageNet at 256 px: 252 GB, or about 0.6 of that (slower to read) with --codec png
  python preprocessing.py --imagenet-path /data/ILSVRC2012/train --output-path data/imagenet256 --resolution 256

  # what would it take? writes nothing
  python preprocessing.py --imagenet-path /data/ILSVRC2012/train --output-path data/imagenet256 --dry-run

  # a small set for a laptop, from a zip
  python preprocessing.py --imagenet-path train.zip --output-path data/small --resolution 64 --max-images 5000
"""


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="preprocessing.py", description=__doc__, epilog=EXAMPLES)
    add = parser.add_argument
    add("--imagenet-path", type=Path, required=True, help="photographs: a folder or .zip, see above")
    add("--output-path", type=Path, default=Path("data"), help="folder of the packed dataset; made where it is missing")
    add("--resolution", type=multiple_of_32, default=256, help="side of the square crops in pixels, a multiple of 32")
    add("--num-workers", type=positive_int, default=count_cores(), help="processes; the result does not depend on it")
    add("--max-images", type=positive_int, help="use this many files, evenly spread over the classes; default: all")
    add("--codec", choices=("raw", "png"), default="raw", help="raw: fastest to read; png: lossless, smaller")
    add("--allow-rejected", action="store_true", help="accept that more than 1 %% of the files cannot be used")
    add("--max-pixels", type=positive_int, default=DEFAULT_MAX_PIXELS, help="reject files with more pixels than this")
    add("--shard-size", type=positive_int, help="source files in a shard; default: as many as make about 800 MB raw")
    add(
        "--exif-rotate",
        action="store_true",
        help="turn photographs upright as the camera noted (EXIF); not for ImageNet",
    )
    add("--dry-run", action="store_true", help="try two files, print sizes and time needed, write nothing")
    add_debug_argument(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    args = parse_args(argv)
    check_paths(args.imagenet_path, args.output_path)
    source = open_source(args.imagenet_path)
    items = select(len(source), args.max_images)
    spec = ShardSpec("images", (3, args.resolution, args.resolution), "uint8", args.codec)
    shard_size = args.shard_size or images_per_shard(args.resolution)
    kind = f"{source.kind}, {source.note}" if source.note else source.kind
    print(f"{len(items)} of {len(source)} images in {len(source.classes)} classes ({kind})")
    print("\n".join(describe_left_out(source.left_out)), end="\n" if source.left_out else "")
    if args.dry_run:
        return dry_run(source, items, spec, args)

    settings = describe(source, len(items), spec, args, shard_size)
    folder = args.output_path
    packing = PackingJob(folder, spec, settings, flags=FLAGS, defaults=DEFAULTS)
    packing.refuse_strangers()
    with packing.lock(), given_back_if_refused(packing), sigterm_as_interrupt():
        if packing.is_complete():
            print(f"{folder} is complete already: {len(PackedReader(folder))} images")
            return 0
        packing.claim()
        check_left_out(source, args.allow_rejected)
        for leftover in folder.glob("*.tmp"):  # they take space, and nobody else is at work here
            leftover.unlink()
        jobs = [
            ShardJob(number, items[first : first + shard_size])
            for number, first in enumerate(range(0, len(items), shard_size))
        ]
        records = read_records(folder, spec)
        to_do = [job for job in jobs if job.number not in records]
        needed = bytes_needed(spec, sum(len(job.items) for job in to_do))
        advice = "take --codec png, fewer --max-images or a smaller --resolution"
        check_space(folder, needed, advice, approximate=spec.codec != "raw")
        packer = Packer(folder, spec, source, args.max_pixels, args.exif_rotate)
        records.update(packer.run(to_do, args.num_workers))
        finish(packing, [records[job.number] for job in jobs], source, args.allow_rejected)
    return 0


def multiple_of_32(text: str) -> int:
    """An argparse type: a positive multiple of 32, the largest downsampling factor of the autoencoders."""
    value = positive_int(text)
    if value % 32:
        raise argparse.ArgumentTypeError(
            f"must be a multiple of 32, got {text}; the nearest is {max(32, round(value / 32) * 32)}"
        )
    return value


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def select(length: int, wanted: int | None) -> np.ndarray:
    """Numbers of the source's images to use, evenly spread over its order and so over its classes."""
    count = min(length, wanted or length)
    return np.arange(count, dtype=np.int64) * length // count


def describe(source: Source, count: int, spec: ShardSpec, args: argparse.Namespace, shard_size: int) -> dict:
    """All that the bytes of the dataset depend on; goes into the index, and another run must agree with it."""
    return {
        "kind": source.kind,
        "fingerprint": source.fingerprint(),
        "files": count,
        "resolution": spec.shape[-1],
        "codec": spec.codec,
        "max_images": args.max_images,
        "max_pixels": args.max_pixels,
        "shard_size": shard_size,
        "exif_rotate": args.exif_rotate,
    }


def check_left_out(source: Source, allow_rejected: bool) -> None:
    """Refuse, before hours of work, a source of whose images too many are not taken."""
    lost = [entry for entry in source.left_out if entry.is_image]
    total = len(source) + len(lost)
    if len(lost) > MAX_REJECTED * total and not allow_rejected:
        raise UserError(
            f"{len(lost)} of {total} images ({100 * len(lost) / total:.1f} %) in {source.path} are left out, the first "
            f"is {lost[0].name} ({lost[0].reason}); mend it, or run again with --allow-rejected"
        )


def check_paths(photographs: Path, output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"--output-path {output} is a file; give a folder")
    if photographs.resolve() in (output.resolve(), *output.resolve().parents):
        raise UserError(f"--output-path {output} lies in --imagenet-path {photographs}; write the dataset elsewhere")


def bytes_needed(spec: ShardSpec, count: int) -> int:
    return int(spec.item_bytes * count * (1 if spec.codec == "raw" else PNG_RATIO))


def dry_run(source: Source, items: np.ndarray, spec: ShardSpec, args: argparse.Namespace) -> int:
    """Process the first and the last file and say what the whole would take."""
    begin = time.perf_counter()
    for item in (items[0], items[-1]):
        data, reason = decode(source, int(item), spec, args.max_pixels, args.exif_rotate)
        print(f"{source.names[item]}: {reason or f'{memoryview(data).nbytes} bytes'}")
    seconds = (time.perf_counter() - begin) / 2 * len(items) / args.num_workers
    print(f"{bytes_needed(spec, len(items))} bytes at {args.resolution} px, {args.codec}")
    print(f"about {seconds:.0f} seconds with {args.num_workers} workers; nothing was written")
    return 0


def finish(packing: PackingJob, records: list[ShardRecord], source: Source, allow_rejected: bool) -> None:
    """Write labels, rejected.csv and the index; without --allow-rejected only if few enough files were rejected."""
    folder, settings = packing.folder, packing.settings
    write_rejected(folder, records, source.left_out)
    rejected, total = sum(len(record.rejected) for record in records), settings["files"]
    if rejected == total:
        raise UserError(f"none of the {total} files can be used; {folder / 'rejected.csv'} says why")
    if rejected > MAX_REJECTED * total and not allow_rejected:
        raise UserError(
            f"{rejected} of {total} files ({100 * rejected / total:.1f} %) cannot be used, see "
            f"{folder / 'rejected.csv'}; mend them and start in an empty folder, or run again with --allow-rejected, "
            "which only has to finish"
        )
    write_index(folder, packing.spec, records, source.classes, settings, source.left_out)
    packing.is_complete()  # tidies up
    left_out = f", {len(source.left_out)} left out" if source.left_out else ""
    listed = f"; {folder / 'rejected.csv'} lists them" if rejected or left_out else ""
    print(f"{folder}: {total - rejected} images, {rejected} rejected{left_out}{listed}")


@dataclass
class ShardJob:
    """A shard to be made: the numbers of its source files, and what became of each (bytes, or why it was rejected)."""

    number: int
    items: np.ndarray
    results: dict[int, int | str] = field(default_factory=dict)

    @property
    def is_settled(self) -> bool:
        return len(self.results) == len(self.items)


class Packer:
    """Makes shards in worker processes, each of which writes its images into the shard files itself.

    No pixel passes through this process: it hands out chunks of file numbers, and gets back sizes and reasons.
    """

    def __init__(self, folder: Path, spec: ShardSpec, source: Source, max_pixels: int, exif_rotate: bool) -> None:
        self._folder = folder
        self._spec = spec
        self._source = source
        self._decoding = max_pixels, exif_rotate

    def run(self, jobs: list[ShardJob], num_workers: int) -> dict[int, ShardRecord]:
        """Make the shards of all jobs and return their records by number."""
        total = sum(len(job.items) for job in jobs)
        if not total:
            return {}
        # Forking shares a million file names instead of pickling them for each worker; macOS cannot fork safely.
        context = get_context("fork" if sys.platform == "linux" else "spawn")
        initial = (os.getpid(), self._folder, self._spec, self._source, *self._decoding)
        pool = ProcessPoolExecutor(num_workers, context, _start_worker, initial)
        try:
            pool.submit(os.getpid).result()  # forks all workers, while there is no other thread
            with tqdm(total=total, unit="img", desc="preprocessing", smoothing=0.1) as progress:
                return self._drive(pool, jobs, self._chunks(jobs, total, num_workers), 2 * num_workers + 2, progress)
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed (out of memory?); run the same command again with fewer --num-workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for job in jobs:  # what is not finished is begun anew; and a full disk has room again
                ShardWriter(self._folder, self._spec, job.number).discard()

    def _drive(
        self, pool: ProcessPoolExecutor, jobs: list[ShardJob], chunks: Iterator, most_pending: int, progress: tqdm
    ) -> dict[int, ShardRecord]:
        records: dict[int, ShardRecord] = {}
        packing: dict[Future, tuple[ShardJob, int]] = {}
        finishing: dict[Future, ShardJob] = {}
        rejected = 0
        while len(records) < len(jobs):
            while len(packing) < most_pending and (chunk := next(chunks, None)):
                job, first, items = chunk
                packing[pool.submit(_pack_chunk, job.number, first, items)] = job, first
            done, _ = wait([*packing, *finishing], return_when=FIRST_COMPLETED)
            for future in done:
                if future in finishing:
                    records[finishing.pop(future).number] = future.result()
                    continue
                job, first = packing.pop(future)
                results = future.result()
                job.results.update(enumerate(results, start=first))
                rejected += sum(isinstance(result, str) for result in results)
                progress.set_postfix(rejected=rejected, refresh=False)
                progress.update(len(results))
                if job.is_settled:
                    finishing[self._submit_finish(pool, job)] = job
        return records

    def _chunks(self, jobs: list[ShardJob], total: int, num_workers: int) -> Iterator[tuple[ShardJob, int, np.ndarray]]:
        """What one task packs: a job, the first slot, the file numbers. Makes each file before its first chunk."""
        size = max(1, min(CHUNK_FILES, total // (4 * num_workers)))
        for job in jobs:
            ShardWriter(self._folder, self._spec, job.number).create(len(job.items))
            for first in range(0, len(job.items), size):
                yield job, first, job.items[first : first + size]

    def _submit_finish(self, pool: ProcessPoolExecutor, job: ShardJob) -> Future:
        results = [job.results[slot] for slot in range(len(job.items))]
        sizes = [None if isinstance(result, str) else result for result in results]
        labels = [
            int(self._source.labels[item]) for item, size in zip(job.items, sizes, strict=True) if size is not None
        ]
        rejected = [
            (self._source.names[item], result)
            for item, result in zip(job.items, results, strict=True)
            if isinstance(result, str)
        ]
        job.results.clear()
        return pool.submit(_finish_shard, job.number, sizes, labels, rejected)


_worker: tuple[Path, ShardSpec, Source, int, bool]


def _start_worker(
    parent: int, folder: Path, spec: ShardSpec, source: Source, max_pixels: int, exif_rotate: bool
) -> None:
    global _worker
    _worker = folder, spec, source, max_pixels, exif_rotate
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # the parent gets them too, and stops in order
        signal.signal(number, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # Pillow's remarks on metadata would tear the progress bar
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()


def _exit_with(parent: int) -> None:
    """End this worker when the run was killed: it must not write into the folder alongside the next run."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _pack_chunk(number: int, first: int, items: Sequence[int]) -> list[int | str]:
    """Decode files into neighbouring slots of a shard; returns the bytes of each, or why it was rejected."""
    folder, spec, source, max_pixels, exif_rotate = _worker
    results: list[int | str] = []
    with ShardWriter(folder, spec, number) as shard:
        for slot, item in enumerate(items, start=first):
            data, reason = decode(source, int(item), spec, max_pixels, exif_rotate)
            results.append(reason or shard.put(slot, data))
    return results


def _finish_shard(
    number: int, sizes: list[int | None], labels: list[int], rejected: list[tuple[str, str]]
) -> ShardRecord:
    folder, spec, *_ = _worker
    return ShardWriter(folder, spec, number).finish(sizes, labels, rejected)


def decode(
    source: Source, item: int, spec: ShardSpec, max_pixels: int, exif_rotate: bool
) -> tuple[bytes | np.ndarray | None, str]:
    """What to write for a file, or None and the reason why it cannot be used."""
    try:
        pixels = load_image(source.read(item), spec.shape[-1], max_pixels, exif_rotate)
    except BadImageError as error:
        return None, str(error)
    except OSError as error:
        return None, f"cannot be read: {error.strerror or error}"
    return (encode_png(pixels) if spec.codec == "png" else pixels), ""


if __name__ == "__main__":
    sys.exit(run(main))
