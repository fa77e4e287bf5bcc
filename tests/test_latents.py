import os

import numpy as np
import pytest
import torch

import preprocessing
from dataset import latents as latents_module
from dataset.images import open_images
from dataset.latents import FLIPPED_NAME, LatentDataset, features_name, latents_folder
from dataset.loader import BatchLoader, sequential_batches, stage_dataset
from dataset.order import SampleOrder, flip_mask
from errors import UserError
from tests.latent_caches import SHAPE, pack, random_moments, write_cache
from tests.photographs import write_class_folders

VFM = "efficientnet-lite0"
COUNT = 30


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    tree = write_class_folders(root / "tree", per_class=10)
    argv = ["--imagenet-path", str(tree), "--output-path", str(root / "set"), "--resolution", "32"]
    preprocessing.main([*argv, "--num-workers", "1", "--shard-size", "7"])
    return root / "set"


@pytest.fixture(scope="module")
def cache(packed, tmp_path_factory):
    """Folder and arrays of a cache with everything in it."""
    folder = tmp_path_factory.mktemp("cache") / "latents"
    dataset = open_images(packed).fingerprint()
    return folder, write_cache(folder, COUNT, hflip=True, features=VFM, dataset=dataset)


def open_cache(cache, **options) -> LatentDataset:
    return LatentDataset(cache[0], **options)


def steps(dataset, count: int, **options):
    order = SampleOrder(len(dataset), seed=5)
    with BatchLoader(dataset, order, **{"batch_size": 8, "num_workers": 0} | options) as loader:
        return [next(loader) for _ in range(count)]


def same(first, second) -> bool:
    def tensors(batch) -> list:
        return [*batch[:3], *(batch.features or [None])]

    return all(
        (one is None) == (other is None) and (one is None or torch.equal(one, other))
        for one, other in zip(tensors(first), tensors(second), strict=True)
    )


class TestDataset:
    def test_what_it_is(self, cache):
        dataset = open_cache(cache)
        assert (len(dataset), dataset.latent_shape, dataset.class_names) == (
            COUNT,
            SHAPE,
            ["class0", "class1", "class2"],
        )
        np.testing.assert_array_equal(dataset.labels, cache[1]["labels"])
        assert dataset.vae_folder == cache[0] / "vae" and dataset.source["resolution"] == 32
        assert dataset.feature_shapes == () and open_cache(cache, features=[VFM]).feature_shapes == ((4, 6),)
        mean, std = np.split(cache[1]["moments"].astype(np.float64), 2, axis=1)
        np.testing.assert_allclose(dataset.statistics.mean, mean.mean((0, 2, 3)), rtol=1e-6)
        np.testing.assert_allclose(
            dataset.statistics.std, np.sqrt(mean.var((0, 2, 3)) + (std**2).mean((0, 2, 3)) + 1e-4), rtol=1e-6
        )

    def test_fingerprints(self, cache, tmp_path):
        write_cache(tmp_path / "same", COUNT, dataset="x")
        write_cache(tmp_path / "other", COUNT - 1)
        prints = [LatentDataset(folder).fingerprint() for folder in (cache[0], tmp_path / "same", tmp_path / "other")]
        assert prints[0] == prints[1] != prints[2]

    def test_memory(self, cache, monkeypatch):
        size = COUNT * 8 * 8 * 8 * 2
        assert open_cache(cache).held_bytes == size
        assert open_cache(cache, hflip=True, features=[VFM]).held_bytes == 2 * size + 2 * COUNT * 4 * 6 * 2
        assert open_cache(cache, hflip=True, memory_limit=2 * size - 1).held_bytes == 0
        assert open_cache(cache, features=[VFM], memory_limit=size).held_bytes == size  # the features are read
        monkeypatch.setattr(latents_module, "available_memory", lambda: 8 * size)
        assert open_cache(cache, local_processes=2).held_bytes == size
        assert open_cache(cache, local_processes=3).held_bytes == 0

    def test_available_memory(self):
        assert 2**24 < latents_module.available_memory() < 2**45

    @pytest.mark.parametrize(
        ("options", "expected"),
        [({"hflip": True}, "--hflip"), ({"features": [VFM]}, f"--cache-features --enc-type {VFM}")],
    )
    def test_missing_parts_are_named(self, tmp_path, options, expected):
        write_cache(tmp_path / "cache")
        with pytest.raises(UserError, match=f"cache_latents.py command again with {expected}"):
            LatentDataset(tmp_path / "cache", **options)

    def test_no_cache(self, tmp_path, packed):
        with pytest.raises(UserError, match=r"none does not exist; make it with cache_latents\.py"):
            LatentDataset(tmp_path / "none")
        with pytest.raises(UserError, match="is not a latent cache"):
            LatentDataset(tmp_path)
        with pytest.raises(UserError, match="holds packed images, not latents"):
            LatentDataset(packed)
        (tmp_path / "settings.json").write_text("{}")
        with pytest.raises(UserError, match="is not finished; run the same cache_latents"):
            LatentDataset(tmp_path)

    def test_latents_are_not_taken_for_moments(self, tmp_path):
        folder = tmp_path / "cache"
        pack(folder, "latents", random_moments(5, 0)[:, :4], [0] * 5, {})
        write_cache(tmp_path / "good")
        (tmp_path / "good" / "vae").rename(folder / "vae")
        with pytest.raises(UserError, match=r"items of shape \(4, 8, 8\).*4 latent channels have 8"):
            LatentDataset(folder)

    def test_statistics_and_vae_belong_to_it(self, tmp_path):
        write_cache(tmp_path / "cache")
        (tmp_path / "cache" / "latents_stats.safetensors").write_bytes(b"damaged")
        with pytest.raises(UserError, match=r"latents_stats\.safetensors cannot be read"):
            LatentDataset(tmp_path / "cache")
        (tmp_path / "cache" / "vae" / "config.json").unlink()
        with pytest.raises(UserError, match=r"config\.json does not say which VAE it is of"):
            LatentDataset(tmp_path / "cache")

    def test_parts_of_other_sets_are_refused(self, tmp_path):
        write_cache(tmp_path / "cache", hflip=True)
        write_cache(tmp_path / "other", COUNT - 1, hflip=True)
        os.rename(tmp_path / "cache" / FLIPPED_NAME, tmp_path / "away")
        os.rename(tmp_path / "other" / FLIPPED_NAME, tmp_path / "cache" / FLIPPED_NAME)
        with pytest.raises(UserError, match="flipped belongs to another dataset"):
            LatentDataset(tmp_path / "cache", hflip=True)

    def test_images_of_another_dataset_are_refused(self, cache, packed, tmp_path):
        open_cache(cache, images=open_images(packed))
        write_cache(tmp_path / "cache", COUNT, dataset="another")
        with pytest.raises(UserError, match=r"another dataset than the one given \(30 latents, 30 images\)"):
            LatentDataset(tmp_path / "cache", images=open_images(packed))


