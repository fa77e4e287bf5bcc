"""No tokenizer: pixels are cached, mirrored, trained on and sampled as they are; what needs a VAE is refused."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import cache_latents
import evaluate
import generate
import train_ldm
import train_repae
import train_sendvae
from dataset import packing
from dataset.images import open_images
from dataset.latents import LatentDataset
from errors import UserError
from formats.vae import load_tokenizer
from inference.latent_cache import MeasuredStatistics
from models.latent_statistics import latent_moments
from models.tokenizers.pixels import NAME, PixelTokenizer
from preprocessing import main as preprocess
from runtime.cli import run
from tests.command_line import argv_of
from tests.foreign_runs import export
from tests.latent_caches import flags as cache_flags
from tests.latent_caches import pack
from tests.ldm_trainings import flags, write_data
from tests.test_jit import public_checkpoint
from tests.test_train_ldm import metrics, train, train_halted_and_straight

COUNT = 24
total = MeasuredStatistics.total
PLAIN = {"model": "JiT-Ti/8", "align": "none", "enc_type": None, "vae_latents_name": NAME}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed toy images with a cache of their pixels and of VFM features, mirrored too."""
    packed = write_data(tmp_path_factory.mktemp("data"), images=COUNT)
    options = {"hflip": True, "cache_features": True, "enc_type": "efficientnet-lite0", "features_grid": 4}
    assert cache_latents.main(cache_flags(packed, NAME, NAME, **options)) == 0
    return packed


def pixels(data: Path) -> np.ndarray:
    out = np.empty((COUNT, 3, 32, 32), np.uint8)
    open_images(data).read_into(np.arange(COUNT), out)
    return out


def read(latents: LatentDataset, items: list[int], flips: list[bool] | None = None) -> dict[str, np.ndarray]:
    out = {
        name: np.empty((len(items), *shape), str(dtype).removeprefix("torch."))
        for name, (shape, dtype) in latents.layout.items()
    }
    latents.read_arrays(np.asarray(items), None if flips is None else np.asarray(flips), out)
    return out


# --- the tokenizer ------------------------------------------------------------------------------------------------


def test_pixels_come_back_as_they_went():
    """All 256 values, through what a cache stores, normalised and denormalised."""
    tokenizer, source = load_tokenizer(NAME)
    assert source == "the range of pixels, [-1, 1]"
    images = torch.arange(256, dtype=torch.uint8).repeat(3, 1).reshape(1, 3, 16, 16)
    code = tokenizer.encode(images)
    assert torch.equal(code.stored(), images)
    z = tokenizer.statistics.normalize(tokenizer.sample(code.stored(), torch.randn(1, 3, 16, 16)))
    assert torch.equal(z, images.float() / 127.5 - 1)
    assert torch.equal(code.mode, z)
    assert torch.equal(tokenizer.decode(tokenizer.statistics.denormalize(z)), z)
    assert tokenizer.latent_shape(16) == (3, 16, 16)


def test_moments_are_those_of_the_numbers_in_minus_one_to_one():
    stored = np.random.default_rng(0).integers(0, 256, (130, 3, 4, 5), np.uint8)
    expected = latent_moments(torch.from_numpy(stored).double() / 127.5 - 1).numpy()
    np.testing.assert_allclose(PixelTokenizer.stored_moments(stored), expected, rtol=1e-12, atol=1e-12)


def test_a_folder_has_no_weights(tmp_path):
    """And is the same tokenizer, found as all others are."""
    tokenizer, _ = load_tokenizer(NAME)
    tokenizer.save(tmp_path / "vae")
    again, _ = load_tokenizer(str(tmp_path / "vae"))
    assert isinstance(again, PixelTokenizer)
    assert again.checksum() == tokenizer.checksum()
    assert sorted(path.name for path in (tmp_path / "vae").iterdir()) == ["config.json", "latents_stats.safetensors"]


def test_a_folder_of_that_name_hides_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir()
    assert isinstance(load_tokenizer(NAME)[0], PixelTokenizer)


