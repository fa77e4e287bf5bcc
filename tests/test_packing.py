"""A packed folder made by independent processes: who writes what, and who finishes."""

import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest

from dataset import packing
from dataset.packing import PackingJob, given_back_if_refused
from dataset.shards import PackedReader, ShardSpec
from errors import UserError
from runtime.processes import this_process

SPEC = ShardSpec("latents", (2, 3), "float32")
SHARDS, SIZE = 7, 4


def job(folder: Path, **settings) -> PackingJob:
    return PackingJob(folder, SPEC, {"seed": 1} | settings)


def make(folder: Path, shards) -> bool:
    """One process: its shards, then the end."""
    work = job(folder)
    if work.begin():
        return True
    for number in work.missing(shards):
        with work.shard(number) as writer:
            if writer is not None:
                write(writer)
    return work.finish(SHARDS, ["a"])


def write(writer) -> None:
    writer.create(SIZE)
    with writer:
        sizes = [writer.put(slot, np.full((2, 3), writer.number * SIZE + slot, np.float32)) for slot in range(SIZE)]
    writer.finish(sizes, [0] * SIZE)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "alone"
    assert make(folder, range(SHARDS))
    return folder


def test_alone(expected):
    assert sorted(content(expected)) == sorted(
        [".lock", "index.json", "labels.npy", "rejected.csv", *(SPEC.file_name(number) for number in range(SHARDS))]
    )
    reader, out = PackedReader(expected, "latents"), np.empty((2, 3), np.float32)
    for item in range(SHARDS * SIZE):
        reader.read_into(item, out)
        assert (out == item).all()


def test_processes_that_end_at_the_same_time(expected, tmp_path):
    context = multiprocessing.get_context("fork")
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        with context.Pool(3) as pool:
            done = pool.starmap(make, [(folder, range(rank, SHARDS, 3)) for rank in range(3)])
        assert True in done  # whoever came last, and whoever looked later
        assert content(folder) == content(expected)


def test_processes_that_want_the_same_shards(expected, tmp_path):
    with multiprocessing.get_context("fork").Pool(3) as pool:
        pool.starmap(make, [(tmp_path / "out", range(SHARDS))] * 3)
    assert content(tmp_path / "out") == content(expected)


def test_died_between_the_last_shard_and_the_index(expected, tmp_path):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(packing, "write_index", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        make(tmp_path / "out", range(SHARDS))
    assert not (tmp_path / "out" / "index.json").exists()
    assert make(tmp_path / "out", range(0))
    assert content(tmp_path / "out") == content(expected)


def test_died_while_tidying_up(expected, tmp_path):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(packing, "remove_leftovers", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        make(tmp_path / "out", range(SHARDS))
    assert make(tmp_path / "out", range(SHARDS))
    assert content(tmp_path / "out") == content(expected)


def test_a_shard_that_another_process_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "LOCK_SECONDS", 0.1)
    first, second = job(tmp_path), job(tmp_path)
    assert not first.begin() and not second.begin()
    with first.shard(3), pytest.raises(UserError, match=r"another process is writing .*latents-00003\.npy"):
        second.shard(3).__enter__()
    with second.shard(3) as writer:
        assert writer is not None


def test_a_shard_that_was_finished_in_the_meantime(tmp_path):
    late = job(tmp_path)
    assert not late.begin()
    make(tmp_path, range(SHARDS))
    before = content(tmp_path)
    with late.shard(3) as writer:
        assert writer is None
    assert late.missing(range(SHARDS)) == [] and content(tmp_path) == before


def test_finish_waits_for_nobody(tmp_path):
    begin = time.monotonic()
    assert not make(tmp_path, range(0, SHARDS, 2))
    assert time.monotonic() - begin < 5
    assert job(tmp_path).missing(range(SHARDS)) == [1, 3, 5]


def test_other_settings_are_refused_before_and_after_the_end(expected, tmp_path):
    make(tmp_path, [0])
    for folder in (tmp_path, expected):
        with pytest.raises(UserError, match=r"another --seed \(seed: 1, now 2\)"):
            job(folder, seed=2).begin()


def test_processes_are_read_from_the_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    alone = this_process()
    assert (alone.rank, alone.world_size, alone.is_main, list(alone.share(3))) == (0, 1, True, [0, 1, 2])
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match="RANK=1"):
        this_process()
    monkeypatch.setenv("WORLD_SIZE", "3")
    second = this_process()
    assert (second.world_size, second.is_main, list(second.share(8))) == (3, False, [1, 4, 7])
    monkeypatch.setenv("WORLD_SIZE", "three")
    with pytest.raises(UserError, match="WORLD_SIZE=three"):
        this_process()


def test_a_refused_command_gives_its_folder_back(tmp_path):
    """So that its advice, another setting, is not refused in turn; what was made is kept."""
    folder = tmp_path / "new" / "cache"
    first, second = job(folder), job(folder, dtype="float16")
    with pytest.raises(UserError, match="take less"), given_back_if_refused(first):
        first.begin()
        with first.shard(0) as writer:
            writer.create(SIZE)
            raise UserError("take less")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="later"), given_back_if_refused(second):
        assert not second.begin()
        with second.shard(0) as writer:
            write(writer)
        raise UserError("later")
    # the shard stays, and with it what it was made with
    with pytest.raises(UserError, match="begun with another"):
        job(folder, dtype="float32").begin()


def test_a_folder_of_others_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"holds other files \(thesis.tex\)"):
        job(tmp_path).begin()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
