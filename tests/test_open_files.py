"""Datasets of more shards than a process may have files open, and how few files are touched to open a large one."""

import builtins
import io
import multiprocessing
import os
import pickle
import random
import resource
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dataset import open_files
from dataset.open_files import MOST_SHARDS, most_open_shards
from dataset.shards import PackedReader, ShardRecord, ShardSpec, ShardWriter, write_index
from errors import UserError

LIMIT = 64  # descriptors
SHARDS, SIZE = 70, 3
MANY = 24_414  # shards of 4096 of 100 million images
KINDS = {"images": "png", "latents": "raw", "features": "raw"}


def write_set(folder: Path, kind: str, shards: int) -> Path:
    """A packed folder of ``SIZE`` items a shard, each of which says where it is."""
    folder.mkdir()
    spec = ShardSpec(kind, (4,), "int64", KINDS[kind])
    records = []
    for number in range(shards):
        writer = ShardWriter(folder, spec, number)
        writer.create(SIZE)
        with writer:
            sizes = [writer.put(slot, expected_item(kind, number * SIZE + slot)) for slot in range(SIZE)]
        records.append(writer.finish(sizes, labels=[0] * SIZE))
    write_index(folder, spec, records, ["a"], {})
    return folder


def expected_item(kind: str, item: int) -> np.ndarray:
    return np.array([item, 1, 2, len(kind)], np.int64)


def read_item(reader: PackedReader, item: int) -> np.ndarray:
    if reader.spec.codec == "png":
        return np.frombuffer(reader.read_bytes(item), np.int64)
    out = np.empty(4, np.int64)
    reader.read_into(item, out)
    return out


def check_items(readers: list[PackedReader], seed: int) -> int:
    """Read all items of all readers in a random order; how many were right."""
    places = [(reader, item) for reader in readers for item in range(len(reader))]
    random.Random(seed).shuffle(places)
    return sum(
        np.array_equal(read_item(reader, item), expected_item(reader.spec.kind, item)) for reader, item in places
    )