# --- a cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 0])
def test_a_cache_holds_the_images_once(data, limit):
    """uint8, mirrored as they are read; features of both are there."""
    folder, images = data / NAME, pixels(data)
    assert not (folder / "flipped").exists()
    latents = LatentDataset(folder, hflip=True, features=("efficientnet-lite0",), memory_limit=limit)
    assert latents.layout["stored"] == ((3, 32, 32), torch.uint8)
    items, flips = [5, 2, 19], [True, False, True]
    found = read(latents, items, flips)
    expected = np.stack([images[5, :, :, ::-1], images[2], images[19, :, :, ::-1]])
    assert np.array_equal(found["stored"], expected)
    assert np.array_equal(read(latents, items)["stored"], images[items])
    statistics = torch.from_numpy(images).double() / 127.5 - 1
    torch.testing.assert_close(latents.statistics.mean.double(), statistics.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)


def test_what_is_said_of_a_cache(data, tmp_path, capsys):
    """Statistics of data are not expected to be 0 and 1; a dry run counts no mirrored copy; --dtype changes nothing."""
    options = {"hflip": True, "resolution": 32}
    assert cache_latents.main(cache_flags(data, NAME, tmp_path / "cache", **options)) == 0
    captured = capsys.readouterr()
    assert "WARNING" not in captured.err
    assert "differ" not in captured.out
    features = {"cache_features": True, "enc_type": "efficientnet-lite0", "features_grid": 4}
    assert cache_latents.main(cache_flags(data, NAME, tmp_path / "cache", dtype="float32", **options, **features)) == 0
    capsys.readouterr()
    assert cache_latents.main(cache_flags(data, NAME, None, dry_run=True, **options, **features)) == 0
    said = capsys.readouterr().out
    assert "latents: 24 items of 3 × 32 × 32 uint8" in said
    assert "mirrored latents" not in said
    assert "mirrored features" in said


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Packed images in four shards, one of them of a single image."""
    images = np.random.default_rng(0).integers(0, 256, (22, 3, 32, 32), np.uint8)
    pack(tmp_path / "packed", "images", images, [number % 3 for number in range(22)], {"resolution": 32})
    return tmp_path / "packed"


def cached(data: Path, folder: Path, **changes) -> Path:
    assert cache_latents.main(cache_flags(data, NAME, folder, **changes)) == 0
    return folder


def refuse_links(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def link(source, target):
        raise OSError(number, os.strerror(number), str(source))

    monkeypatch.setattr(os, "link", link)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def are_links(folder: Path, data: Path) -> list[bool]:
    names = sorted(path.name for path in data.glob("images-*.npy"))
    return [os.path.samefile(data / name, folder / name.replace("images", "latents")) for name in names]


def test_a_cache_is_the_data_set_s_files_under_other_names(shards, tmp_path, monkeypatch, capsys):
    """And equals byte for byte a cache of copies, which it is where no links can be made."""
    linked = cached(shards, tmp_path / "linked")
    assert "links to the files of" in capsys.readouterr().out
    assert are_links(linked, shards) == [True] * 4
    refuse_links(monkeypatch, errno.EXDEV)
    copied = cached(shards, tmp_path / "copied")
    assert f"holds copies of the images: {shards / 'images-00000.npy'} cannot be linked" in capsys.readouterr().out
    assert are_links(copied, shards) == [False] * 4
    assert contents(linked) == contents(copied)


def test_what_cannot_be_linked_alone_is_copied(shards, tmp_path, monkeypatch, capsys):
    """A file of the data set that lies on another file system, behind a link of its own."""
    link = os.link

    def refuse_one(source, target):
        if "00002" in str(source):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source))
        link(source, target)

    whole = contents(cached(shards, tmp_path / "whole"))
    monkeypatch.setattr(os, "link", refuse_one)
    folder = cached(shards, tmp_path / "cache")
    assert "images-00002.npy cannot be linked" in capsys.readouterr().out
    assert are_links(folder, shards) == [True, True, False, False]
    assert contents(folder) == whole
    cached(shards, folder)
    assert "links" not in capsys.readouterr().out  # nothing is made any more


def test_a_refused_cache_leaves_no_links(shards, tmp_path, monkeypatch, capsys):
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    options = {"cache_features": True, "enc_type": "efficientnet-lite0", "features_grid": 4}
    assert run(cache_latents.main, cache_flags(shards, NAME, tmp_path / "cache", **options)) == 2
    assert "0.00 GB are free" in capsys.readouterr().err
    assert not list(tmp_path.rglob("latents-*"))
    assert not (tmp_path / "cache" / "settings.json").exists()


def test_links_of_a_killed_run_are_measured_by_the_next(shards, tmp_path, monkeypatch):
    """By each process its own, and not all by the one that completes the cache."""
    whole = contents(cached(shards, tmp_path / "whole"))

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cache_latents, "measure_links", killed)
        cached(shards, tmp_path / "cache")
    measured = []
    moments = PixelTokenizer.stored_moments
    monkeypatch.setattr(PixelTokenizer, "stored_moments", lambda self, x: measured.append(len(x)) or moments(x))
    monkeypatch.setattr(MeasuredStatistics, "total", lambda self, count: measured.append("total") or total(self, count))
    assert contents(cached(shards, tmp_path / "cache")) == whole
    assert measured == [7, 7, 7, 1, "total"]


def test_a_disk_that_fails_is_not_taken_for_one_without_links(shards, tmp_path, monkeypatch, capsys):
    refuse_links(monkeypatch, errno.EIO)
    assert run(cache_latents.main, cache_flags(shards, NAME, tmp_path / "cache")) == 2
    assert os.strerror(errno.EIO) in capsys.readouterr().err


def test_links_outlive_the_data_set_and_need_no_room(shards, tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    folder = cached(shards, tmp_path / "cache")
    expected = contents(shards)
    shutil.rmtree(shards)
    assert all((folder / f"latents-{n:05d}.npy").read_bytes() == expected[f"images-{n:05d}.npy"] for n in range(4))
    assert len(LatentDataset(folder)) == 22


def test_an_interrupted_cache_is_completed_by_links(shards, tmp_path, monkeypatch):
    """What another run copied, or lost the record of, is neither linked to nor written into."""
    whole = contents(cached(shards, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(packing.PackingJob, "finish", lambda *args: False)
        folder = cached(shards, tmp_path / "cache")
    assert are_links(folder, shards) == [True] * 4
    copy = (folder / "latents-00001.npy").read_bytes()
    (folder / "latents-00001.npy").unlink()
    (folder / "latents-00001.npy").write_bytes(copy)
    for number in (0, 3):
        (folder / f"latents-0000{number}.json").unlink()
    cached(shards, folder)
    assert are_links(folder, shards) == [True, False, True, True]
    assert contents(folder) == whole


def test_packed_as_png_images_are_copied(shards, data, tmp_path):
    photographs = data.parent / "images"
    argv = {"imagenet_path": photographs, "output_path": tmp_path / "png", "resolution": 32, "codec": "png"}
    assert preprocess(argv_of(argv)) == 0
    assert np.array_equal(pixels(tmp_path / "png"), pixels(data))
    folder = cached(tmp_path / "png", tmp_path / "cache")
    assert np.array_equal(read(LatentDataset(folder), list(range(COUNT)))["stored"], pixels(data))


def test_a_data_set_damaged_after_it_was_packed_is_found_by_the_cache(shards, tmp_path):
    with open(shards / "images-00002.npy", "r+b") as file:
        file.seek(1000)
        file.write(b"\1\2\3\4")
    folder = cached(shards, tmp_path / "cache")
    with pytest.raises(UserError, match=r"latents-00002\.npy is damaged"):
        LatentDataset(folder)


def test_a_staged_cache_is_mirrored_too(data, tmp_path):
    options = PLAIN | {"hflip": True, "stage_dir": tmp_path / "stage"}
    assert train(*flags(data, tmp_path, **options)) == 0


def test_a_vae_s_cache_without_its_mirror_images_is_not_staged(data, tmp_path, capsys):
    options = {"align": "none", "enc_type": None, "hflip": True, "stage_dir": tmp_path / "stage"}
    assert train(*flags(data, tmp_path, **options)) == 2
    assert f"{data / 'latents'} has no complete flipped/" in capsys.readouterr().err
    assert not list((tmp_path / "stage").rglob("*.npy"))


def test_the_cache_s_vae_normalises_by_nothing(data):
    """Not by the measured statistics, which stand beside it."""
    tokenizer, _ = load_tokenizer(str(data / NAME / "vae"))
    assert (tokenizer.statistics.mean.tolist(), tokenizer.statistics.std.tolist()) == ([0, 0, 0], [1, 1, 1])


# --- training and sampling ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        PLAIN | {"align": "vae", "hflip": True, "weighting": "lognormal", "time_mean": 0.8, "time_std": 0.8},
        {"vae_latents_name": NAME, "model": "LightningDiT-Ti/8", "prediction": "x"},
    ],
    ids=["JiT with VAE-REPA, mirrored", "LightningDiT with REPA"],
)
def test_a_run_is_resumed_exactly_and_makes_images(data, tmp_path, options):
    train_halted_and_straight(data, tmp_path, **options)
    sampling = {
        "exp_path": tmp_path / "straight", "sample_dir": tmp_path / "images", "mode": "ode", "num_steps": 25,
        "num_fid_samples": 4, "cfg_scale": 2.0,
    }  # fmt: skip
    assert generate.main(argv_of(sampling)) == 0
    with np.load(tmp_path / "images" / "samples.npz", allow_pickle=False) as file:
        assert file["arr_0"].shape == (4, 32, 32, 3)
    settings = json.loads((tmp_path / "images" / "index.json").read_text())["source"]
    assert settings["damped"] is False
    assert generate.main(argv_of(sampling | {"sample_dir": tmp_path / "damped", "damped": True})) == 0
    files = [tmp_path / name / "samples.npz" for name in ("images", "damped")]
    assert files[0].read_bytes() != files[1].read_bytes()


def test_damped_images_have_a_folder_of_their_own(data, tmp_path):
    assert train(*flags(data, tmp_path, **PLAIN)) == 0
    for damped in (True, None):
        sampling = {"exp_path": tmp_path / "run", "mode": "ode", "num_steps": 2, "num_fid_samples": 2, "damped": damped}
        assert generate.main(argv_of(sampling)) == 0
    names = sorted(path.name for path in (tmp_path / "run").glob("samples-*"))
    assert names == ["samples-0000002-ode2-2-seed0", "samples-0000002-ode2-damped-2-seed0"]


def test_the_loss_falls(data, tmp_path):
    options = PLAIN | {"max_train_steps": 60, "learning_rate": 3e-3, "log_steps": 20, "batch_size": 8, "seed": 1}
    assert train(*flags(data, tmp_path, **options)) == 0
    losses = [line["loss"] for line in metrics(tmp_path / "run") if "loss" in line]
    print(losses)
    assert losses[-1] < 0.5 * losses[0]


def test_a_public_checkpoint_is_trained_on_and_resumed_to_the_bit(data, tmp_path):
    torch.save(public_checkpoint(), tmp_path / "checkpoint-last.pth")
    assert export(tmp_path / "checkpoint-last.pth", tmp_path / "theirs") == 0
    arguments = json.loads((tmp_path / "theirs" / "args.json").read_text())["args"]
    assert (arguments["prediction"], arguments["time_mean"], arguments["time_std"]) == ("x", 0.8, 0.7)
    recipe = PLAIN | {"weighting": "lognormal", "time_mean": 0.8, "time_std": 0.7, "checkpointing_steps": 1}
    recipe |= {"continue_train_exp_dir": tmp_path / "theirs"}
    for name, steps in (("straight", 3), ("two", 2), ("two", 3)):
        recipe["gradient_checkpointing"] = (name, steps) == ("two", 3) or None
        assert train(*flags(data, tmp_path, name, **recipe | {"max_train_steps": steps})) == 0
    files = [tmp_path / name / "checkpoints" / "0000003" / "ema.safetensors" for name in ("straight", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()


# --- what is refused ----------------------------------------------------------------------------------------------


def test_there_is_nothing_to_train(data, capsys):
    common = ["--data-dir", str(data), "--output-dir", "x", "--exp-name", "y", "--vae", NAME, "--dry-run"]
    for script in (train_sendvae, train_repae):
        assert run(script.main, common) == 2
        assert "is no VAE and has nothing to train: cache it as it is" in capsys.readouterr().err


def test_weights_are_none(capsys):
    assert run(cache_latents.main, ["--dry-run", "--vae", NAME, "--vae-ckpt", "f8d4"]) == 2
    assert f"--vae-ckpt f8d4: --vae {NAME} has no weights; leave --vae-ckpt out" in capsys.readouterr().err


def test_damping_is_of_predicted_data_and_of_the_ode(data, tmp_path, capsys):
    assert train(*flags(data, tmp_path, model="SiT-Ti/2", align="none", enc_type=None)) == 0
    base = {"exp_path": tmp_path / "run", "num_fid_samples": 2, "num_steps": 2, "damped": True}
    assert run(generate.main, argv_of(base)) == 2
    assert "--damped is for --mode ode" in capsys.readouterr().err
    assert run(generate.main, argv_of(base | {"mode": "ode"})) == 2
    assert "--damped is for networks that predict the data (--prediction x)" in capsys.readouterr().err
    for name, prediction in (("image", "x"), ("velocity", "v")):
        assert train(*flags(data, tmp_path, name, **PLAIN | {"prediction": prediction})) == 0
    capsys.readouterr()
    guided = {"exp_path": tmp_path / "image", "guide": tmp_path / "velocity", "cfg_scale": 2.0, "mode": "ode"}
    assert run(generate.main, argv_of(base | guided)) == 2
    assert f"{tmp_path / 'velocity'} predicts the velocity: leave it out" in capsys.readouterr().err
    assert run(generate.main, argv_of(base | guided | {"damped": None})) == 0


def test_norms_are_always_there(data, tmp_path):
    """Whatever the flag says, which is noted as it is and does not stop a resumed run."""
    for steps, flag in ((1, "--no-qk-norm"), (2, "--qk-norm")):
        assert train(*flags(data, tmp_path, **PLAIN | {"max_train_steps": steps}), flag) == 0
    assert json.loads((tmp_path / "run" / "args.json").read_text())["args"]["qk_norm"] is True


@pytest.mark.parametrize("changes", [{"prediction": "v"}, {"time_std": 0.5}])
def test_a_run_goes_on_with_what_it_predicts_and_when(data, tmp_path, changes, capsys):
    options = PLAIN | {"weighting": "lognormal"}
    assert train(*flags(data, tmp_path, **options)) == 0
    assert train(*flags(data, tmp_path, **options | changes | {"max_train_steps": 3})) == 2
    assert f"--{next(iter(changes)).replace('_', '-')}" in capsys.readouterr().err


def test_a_cache_without_its_vae_s_configuration_is_refused(data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "packed")
    (tmp_path / "packed" / NAME / "vae" / "config.json").unlink()
    assert run(train_ldm.main, flags(tmp_path / "packed", tmp_path / "exps", **PLAIN)) == 2
    assert "does not say which VAE it is of" in capsys.readouterr().err


def test_reconstruction_is_perfect(data, tmp_path):
    """As a check of the measure: no error at all, and no infinite PSNR in the record."""
    argv = {"vae": NAME, "data": data, "metrics": "psnr,ssim", "output_dir": tmp_path}
    assert run(evaluate.main, ["reconstruction", *argv_of(argv)]) == 0
    (record,) = tmp_path.rglob("reconstruction*.json")
    values = json.loads(record.read_text())["values"]
    assert values["SSIM"] == pytest.approx(1)