class TestFolder:
    def test_names_and_paths(self, packed, tmp_path):
        assert latents_folder(packed, "sendvae") == packed / "sendvae"
        assert latents_folder(tmp_path, "./sendvae") == latents_folder(None, "./sendvae")
        assert latents_folder(None, "/somewhere/sendvae").is_absolute()

    def test_a_name_needs_a_packed_dataset(self, tmp_path):
        for data, message in (
            (tmp_path, r"not a packed.*such as \./x"),
            (None, "--data-dir, which is not given"),
        ):
            with pytest.raises(UserError, match=message):
                latents_folder(data, "x")
        with pytest.raises(UserError, match="is not a name"):
            latents_folder(tmp_path, "..")


class TestLoader:
    @pytest.mark.parametrize("limit", [0, None], ids=["from files", "from memory"])
    def test_hflip_takes_the_copy_that_the_coin_says(self, cache, packed, limit):
        images = open_images(packed)
        pixels = np.empty((COUNT, 3, 32, 32), np.uint8)
        images.read_into(range(COUNT), pixels)
        dataset = open_cache(cache, hflip=True, features=[VFM], images=images, memory_limit=limit)
        order, seen = SampleOrder(COUNT, seed=5), 0
        for step, (batch,) in enumerate(steps(dataset, 9, hflip=True)):
            for place in range(8):
                position = 8 * step + place
                item = int(order.indices(position, 1)[0])
                flipped = bool(flip_mask(5, position // COUNT, np.array([item]))[0])
                names = ("flipped", "features_flipped") if flipped else ("moments", "features")
                np.testing.assert_array_equal(batch.stored[place], cache[1][names[0]][item])
                np.testing.assert_array_equal(batch.features[0][place], cache[1][names[1]][item])
                image = pixels[item, :, :, ::-1] if flipped else pixels[item]
                np.testing.assert_array_equal(batch.images[place], image)
                assert batch.labels[place] == cache[1]["labels"][item]
                seen += flipped
        assert 20 < seen < 52

    def test_types(self, cache, packed):
        (batch,) = steps(open_cache(cache, features=[VFM], images=open_images(packed)), 1)[0]
        assert batch.stored.dtype == batch.features[0].dtype == torch.float16
        assert (batch.labels.dtype, batch.images.dtype) == (torch.int64, torch.uint8)
        (batch,) = steps(open_cache(cache), 1)[0]
        assert batch.images is None and batch.features is None and batch.stored.shape == (8, 8, 8, 8)

    def test_files_and_memory_workers_and_prefetch_give_the_same(self, cache):
        expected = steps(open_cache(cache, hflip=True, features=[VFM], memory_limit=0), 7, hflip=True)
        for limit in (0, None):
            dataset = open_cache(cache, hflip=True, features=[VFM], memory_limit=limit)
            for workers, prefetch in ((0, 0), (1, 0), (3, 5)):
                batches = steps(dataset, 7, hflip=True, num_workers=workers, prefetch=prefetch)
                assert all(same(ours, theirs) for (ours,), (theirs,) in zip(batches, expected, strict=True))

    def test_what_a_step_does_without_is_not_read(self, cache, packed):
        dataset = open_cache(cache, features=[VFM], images=open_images(packed))
        unread = ["images", features_name(VFM)]
        whole = steps(dataset, 4)
        part = steps(dataset, 4, prefetch=2, num_workers=2, unread=lambda step: unread if step >= 2 else ())
        assert all(same(x, y) for x, y in zip(whole[:2], part[:2], strict=True) for x, y in zip(x, y, strict=True))
        for (x,), (y,) in zip(whole[2:], part[2:], strict=True):
            assert same(x._replace(images=None, features=None), y)

    def test_images_and_features_without_the_latents(self, cache, packed):
        both = {"features": [VFM], "images": open_images(packed)}
        whole, part = (open_cache(cache, latents=latents, **both) for latents in (True, False))
        assert part.held_bytes == whole.held_bytes - open_cache(cache).held_bytes > 0
        assert not any(
            "latents" in reader.folder.name for reader in open_cache(cache, latents=False, memory_limit=0).readers
        )
        for (x,), (y,) in zip(steps(whole, 3), steps(part, 3), strict=True):
            assert same(x._replace(stored=None), y)

    def test_resumes_at_any_step(self, cache):
        dataset = open_cache(cache, hflip=True)
        stream = steps(dataset, 9, hflip=True)
        for start in (1, 4, 8):
            for ours, theirs in zip(
                steps(dataset, 9 - start, hflip=True, start_step=start, num_workers=2), stream[start:], strict=True
            ):
                assert same(ours[0], theirs[0])

    def test_ranks_and_accumulation_tile_the_global_batch(self, cache):
        dataset = open_cache(cache, features=[VFM])
        expected = steps(dataset, 4)
        ranks = [steps(dataset, 4, rank=rank, world_size=2, accumulation=2) for rank in range(2)]
        for step, (whole,) in enumerate(expected):
            parts = [part for rank in ranks for part in rank[step]]
            assert [len(part.stored) for part in parts] == [2] * 4
            assert torch.equal(torch.cat([part.stored for part in parts]), whole.stored)
            assert torch.equal(torch.cat([part.features[0] for part in parts]), whole.features[0])

    def test_hflip_without_the_copy_is_refused(self, cache):
        with pytest.raises(UserError, match=r"run cache_latents\.py again with --hflip"):
            steps(open_cache(cache), 1, hflip=True)

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_sequential_batches(self, cache, num_workers):
        dataset = open_cache(cache, hflip=True)
        flips = flip_mask(3, 0, np.arange(COUNT))
        expected = np.where(flips[:, None, None, None], cache[1]["flipped"], cache[1]["moments"])
        seen = []
        for rank in range(2):
            for items, batch in sequential_batches(
                dataset, 4, rank=rank, world_size=2, num_workers=num_workers, flips=flips
            ):
                np.testing.assert_array_equal(batch.stored, expected[items])
                seen += items.tolist()
        assert sorted(seen) == list(range(COUNT))
        (_, batch), *_ = sequential_batches(dataset, 4)
        np.testing.assert_array_equal(batch.stored, cache[1]["moments"][:4])


class TestStaging:
    def test_whole_and_in_parts(self, cache, packed, tmp_path):
        plain = stage_dataset(cache[0], tmp_path, kind="latents", parts=())
        assert same(steps(LatentDataset(plain), 1)[0][0], steps(open_cache(cache), 1)[0][0])
        with pytest.raises(UserError, match="--hflip"):
            LatentDataset(plain, hflip=True)
        parts = (FLIPPED_NAME, features_name(VFM), features_name(VFM, flipped=True))
        staged = stage_dataset(cache[0], tmp_path, kind="latents", parts=parts)
        images = open_images(packed)
        ours = steps(LatentDataset(staged, hflip=True, features=[VFM], images=images), 3, hflip=True)
        theirs = steps(open_cache(cache, hflip=True, features=[VFM], images=images), 3, hflip=True)
        assert all(same(one[0], other[0]) for one, other in zip(ours, theirs, strict=True))
        times = {path: path.stat().st_mtime_ns for path in staged.rglob("*")}
        assert stage_dataset(cache[0], tmp_path, kind="latents") == staged  # all there is
        assert times == {path: path.stat().st_mtime_ns for path in staged.rglob("*")}

    def test_a_part_that_is_missing(self, tmp_path):
        write_cache(tmp_path / "cache")
        with pytest.raises(UserError, match=r"no complete flipped/; run the same cache_latents\.py command .* --hflip"):
            stage_dataset(tmp_path / "cache", tmp_path, kind="latents", parts=(FLIPPED_NAME,))