def read_under_limit(root: Path) -> None:
    """In a process of its own: the hard limit is lowered, so nothing can raise it again."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (LIMIT, LIMIT))
    readers = [PackedReader(root / kind, kind) for kind in KINDS]
    with ThreadPoolExecutor(6) as pool:
        right = list(pool.map(lambda seed: check_items(readers, seed), range(12)))
    assert right == [len(KINDS) * SHARDS * SIZE] * 12
    assert most_open_shards() == LIMIT // 2
    assert len(os.listdir("/proc/self/fd")) > LIMIT // 2  # what fits stays open


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    for kind in KINDS:
        write_set(root / kind, kind, SHARDS)
    return root


@pytest.fixture
def bound(monkeypatch):
    """Sets how many shards may be open, of the readers of this test alone."""
    monkeypatch.setattr(open_files, "_queue", deque())
    return lambda count: monkeypatch.setattr(open_files, "most_open_shards", lambda: count)


def test_three_readers_and_six_threads_under_a_limit_of_a_third_of_their_shards(root):
    process = multiprocessing.get_context("spawn").Process(target=read_under_limit, args=(root,))
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize(
    ("soft", "hard", "raised", "shards"),
    [
        (64, 64, None, 32),
        (256, 256, None, 128),
        (1024, 1024, None, 512),
        (1024, 4096, 4096, 3584),
        (1024, 1_048_576, MOST_SHARDS + 512, MOST_SHARDS),
        (1024, resource.RLIM_INFINITY, MOST_SHARDS + 512, MOST_SHARDS),
        (65_536, 1_048_576, None, MOST_SHARDS),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None, MOST_SHARDS),
    ],
)
def test_the_bound_follows_the_limits(monkeypatch, soft, hard, raised, shards):
    calls = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: calls.append(limits))
    assert most_open_shards.__wrapped__() == shards
    assert calls == ([] if raised is None else [(raised, hard)])


def test_a_limit_that_cannot_be_raised_is_kept_to(monkeypatch):
    def refuse(which, limits):
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert most_open_shards.__wrapped__() == 128


def test_a_shard_is_not_closed_while_it_is_read(root, bound):
    bound(1)
    reader = PackedReader(root / "latents", "latents")
    file = reader._open(0)
    read_item(reader, SIZE)  # of the next shard, which takes the only place
    assert reader._shards.get(0) is None
    data = os.pread(file.descriptor, 32, file.start)
    np.testing.assert_array_equal(np.frombuffer(data, np.int64), expected_item("latents", 0))
    descriptor = file.descriptor
    del file
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_what_was_read_lately_stays_open(root, bound):
    bound(2)
    readers = [PackedReader(root / kind, kind) for kind in ("latents", "images")]
    read_item(readers[0], 0)
    read_item(readers[1], 0)
    read_item(readers[0], 1)  # the first once more
    read_item(readers[0], SIZE)
    assert [reader._shards.get(0) is not None for reader in readers] == [True, False]


def test_a_reader_that_is_gone_has_closed_its_shards_and_left_its_places(root, bound):
    bound(SHARDS)
    before = len(os.listdir("/proc/self/fd"))
    for kind in KINDS:
        reader = PackedReader(root / kind, kind)
        assert check_items([reader], 0) == SHARDS * SIZE
        assert len(os.listdir("/proc/self/fd")) == before + SHARDS
        del reader
        assert len(os.listdir("/proc/self/fd")) == before


def test_reading_everything_at_once_leaves_nothing_open(root):
    before = len(os.listdir("/proc/self/fd"))
    reader, out = PackedReader(root / "latents", "latents"), np.empty((SHARDS * SIZE, 4), np.int64)
    reader.read_all(out)
    assert len(os.listdir("/proc/self/fd")) == before
    np.testing.assert_array_equal(out[:, 0], np.arange(SHARDS * SIZE))


def test_forked_and_pickled_readers_read_on_while_threads_read(root, bound):
    bound(20)
    readers = [PackedReader(root / kind, kind) for kind in KINDS]
    expected, stopped = len(KINDS) * SHARDS * SIZE, threading.Event()

    def read() -> None:
        while not stopped.is_set():
            assert check_items(readers, 0) == expected

    with ThreadPoolExecutor(2) as threads:
        reading = [threads.submit(read) for _ in range(2)]
        try:
            with multiprocessing.get_context("fork").Pool(3, initializer=_FORKED.extend, initargs=(readers,)) as pool:
                assert pool.map(_check_forked, range(6)) == [expected] * 6
            assert check_items(pickle.loads(pickle.dumps(readers)), 1) == expected  # noqa: S301
        finally:
            stopped.set()
        for future in reading:
            future.result()


def test_a_process_forked_while_the_lock_is_held(root):
    readers = [PackedReader(root / kind, kind) for kind in KINDS]
    expected = check_items(readers, 0)
    process = multiprocessing.get_context("fork").Process(target=_must_check, args=(readers, 0, expected))
    with open_files._lock:
        process.start()
    process.join(60)
    try:
        assert process.exitcode == 0  # None where it still waits
    finally:
        process.kill()


_FORKED: list[PackedReader] = []  # of a forked process, inherited and not pickled


def _must_check(readers: list[PackedReader], seed: int, expected: int) -> None:
    assert check_items(readers, seed) == expected


def _check_forked(seed: int) -> int:
    return check_items(_FORKED, seed)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A set of very many shards, of which only the first holds anything: the others have lost their bytes."""
    folder = write_set(tmp_path_factory.mktemp("large") / "set", "latents", 1)
    spec = ShardSpec("latents", (4,), "int64")
    (record,) = PackedReader(folder, "latents").index["shards"]
    (file,) = record["files"].values()

    records = [ShardRecord(SIZE, {spec.file_name(number): file}, [0] * SIZE) for number in range(MANY)]
    write_index(folder, spec, records, ["a"], {})
    for number in range(1, MANY):
        (folder / spec.file_name(number)).touch()
    return folder


def test_few_files_are_touched_to_open_a_set_of_100_million_images(large, monkeypatch):
    calls = []

    def counted(name: str, call):
        return lambda *args, **options: (calls.append(name), call(*args, **options))[1]

    with monkeypatch.context() as patch:
        for module, name in ((os, "stat"), (os, "lstat"), (os, "open"), (io, "open"), (builtins, "open")):
            patch.setattr(module, name, counted(name, getattr(module, name)))
        reader = PackedReader(large, "latents")
    assert len(reader) == MANY * SIZE
    assert 0 < len(calls) < 10, calls


def test_the_shards_of_a_large_set_are_measured_when_they_are_opened(large):
    reader = PackedReader(large, "latents")
    np.testing.assert_array_equal(read_item(reader, 1), expected_item("latents", 1))
    with pytest.raises(UserError, match=r"latents-00001\.npy has 0 bytes instead of \d+; run the command that made it"):
        read_item(reader, SIZE)


def test_a_missing_shard_of_a_large_set_is_named_at_once(large):
    path = large / "latents-20000.npy"
    path.unlink()
    try:
        with pytest.raises(UserError, match=r"latents-20000\.npy is missing; run the command that made it"):
            PackedReader(large, "latents")
    finally:
        path.touch()


def test_a_shard_that_went_missing_later_is_named(large):
    reader, path = PackedReader(large, "latents"), large / "latents-20000.npy"
    path.unlink()
    try:
        with pytest.raises(UserError, match=r"latents-20000\.npy is missing"):
            read_item(reader, 20_000 * SIZE)
    finally:
        path.touch()
