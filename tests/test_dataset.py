import os
import pickle
import shutil
import threading
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import preprocessing
from dataset import loader as loader_module
from dataset import order as order_module
from dataset.images import open_images
from dataset.loader import BatchLoader, LabelledImages, sequential_batches, stage_dataset
from dataset.order import SampleOrder, flip_mask, permuted
from dataset.shards import PackedReader, ShardSpec, ShardWriter, read_records, write_index
from errors import UserError
from tests.photographs import write_class_folders


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_class_folders(tmp_path_factory.mktemp("photographs") / "tree")


@pytest.fixture(scope="module")
def packed(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "set"
    argv = ["--imagenet-path", str(tree), "--output-path", str(folder), "--resolution", "32", "--shard-size", "10"]
    preprocessing.main([*argv, "--num-workers", "1"])
    return folder


def all_pixels(images) -> np.ndarray:
    pixels = np.empty((len(images), 3, images.resolution, images.resolution), np.uint8)
    images.read_into(range(len(images)), pixels)
    return pixels


class TestImages:
    def test_packed_and_on_the_fly_are_the_same(self, tree, packed):
        stored, live = open_images(packed), open_images(tree, 32)
        np.testing.assert_array_equal(all_pixels(stored), all_pixels(live))
        np.testing.assert_array_equal(stored.labels, live.labels)
        assert stored.class_names == live.class_names
        assert (stored.name(11), live.name(12)) == ("images-00001.npy[1]", "n02/000.jpg")

    def test_many_threads_read_what_one_does(self, packed):
        images = open_images(packed)
        expected, results = all_pixels(images), {}
        threads = [
            threading.Thread(target=lambda number=number: results.update({number: all_pixels(images)}))
            for number in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all((results[number] == expected).all() for number in range(8))

    def test_pickled_datasets_read_on(self, tree, packed):
        for images in (open_images(packed), open_images(tree, 32)):
            expected = all_pixels(images)
            np.testing.assert_array_equal(all_pixels(pickle.loads(pickle.dumps(images))), expected)  # noqa: S301

    def test_fingerprints(self, tree, packed):
        assert open_images(packed).fingerprint() == open_images(packed).fingerprint()
        prints = {open_images(packed).fingerprint(), *(open_images(tree, size).fingerprint() for size in (32, 64))}
        assert len(prints) == 3

    def test_wrong_resolution_names_both(self, packed):
        assert open_images(packed, 32).resolution == 32
        with pytest.raises(UserError, match=r"32 px.*64 px"):
            open_images(packed, 64)

    @pytest.mark.parametrize(
        ("change", "message"), [(lambda p: p.unlink(), "missing"), (lambda p: os.truncate(p, 999), "999 bytes")]
    )
    def test_lost_shards_are_named(self, packed, tmp_path, change, message):
        copy = stage_dataset(packed, tmp_path)
        change(copy / "images-00002.npy")
        with pytest.raises(UserError, match=rf"images-00002\.npy.*{message}.*preprocessing"):
            open_images(copy)

    def test_verify_finds_a_flipped_bit(self, packed, tmp_path):
        copy = stage_dataset(packed, tmp_path)
        data = bytearray((copy / "images-00001.npy").read_bytes())
        data[-1] ^= 1
        (copy / "images-00001.npy").write_bytes(data)
        with pytest.raises(UserError, match=r"images-00001\.npy is damaged"):
            PackedReader(copy).verify()

    def test_unfinished_empty_and_missing(self, tmp_path, packed):
        (tmp_path / "images-00000.npy.tmp").write_bytes(b"")
        with pytest.raises(UserError, match="not finished"):
            open_images(tmp_path)
        with pytest.raises(UserError, match="does not exist"):
            open_images(tmp_path / "nothing", 32)
        with pytest.raises(UserError, match="holds packed images, not latents"):
            PackedReader(packed, kind="latents")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_latent_shards(tmp_path, dtype):
    spec = ShardSpec("latents", (8, 4, 4), dtype)
    latents = np.random.default_rng(0).normal(size=(10, 8, 4, 4)).astype(dtype)
    records = []
    for number in range(2):
        writer = ShardWriter(tmp_path, spec, number)
        writer.create(5)
        with writer:
            sizes = [writer.put(slot, latents[5 * number + slot]) for slot in range(5)]
        records.append(writer.finish(sizes, labels=range(5)))
    assert read_records(tmp_path, spec) == dict(enumerate(records))
    write_index(tmp_path, spec, records, ["a"] * 5, {"vae": "checksum"})
    reader = PackedReader(tmp_path, kind="latents")
    out = np.empty((8, 4, 4), dtype)
    for item in reversed(range(10)):
        reader.read_into(item, out)
        np.testing.assert_array_equal(out, latents[item])
    np.testing.assert_array_equal(np.load(tmp_path / "latents-00001.npy"), latents[5:])
    with pytest.raises(ValueError, match="contiguous"):
        reader.read_into(0, np.empty((8, 4, 5), dtype))


class TestOrder:
    @pytest.fixture(params=["held", "computed"])
    def most_held(self, request, monkeypatch):
        """Both ways to an order, at sizes at which one would be held."""
        if request.param == "computed":
            monkeypatch.setattr(order_module, "MOST_HELD", 0)

    @pytest.mark.usefixtures("most_held")
    @pytest.mark.parametrize("shuffle", ["full", "window", "none"])
    def test_each_item_once_an_epoch_and_nothing_dropped(self, shuffle):
        order = SampleOrder(1003, seed=3, shuffle=shuffle, window=128, block=16)
        stream = np.concatenate([order.indices(64 * batch, 64) for batch in range(48)])[: 3 * 1003]
        epochs = stream.reshape(3, 1003)
        for epoch in epochs:
            np.testing.assert_array_equal(np.sort(epoch), np.arange(1003))
        assert (epochs[0] == epochs[1]).all() == (shuffle == "none")

    @pytest.mark.usefixtures("most_held")
    @pytest.mark.parametrize("shuffle", ["full", "window"])
    def test_any_access_gives_the_same(self, shuffle):
        forward, jumping = (SampleOrder(500, 7, shuffle, window=64, block=8) for _ in range(2))
        stream = forward.indices(0, 5000)
        assert stream.dtype == np.int64
        for start in (4900, 0, 2499, 450, 3333):
            np.testing.assert_array_equal(jumping.indices(start, 60), stream[start : start + 60][:60])
        assert (SampleOrder(500, 8, shuffle).indices(0, 500) != stream[:500]).any()

    def test_a_batch_larger_than_the_dataset(self):
        np.testing.assert_array_equal(np.bincount(SampleOrder(3, 0).indices(0, 12)), [4, 4, 4])

    def test_numbers(self):
        """Pinned: another numpy or another version of this code must not change the order of a running experiment."""
        assert SampleOrder(10, 0).indices(0, 12).tolist() == ORDER
        assert np.flatnonzero(flip_mask(0, 0, np.arange(16))).tolist() == FLIPS

        assert permuted(np.arange(10), 10, 0, 0).tolist() == COMPUTED
        assert permuted(np.arange(3), 10**8, 0, 5).tolist() == COMPUTED_OF_MANY
        assert order_module.MOST_HELD == 2**24  # above it, the computed ones are used

    @pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 100, 1024, 1025, 65_537, 300_007])
    def test_computed_permutations_are_permutations(self, length):
        for seed, epoch in ((0, 0), (0, 1), (2**40, 0)):
            items = permuted(np.arange(length), length, seed, epoch)
            np.testing.assert_array_equal(np.sort(items), np.arange(length))

    def test_computed_permutations_look_random(self):
        """χ² of 63 and of 225 degrees of freedom within 4.5 standard deviations, correlations within 4.5 / √N."""
        count, buckets = 1_000_003, 64
        first, *others = (permuted(np.arange(count), count, *key) for key in ((0, 0), (0, 1), (1, 0)))
        part = count // 16
        for start in range(0, count - part, 3 * part):
            for number in (first[start : start + part] * buckets // count, first[start : start + part] % buckets):
                # drawn without replacement, counts vary less by the share that is left
                square = chi_square(np.bincount(number, minlength=buckets)) * (count - 1) / (count - part)
                assert abs(square - 63) < 4.5 * (2 * 63) ** 0.5
        pairs = np.bincount(16 * (first[:-1] * 16 // count) + first[1:] * 16 // count, minlength=256)
        assert abs(chi_square(pairs) - 225) < 4.5 * (2 * 225) ** 0.5
        for lag in (1, 2, 3, 8, 4096):
            assert abs(np.corrcoef(first[:-lag], first[lag:])[0, 1]) < 4.5 / count**0.5
        for other in (np.arange(count), *others):
            assert abs(np.corrcoef(first, other)[0, 1]) < 4.5 / count**0.5
            assert (first == other).sum() < 8  # one is expected

    @pytest.mark.parametrize("shuffle", ["full", "window", "none"])
    def test_the_order_of_many_items_is_not_stored(self, shuffle):
        """8 GB of numbers of 1,000 million items; computed as they are asked for, far less than 100 MB."""
        order = SampleOrder(10**9, 0, shuffle)
        tracemalloc.start()
        items = np.concatenate([order.indices(start, 1000) for start in (0, 10**9 - 500, 5 * 10**9)])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1e8
        assert items.min() >= 0 and items.max() < 10**9
        assert len(np.unique(items[:1000])) == 1000

    @pytest.mark.usefixtures("most_held")
    def test_windows_stay_within_their_blocks(self):
        order = SampleOrder(4096, 0, "window", window=256, block=32)
        for first in range(0, 4096, 256):
            blocks = np.unique(order.indices(first, 256) // 32)
            assert len(blocks) == 8
        shuffled = order.indices(0, 256)
        assert (np.diff(shuffled) != 1).mean() > 0.9

    def test_flips_are_fair_and_follow_the_item(self):
        items = np.arange(100_000)
        masks = [flip_mask(seed, epoch, items) for seed in (0, 1) for epoch in (0, 1)]
        for number, mask in enumerate(masks):
            assert abs(mask.mean() - 0.5) < 0.01
            for other in masks[:number]:
                assert abs((mask == other).mean() - 0.5) < 0.01
        np.testing.assert_array_equal(flip_mask(0, 1, items[77:99]), masks[1][77:99])


ORDER = [4, 6, 2, 7, 3, 5, 9, 0, 8, 1, 9, 1]
COMPUTED = [3, 1, 7, 9, 0, 6, 5, 4, 2, 8]
COMPUTED_OF_MANY = [70075599, 90882375, 73272188]
FLIPS = [0, 5, 6, 7, 9, 10, 12, 13, 14]


def chi_square(counts: np.ndarray) -> float:
    """Pearson's, of counts that are expected to be equal."""
    return float((np.square(counts - counts.mean()) / counts.mean()).sum())


class TestLoader:
    def test_labels_come_with_their_images(self, packed):
        images = open_images(packed)
        order = SampleOrder(len(images), 3)
        with BatchLoader(LabelledImages(images), order, batch_size=6, accumulation=2, num_workers=2) as loader:
            batches = next(loader)
        items = order.indices(0, 6)
        np.testing.assert_array_equal(torch.cat([batch.images for batch in batches]), all_pixels(images)[items])
        assert torch.cat([batch.labels for batch in batches]).tolist() == images.labels[items].tolist()
        assert len(set(images.labels[items])) > 1

    def batches(self, images, steps=6, **options):
        order = SampleOrder(len(images), 5)
        with BatchLoader(images, order, **{"batch_size": 16, **options}) as batches:
            return [torch.cat(next(batches)) for _ in range(steps)]

    @pytest.mark.parametrize("options", [{"num_workers": 1, "prefetch": 0}, {"num_workers": 3, "prefetch": 5}])
    def test_workers_and_prefetch_change_nothing(self, packed, options):
        images = open_images(packed)
        expected = self.batches(images, num_workers=0, hflip=True)
        for ours, theirs in zip(self.batches(images, hflip=True, **options), expected, strict=True):
            assert torch.equal(ours, theirs)

    def test_batches_are_slices_of_the_order(self, packed):
        images = open_images(packed)
        pixels, order = torch.from_numpy(all_pixels(images)), SampleOrder(len(images), 5)
        for step, batch in enumerate(self.batches(images)):
            assert torch.equal(batch, pixels[order.indices(16 * step, 16)])

    def test_flipped_items_are_mirrored(self, packed):
        images, order = open_images(packed), SampleOrder(36, 5)
        plain, flipped = self.batches(images), self.batches(images, hflip=True)
        for step in range(6):
            mask = torch.from_numpy(order.flips(16 * step, 16))
            assert 0 < mask.sum() < 16
            assert torch.equal(flipped[step], torch.where(mask[:, None, None, None], plain[step].flip(3), plain[step]))

    @pytest.mark.parametrize(("processes", "accumulation"), [(4, 2), (2, 1), (1, 4)])
    def test_ranks_and_micro_steps_tile_the_global_batch(self, packed, processes, accumulation):
        """Also from a step on that others came to: a run resumes on another number of processes."""
        images, split = open_images(packed), {"world_size": processes, "accumulation": accumulation}
        expected = self.batches(images)
        ranks = [self.batches(images, steps=4, start_step=2, rank=rank, **split) for rank in range(processes)]
        for step, batch in enumerate(expected[2:]):
            assert torch.equal(torch.cat([rank[step] for rank in ranks]), batch)

    def test_accumulation_splits_the_batch(self, packed):
        images = open_images(packed)
        with BatchLoader(images, SampleOrder(36, 5), batch_size=12, accumulation=3) as batches:
            parts = next(batches)
        assert [part.shape for part in parts] == [(4, 3, 32, 32)] * 3 and parts[0].dtype == torch.uint8

    def test_start_step_continues_the_stream(self, packed):
        images = open_images(packed)
        late, all_ = self.batches(images, steps=3, start_step=3), self.batches(images)
        assert all(torch.equal(one, other) for one, other in zip(late, all_[3:], strict=True))

    def test_uneven_split_is_refused(self, packed):
        with pytest.raises(UserError, match=r"batch size 10 .* 2 processes x 4 accumulation"):
            BatchLoader(open_images(packed), SampleOrder(36, 0), batch_size=10, world_size=2, accumulation=4)

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_errors_of_workers_surface(self, tmp_path, num_workers):
        root = write_class_folders(tmp_path / "tree", per_class=4)
        (root / "n02" / "002.png").write_bytes(b"bad")
        with pytest.raises(UserError, match=r"n02/002\.png .*preprocessing\.py"):
            self.batches(open_images(root, 32), num_workers=num_workers)

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_sequential_batches_cover_everything_once(self, packed, num_workers):
        images = open_images(packed)
        pixels = torch.from_numpy(all_pixels(images))
        seen = []
        for rank in range(3):
            batches = list(sequential_batches(images, 5, rank=rank, world_size=3, num_workers=num_workers))
            assert [len(items) for items, _ in batches] == [5, 5, 2]
            for items, batch in batches:
                assert torch.equal(batch, pixels[items])
                seen += items.tolist()
        assert sorted(seen) == list(range(36))


class TestStaging:
    def test_copies_once(self, packed, tmp_path):
        staged = stage_dataset(packed, tmp_path)
        np.testing.assert_array_equal(all_pixels(open_images(staged)), all_pixels(open_images(packed)))
        times = {path: path.stat().st_mtime_ns for path in staged.iterdir()}
        assert stage_dataset(packed, tmp_path) == staged
        assert times == {path: path.stat().st_mtime_ns for path in staged.iterdir()}

    def test_continues(self, packed, tmp_path):
        staged = stage_dataset(packed, tmp_path)
        (staged / "index.json").unlink()
        os.truncate(staged / "images-00001.npy", 100)
        stage_dataset(packed, tmp_path)
        PackedReader(staged).verify()

    def test_two_jobs_at_once(self, packed, tmp_path, monkeypatch):
        """Another one copies everything while this one is at its first file; what a killed one left is removed."""
        copy, jobs = shutil.copyfile, []

        def copy_beside_another(source, target):
            copy(source, target)
            if not jobs:
                jobs.append(target)
                jobs.append(stage_dataset(packed, tmp_path))

        monkeypatch.setattr(loader_module.shutil, "copyfile", copy_beside_another)
        assert stage_dataset(packed, tmp_path) == jobs[1]
        PackedReader(jobs[1]).verify()
        (jobs[1] / "index.json").unlink()
        (jobs[1] / "index.json.0a1b2c3d.tmp").write_bytes(b"{")
        stage_dataset(packed, tmp_path)
        assert not list(jobs[1].glob("*.tmp"))

    def test_full_disk(self, packed, tmp_path, monkeypatch):
        monkeypatch.setattr(loader_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
        with pytest.raises(UserError, match="staging needs"):
            stage_dataset(packed, tmp_path)
