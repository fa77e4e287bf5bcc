import json
import signal
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import cache_latents
import preprocessing
from dataset.images import open_images
from dataset.latents import LatentDataset, features_name
from dataset.packing import PackingJob
from dataset.shards import ShardSpec
from dataset.toy import write_toy_dataset
from errors import UserError
from formats.vae import load_tokenizer
from inference.latent_cache import MeasuredStatistics, chunk_size, one_thread_each
from models.encoders import build_encoder
from models.latent_statistics import differences, latent_moments
from models.tokenizers import Tokenizer
from models.tokenizers.kl import KLTokenizer
from runtime.cli import EXIT_USER_ERROR, run
from tests.latent_caches import flags, overflow, pack, random_moments, save_vae, too_large
from tests.photographs import random_image
from tests.stages import Stage, run_stage

VFM = "efficientnet-lite0"
EVERYTHING = {"hflip": True, "cache_features": True, "enc_type": VFM, "features_grid": 2}
COUNT, SHARDS = 132, 7


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def cache(data, vae, name, **changes) -> Path:
    """Make a cache in this process."""
    assert cache_latents.main(flags(data, vae, name, **changes)) == 0
    return Path(name)


def stop_after(folder: Path, records: int, process: Stage, number: int) -> str:
    """Send a signal when so many shards are complete."""
    deadline = time.monotonic() + 60
    while len(list(folder.glob("latents-?????.json"))) < records:
        assert time.monotonic() < deadline and process.poll() is None, process.stderr
        time.sleep(0.002)
    process.send_signal(number)
    process.wait(timeout=60)
    return process.stdout + process.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """132 images in shards of 20."""
    root = tmp_path_factory.mktemp("data")
    write_toy_dataset(root / "tree", COUNT, 32, seed=0, num_workers=1)
    argv = ["--imagenet-path", str(root / "tree"), "--output-path", str(root / "set"), "--resolution", "32"]
    preprocessing.main([*argv, "--num-workers", "1", "--shard-size", "20"])
    return root / "set"


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    return save_vae(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def whole(data, vae, tmp_path_factory) -> Path:
    """Everything there is, by one process in batches of 8."""
    return cache(data, vae, tmp_path_factory.mktemp("whole") / "cache", pproc_batch_size=8, **EVERYTHING)


def stored(folder: Path, kind: str = "latents") -> np.ndarray:
    return np.concatenate([np.load(path) for path in sorted(folder.glob(f"{kind}-*.npy"))])


def pixels(data: Path) -> torch.Tensor:
    images = open_images(data)
    out = np.empty((len(images), 3, 32, 32), np.uint8)
    images.read_into(range(len(images)), out)
    return torch.from_numpy(out)


class TestBytes:
    def test_batch_and_threads_change_nothing(self, data, vae, whole, tmp_path):
        expected = content(whole)
        assert len([name for name in expected if name.endswith(".npy")]) == 4 * (SHARDS + 1)
        for batch, workers, threads in ((3, 0, 1), (64, 3, 2)):
            previous = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                name = tmp_path / str(batch)
                cache(data, vae, name, pproc_batch_size=batch, **EVERYTHING | {"num_workers": workers})
                assert torch.get_num_threads() == threads
            finally:
                torch.set_num_threads(previous)
            assert content(name) == expected

    @pytest.mark.slow
    def test_two_processes(self, data, vae, whole, tmp_path):
        argv = flags(data, vae, tmp_path / "cache", pproc_batch_size=8, **EVERYTHING)
        text = run_stage("cache_latents.py", *argv, processes=2).stdout
        assert content(tmp_path / "cache") == content(whole)
        assert "process 0 of 2" in text and "process 1 of 2" in text and "is complete: 132 images" in text

    @pytest.mark.slow
    def test_killed_in_the_middle(self, data, vae, whole, tmp_path):
        folder = tmp_path / "cache"
        argv = flags(data, vae, folder, pproc_batch_size=8, **EVERYTHING)
        stop_after(folder, 2, Stage("cache_latents.py", *argv), signal.SIGKILL)
        assert not (folder / "index.json").exists()
        made = {path: path.stat().st_mtime_ns for path in folder.glob("latents-?????.npy")}
        cache(data, vae, folder, **EVERYTHING)
        assert content(folder) == content(whole)
        assert len(made) >= 2
        kept = [path for path in sorted(made)[:2] if path.stat().st_mtime_ns == made[path]]
        assert len(kept) == 2  # what was complete was not made again

    @pytest.mark.slow
    def test_sigterm_stops_in_order(self, data, vae, whole, tmp_path):
        folder = tmp_path / "cache"
        process = Stage("cache_latents.py", *flags(data, vae, folder, **EVERYTHING))
        text = stop_after(folder, 1, process, signal.SIGTERM)
        assert process.returncode == 130 and "interrupted" in text and "Traceback" not in text
        cache(data, vae, folder, **EVERYTHING)
        assert content(folder) == content(whole)

    def test_parts_are_added_later(self, data, vae, whole, tmp_path, capsys):
        folder = cache(data, vae, tmp_path / "cache")
        assert not (folder / "flipped").exists()
        before = {path: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
        cache(data, vae, folder, hflip=True)
        cache(data, vae, folder, **EVERYTHING)
        assert before == {path: path.stat().st_mtime_ns for path in before}
        assert content(folder) == content(whole)
        capsys.readouterr()
        cache(data, vae, folder, **EVERYTHING)
        text = capsys.readouterr().out
        assert "is complete: 132 images" in text and "images/s" not in text

    def test_one_rank_alone_leaves_the_rest(self, data, vae, tmp_path, monkeypatch, capsys):
        for rank in ("0", "1"):
            monkeypatch.setenv("WORLD_SIZE", "2")
            monkeypatch.setenv("RANK", rank)
            cache(data, vae, tmp_path / "cache")
            assert (tmp_path / "cache" / "index.json").exists() == (rank == "1")
        text = capsys.readouterr().out
        assert "whoever comes last" in text and "is complete: 132 images" in text

    def test_threads_of_the_encoder_have_one_thread_each(self):
        from concurrent.futures import ThreadPoolExecutor

        with one_thread_each() as threads, ThreadPoolExecutor(1) as pool:
            assert threads >= 1 and pool.submit(torch.get_num_threads).result() == 1


class TestContent:
    def test_latents_are_mean_and_std_of_the_image(self, data, vae, whole):
        network, _ = load_tokenizer(str(vae))
        with torch.no_grad():
            for folder, images in ((whole, pixels(data)), (whole / "flipped", pixels(data).flip(3))):
                posterior = network.encode(images)
                expected = torch.cat([posterior.mean, posterior.std], 1)
                assert stored(folder).dtype == np.float16
                # torch's GroupNorm in channels_last order errs by up to 7e-5 on flat images, in planar order by 2e-6
                np.testing.assert_allclose(stored(folder), expected.numpy(), rtol=1e-3, atol=2e-4)
        assert np.abs(stored(whole).astype(float) - stored(whole / "flipped")).max() > 0.01

    def test_features_are_what_the_vfm_sees(self, data, whole):
        encoder = build_encoder(VFM, 2)
        for flipped, images in ((False, pixels(data)), (True, pixels(data).flip(3))):
            features = stored(whole / features_name(VFM, flipped), "features")
            assert features.shape == (COUNT, 4, 112) and features.dtype == np.float16
            np.testing.assert_allclose(features, encoder(images).numpy(), rtol=2e-3, atol=2e-4)

    def test_the_loader_reads_it(self, data, whole):
        dataset = LatentDataset(whole, hflip=True, features=[VFM], images=open_images(data))
        np.testing.assert_array_equal(dataset.labels, open_images(data).labels)
        assert (dataset.latent_shape, dataset.feature_shapes, len(dataset)) == ((4, 8, 8), ((4, 112),), COUNT)
        network, known = load_tokenizer(str(dataset.vae_folder))
        assert known and network.checksum() == dataset.source["vae"]

    def test_shards_are_those_of_the_images(self, whole, data):
        for folder in (whole, whole / "flipped", whole / features_name(VFM)):
            counts = [shard["count"] for shard in json.loads((folder / "index.json").read_text())["shards"]]
            assert counts == open_images(data).shard_counts == [20] * 6 + [12]

    def test_float32_and_class_folders(self, data, vae, whole, tmp_path):
        folder = cache(data.parent / "tree", vae, tmp_path / "cache", resolution=32, dtype="float32")
        assert stored(folder).dtype == np.float32
        np.testing.assert_array_equal(stored(folder).astype(np.float16), stored(whole))
        default = cache_latents.main(flags(data, vae, None))
        assert default == 0 and LatentDataset(data / f"latents-{vae.parent.name}").latent_shape == (4, 8, 8)

    def test_a_shard_all_of_whose_photographs_were_rejected(self, vae, tmp_path):
        folder = tmp_path / "images" / "a"
        folder.mkdir(parents=True)
        for number in range(6):
            path = folder / f"{number}.png"
            if number in (2, 3):
                path.write_text("no image")
            else:
                random_image(np.random.default_rng(number), 40, 40).save(path)
        packed = tmp_path / "packed"
        argv = ["--imagenet-path", str(tmp_path / "images"), "--output-path", str(packed), "--resolution", "32"]
        assert preprocessing.main([*argv, "--shard-size", "2", "--allow-rejected"]) == 0
        cached = LatentDataset(cache(packed, vae, tmp_path / "cache"))
        assert [shard["count"] for shard in json.loads((cached.folder / "index.json").read_text())["shards"]] == [
            2,
            0,
            2,
        ]
        assert cached.statistics.var.isfinite().all()


class TestStatistics:
    def test_equal_a_derivation_from_the_arrays(self, whole):
        mean, std = np.split(stored(whole).astype(np.float64), 2, axis=1)
        count = mean[:, 0].size
        var = (mean.var((0, 2, 3)) + (std**2).mean((0, 2, 3))) * count / (count - 1)
        measured = load_file(whole / "latents_stats.safetensors")
        np.testing.assert_allclose(measured["mean"], mean.mean((0, 2, 3)), rtol=1e-6)
        np.testing.assert_allclose(measured["var"], var, rtol=1e-6)
        np.testing.assert_allclose(measured["std"], np.sqrt(var + 1e-4), rtol=1e-6)

    def test_are_the_moments_of_drawn_samples(self, whole):
        mean, std = np.split(stored(whole).astype(np.float64), 2, axis=1)
        generator = np.random.default_rng(0)
        draws = np.concatenate([mean + std * generator.normal(size=mean.shape) for _ in range(20)])
        measured = load_file(whole / "latents_stats.safetensors")
        error = np.abs(draws.mean((0, 2, 3)) - measured["mean"].numpy()) / draws.std((0, 2, 3))
        assert error.max() < 0.02
        np.testing.assert_allclose(draws.var((0, 2, 3)), measured["var"], rtol=0.03)

    def test_do_not_depend_on_how_shards_are_summed(self):
        latents = np.random.default_rng(0).normal(size=(150, 8, 4, 4)).astype(np.float16)
        parts = KLTokenizer.stored_moments(latents[:64]) + KLTokenizer.stored_moments(latents[64:])
        np.testing.assert_array_equal(KLTokenizer.stored_moments(latents), parts)

    def test_of_a_tokenizer_without_randomness_are_those_of_its_latents(self):
        latents = np.random.default_rng(0).normal(3, size=(5, 4, 2, 2)).astype(np.float16)
        expected = latent_moments(torch.from_numpy(latents)).numpy()
        np.testing.assert_allclose(Tokenizer.stored_moments(latents), expected, rtol=1e-13)

    @pytest.mark.parametrize("kind", [Tokenizer, KLTokenizer])
    def test_take_little_memory_whatever_the_shard_has(self, kind):
        """In float64 the latents of a frozen VFM, 4096 in a shard, would have 13 GB."""
        peaks = []
        for count in (64, 256):
            latents = np.zeros((count, 96, 16, 16), np.float16)
            tracemalloc.start()
            kind.stored_moments(latents)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert peaks[1] < 1.1 * peaks[0] and peaks[1] < 64 * 96 * 256 * 8 * 4

    @pytest.mark.parametrize(("factor", "warns"), [(1.01, False), (1.03, True)])
    def test_warning_above_two_percent(self, data, vae, whole, tmp_path, factor, warns, capsys):
        measured = load_file(whole / "latents_stats.safetensors")
        other = save_vae(
            tmp_path / "run", change=lambda vae: vae.statistics.load(measured["mean"], measured["std"] * factor)
        )
        capsys.readouterr()
        folder = cache(data, other, tmp_path / "cache")
        output = capsys.readouterr()
        assert ("WARNING" in output.err) == warns and ("0.99 %" in output.out) == (not warns)
        assert differences(measured, measured) == (0, 0)
        kept = load_file(folder / "vae" / "latents_stats.safetensors")
        np.testing.assert_allclose(kept["std"], measured["std"] * factor, rtol=1e-6)  # the VAE's own

    def test_a_vae_without_gets_the_measured_ones(self, data, vae, tmp_path, capsys):
        other = save_vae(tmp_path / "run")
        (other / "latents_stats.safetensors").unlink()
        folder = cache(data, other, tmp_path / "cache")
        assert "came without latent statistics" in capsys.readouterr().out
        for name, tensor in load_file(folder / "vae" / "latents_stats.safetensors").items():
            assert torch.equal(tensor, load_file(folder / "latents_stats.safetensors")[name])

    def test_measured_on_demand(self, data, vae, whole, tmp_path, capsys):
        """The cache's copy of the VAE has them; latents and the VAE that was given stay as they are."""
        before = (vae / "latents_stats.safetensors").read_bytes()
        folder = cache(data, vae, tmp_path / "cache", statistics="measured")
        assert "normalise with the latent statistics of this dataset" in capsys.readouterr().out
        measured = load_file(folder / "latents_stats.safetensors")
        kept = load_file(folder / "vae" / "latents_stats.safetensors")
        assert all(torch.equal(kept[name], measured[name]) for name in measured)
        assert (vae / "latents_stats.safetensors").read_bytes() == before
        assert np.array_equal(stored(folder), stored(whole))


class TestRefusals:
    def test_another_vae_dataset_or_type(self, data, vae, whole, tmp_path):
        other_vae = save_vae(tmp_path / "run", seed=1)
        with pytest.raises(UserError, match=r"another --vae-ckpt \(vae: .*another --vae-latents-name"):
            cache(data, other_vae, whole)
        with pytest.raises(UserError, match=r"another --data-dir \(dataset: packed.*photographs"):
            cache(data.parent / "tree", vae, whole, resolution=32)
        with pytest.raises(UserError, match=r"another --dtype \(dtype: float16, now float32"):
            cache(data, vae, whole, dtype="float32")
        with pytest.raises(UserError, match=r"another --features-grid \(grid: 2, now 1"):
            cache(data, vae, whole, **EVERYTHING | {"features_grid": 1})

    @pytest.mark.parametrize(
        ("spoil", "message"), [(too_large, r"\[0\] exceed float16.*--dtype float32"), (overflow, "are not finite")]
    )
    def test_latents_that_do_not_fit_name_their_image(self, data, tmp_path, spoil, message):
        spoiled = save_vae(tmp_path / "run", change=spoil)
        with pytest.raises(UserError, match=rf"latents of images-00000\.npy.*{message}"):
            cache(data, spoiled, tmp_path / "cache")
        if spoil is too_large:
            cache(data, spoiled, tmp_path / "other", dtype="float32")


class TestDryRun:
    def test_writes_nothing(self, data, vae, tmp_path, capsys):
        before = content(data)
        cache(data, vae, tmp_path / "cache", dry_run=True, **EVERYTHING)
        text = capsys.readouterr().out
        assert not (tmp_path / "cache").exists() and content(data) == before
        assert f"{COUNT * 8 * 64 * 2} bytes" in text and f"{COUNT * 4 * 112 * 2} bytes" in text
        assert "681,911 parameters" in text and "peak memory" in text and "hours for 132 images" in text

    def test_features_of_imagenet(self, capsys):
        """The size that the whole of ImageNet takes with DINOv2-B on 16×16 tokens: 504 GB."""
        argv = ["--dry-run", "--random-weights", "--vae", "f4d4-tiny", "--resolution", "64", "--features-grid", "16"]
        argv += ["--cache-features", "--enc-type", "dinov2-vit-b", "--pproc-batch-size", "1"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cache_latents, "chunk_size", lambda resolution, device: 1)
            assert cache_latents.main(argv) == 0
        assert "(503.78 GB)" in capsys.readouterr().out


def test_chunks_fill_the_device_at_any_resolution():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [chunk_size(side, cpu) for side in (32, 256, 512, 1024)] == [8, 2, 1, 1]
    assert [chunk_size(side, cuda) for side in (32, 256, 512, 1024)] == [128, 32, 8, 2]


def test_checksum_is_of_weights_and_architecture(vae, tmp_path):
    first, _ = load_tokenizer(str(vae))
    second, _ = load_tokenizer(str(save_vae(tmp_path / "run")))
    assert first.checksum() == second.checksum() and len(first.checksum()) == 64
    second.statistics.load(torch.ones(4), torch.full((4,), 2.0))
    second.network.to(memory_format=torch.channels_last)
    second.network.register_to_config(scaling_factor=0.5)
    assert first.checksum() == second.checksum()
    with torch.no_grad():
        second.network.encoder.conv_in.weight[0, 0, 0, 0] += 1e-6
    assert first.checksum() != second.checksum()
    second.load_state_dict(first.state_dict())
    second.network.register_to_config(act_fn="gelu")
    assert first.checksum() != second.checksum()


def test_the_advice_on_a_full_disk_can_be_followed(data, vae, tmp_path, monkeypatch, capsys):
    """float32 does not fit, float16 does."""
    usage = SimpleNamespace(free=COUNT * 512 * 3)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    folder = tmp_path / "cache"
    assert run(cache_latents.main, flags(data, vae, folder, dtype="float32")) == EXIT_USER_ERROR
    assert "take --dtype float16" in capsys.readouterr().err
    assert not folder.exists()
    assert run(cache_latents.main, flags(data, vae, folder, dtype="float16")) == 0


@pytest.mark.parametrize("damage", [lambda data: data[:-40], lambda data: bytes([data[0] ^ 255]) + data[1:]])
def test_moments_that_were_damaged_are_made_again(tmp_path, damage):
    pack(tmp_path / "cache", "latents", random_moments(7, 1), [0] * 7, {})
    packing = PackingJob(tmp_path / "cache", ShardSpec("latents", (8, 8, 8), "float16"), {})
    measured = MeasuredStatistics(packing, load_tokenizer("f4d4-tiny", "none")[0])
    moments = measured.shard(0).copy()
    (kept,) = (tmp_path / "cache").glob(".moments-*")
    good = kept.read_bytes()
    kept.write_bytes(damage(good))
    assert np.array_equal(measured.shard(0), moments)
    assert kept.read_bytes() == good
