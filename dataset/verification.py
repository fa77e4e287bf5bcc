"""Whether packed data are still what was written. Reads every byte once, shared by all processes.

The index, labels and offsets are compared with their checksums at every opening, and so are data that are read into
memory or copied to a local disk. What is read item by item is not: measurements call this first, trainings and caching
with ``--verify``.
"""

from collections.abc import Iterable
from typing import Protocol

from tqdm import tqdm

from dataset.shards import PackedReader
from runtime.processes import Process, on_all_or_none

SHOWN_BYTES = 1 << 30  # what takes longer than a moment to read


class Verifiable(Protocol):
    """What knows the packed files that it reads: images or latents."""

    readers: list[PackedReader]


def verify_on_all(datasets: Iterable[Verifiable | None], process: Process) -> None:
    """:func:`verify`, shared by the processes of a group; at a file that differs all of them end.

    Raises:
        UserError: on every process.
    """
    on_all_or_none(lambda: verify(datasets, process.rank, process.world_size))


def verify(datasets: Iterable[Verifiable | None], rank: int = 0, world_size: int = 1) -> None:
    """Compare data with their checksums; process ``rank`` of ``world_size`` takes its share, rank 0 shows a bar.

    Raises:
        UserError: at the first file that differs.
    """
    readers = [reader for dataset in datasets if dataset is not None for reader in dataset.readers]
    total = sum(reader.total_bytes for reader in readers) // world_size
    with tqdm(total=total, unit="B", unit_scale=True, desc="verifying", disable=rank > 0 or total < SHOWN_BYTES) as bar:
        for reader in readers:
            reader.verify(rank, world_size, bar.update)
