"""What a user can get wrong with cache_latents.py, and what the one line must say."""

import json
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import cache_latents
import preprocessing
from tests.bad_inputs.case import Case
from tests.bad_inputs.train_sendvae_cases import another_class, no_dinov2, photographs, truncated, written
from tests.latent_caches import flags, overflow, save_vae, too_large


def packed(folder: Path) -> Path:
    """Four images of 32 px."""
    argv = ["--imagenet-path", str(photographs(folder / "images")), "--output-path", str(folder / "set")]
    assert preprocessing.main([*argv, "--resolution", "32", "--num-workers", "1"]) == 0
    return folder / "set"


def with_flags(**changes):
    """A case that differs from a working command in some flags; callables are given the case's folder."""

    def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        values = {"data_dir": packed, "vae": lambda folder: save_vae(folder / "run"), "name": "latents"} | changes
        values = {key: value(tmp_path) if callable(value) else value for key, value in values.items()}
        return flags(values.pop("data_dir"), values.pop("vae"), values.pop("name"), **values)

    return prepare


def vae_that(change: Callable[[Path], None]):
    """A VAE's folder, changed."""

    def make(folder: Path) -> Path:
        change(vae := save_vae(folder / "run"))
        return vae

    return make


def status(content: str):
    return vae_that(lambda vae: (vae.parent / "status.json").write_text(content))


def other_statistics(vae: Path) -> None:
    path = vae / "latents_stats.safetensors"
    save_file({name: tensor.repeat(2) for name, tensor in load_file(path).items()}, path)


def spoiled_by(change):
    """A VAE whose latents are too large, or none."""
    return with_flags(vae=lambda folder: save_vae(folder / "run", change=change))


def after_a_cache(then: Callable[[Path], dict]):
    """A complete cache, then another command for the same folder."""

    def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        data, vae = packed(tmp_path), save_vae(tmp_path / "run")
        assert cache_latents.main(flags(data, vae, "latents")) == 0
        values = {"data_dir": data, "vae": vae, "name": "latents"} | then(tmp_path)
        return flags(values.pop("data_dir"), values.pop("vae"), values.pop("name"), **values)

    return prepare


def lost_shard(folder: Path) -> dict:
    (folder / "set" / "images-00000.npy").unlink()
    return {"name": "others"}


def damaged_index(folder: Path) -> dict:
    (folder / "set" / "latents" / "index.json").write_text("{")
    return {}


def folder_in_use(folder: Path) -> Path:
    (folder / "home").mkdir()
    (folder / "home" / "thesis.tex").write_text("")
    return folder / "home"


def unreadable_image(folder: Path) -> Path:
    tree = photographs(folder / "images")
    (tree / "a" / "0.png").write_bytes(b"not an image")
    return tree


def unfinished_dataset(folder: Path) -> Path:
    data = packed(folder)
    (data / "index.json").unlink()
    return data


def patched(prepare: Callable, **targets: object):
    """The same with functions replaced."""

    def patch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        argv = prepare(tmp_path, monkeypatch)
        for target, value in targets.items():
            monkeypatch.setattr(target.replace("__", "."), value)
        return argv

    return patch


def full(*args, **kwargs):
    raise OSError(28, "No space left on device", "latents-00000.npy")


def in_environment(**variables: str):
    def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return with_flags()(tmp_path, monkeypatch)

    return prepare


def features_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    no_dinov2(tmp_path / "unused", monkeypatch)
    return with_flags(cache_features=True, enc_type="dinov2-vit-s")(tmp_path, monkeypatch)


def lock_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr("dataset.packing.SHARED_LOCK_SECONDS", 0.0)
    monkeypatch.setattr("dataset.packing.LOCK_SECONDS", 0.0)
    argv = with_flags()(tmp_path, monkeypatch)
    monkeypatch.setattr("dataset.packing._try_lock", lambda descriptor: False)
    return argv


no_space = namedtuple("usage", "total used free")(10**9, 10**9 - 5, 5)
RUNNING = json.dumps({"state": "running", "step": 7, "max_train_steps": 9})

CASES = [
    Case("no data", with_flags(data_dir=None), ("--data-dir", "preprocessing.py")),
    Case("data missing", with_flags(data_dir="/no/such/folder", name="./x"), ("/no/such/folder",)),
    Case("data unfinished", with_flags(data_dir=unfinished_dataset, name="./x"), ("not finished", "preprocessing.py")),
    Case("image shard lost", after_a_cache(lost_shard), ("images-00000.npy is missing",)),
    Case("unreadable image", with_flags(data_dir=unreadable_image, resolution=32, name=lambda f: f / "cache"),
         ("0.png", "preprocessing.py")),
    Case("another resolution", with_flags(resolution=64), ("32 px", "64 px")),
    Case("a name beside class folders",
         with_flags(data_dir=lambda folder: photographs(folder / "images"), resolution=32),
         ("not a packed dataset", "./latents")),
    Case("name is not a name", with_flags(name=".."), ("--vae-latents-name", "is not a name")),
    Case("cache is a file", with_flags(name=written("cache", "x")), ("--vae-latents-name", "is a file")),
    Case("cache holds other files", with_flags(name=folder_in_use), ("thesis.tex", "--vae-latents-name")),
    Case("cache is the dataset", with_flags(name=lambda folder: folder / "set"),
         ("set holds packed images", "--vae-latents-name")),
    Case("cache damaged", after_a_cache(damaged_index), ("index.json is damaged", "the command that made it")),
    Case("architecture without weights", with_flags(vae="f4d4-tiny"), ("f4d4-tiny", "--vae-ckpt")),
    Case("random VAE", with_flags(vae="f4d4-tiny", vae_ckpt="none"), ("--vae-ckpt none", "--dry-run")),
    Case("random weights for real", with_flags(random_weights=True), ("--random-weights", "--dry-run")),
    Case("unknown VAE", with_flags(vae="f3d7"), ("f3d7", "f16d32")),
    Case("VAE folder missing", with_flags(vae_ckpt="/no/vae"), ("--vae-ckpt", "/no/vae")),
    Case("not a VAE's folder", with_flags(vae=vae_that(another_class)), ("UNet2DModel",)),
    Case("VAE weights truncated", with_flags(vae=vae_that(truncated)), ("do not load",)),
    Case("VAE of another architecture", with_flags(vae="f8d4", vae_ckpt=lambda folder: save_vae(folder / "run")),
         ("block_out_channels", "f8d4")),
    Case("statistics of another VAE", with_flags(vae=vae_that(other_statistics)), ("8 channels", "with 4")),
    Case("training not finished", with_flags(vae=status(RUNNING)), ("running at step 7", "--allow-unfinished")),
    Case("status damaged", with_flags(vae=status("{")), ("status.json is damaged",)),
    Case("resolution does not fit the VAE",
         with_flags(data_dir=lambda folder: photographs(folder / "images"), resolution=42, name=lambda f: f / "cache"),
         ("42", "downsampling 4")),
    Case("another VAE", after_a_cache(lambda folder: {"vae": save_vae(folder / "other", seed=1)}),
         ("another --vae-ckpt", "another --vae-latents-name")),
    Case("another dtype", after_a_cache(lambda folder: {"dtype": "float32"}), ("--dtype", "float16", "float32")),
    Case("another precision", after_a_cache(lambda folder: {"mixed_precision": "bf16"}), ("--mixed-precision", "bf16")),
    Case("another dataset", after_a_cache(lambda folder: {
        "data_dir": folder / "images", "resolution": 32, "name": folder / "set" / "latents"}),
         ("another --data-dir", "photographs")),
    Case("unknown dtype", with_flags(dtype="float64"), ("--dtype", "float16")),
    Case("no batch", with_flags(pproc_batch_size=0), ("--pproc-batch-size", "at least 1")),
    Case("abbreviated flag", with_flags(pproc=1), ("--pproc",)),
    Case("features without a VFM", with_flags(cache_features=True), ("--enc-type", "dinov2-vit-b")),
    Case("a VFM without features", with_flags(enc_type="efficientnet-lite0"), ("--cache-features",)),
    Case("no grid", with_flags(cache_features=True, enc_type="dinov2-vit-b", features_grid=0), ("--features-grid",)),
    Case(
        "one of two VFMs unknown",
        with_flags(cache_features=True, enc_type="efficientnet-lite0,dino9"),
        ("--enc-type dino9 is not known",),
    ),
    Case("unknown VFM", with_flags(cache_features=True, enc_type="dino9"), ("dino9", "dinov2-vit-b")),
    Case("VFM without weights", features_without_weights, ("--enc-ckpt", "VFM_DIR")),
    Case("latents over float16", spoiled_by(too_large), ("images-00000.npy[0]", "65504", "--dtype float32")),
    Case("latents not finite", spoiled_by(overflow), ("images-00000.npy[0]", "not finite")),
    Case("not enough space", patched(with_flags(), shutil__disk_usage=lambda path: no_space),
         ("0.00 GB are free", "--dtype float16", "--hflip")),
    Case("disk full", patched(with_flags(), dataset__shards__os__pwrite=full), ("no space left", "kept"),
         keeps_work=True),
    Case("folder locked", lock_held, ("another run is writing", "--vae-latents-name"), keeps_work=True),
    Case("rank without a world", in_environment(RANK="3"), ("RANK=3", "WORLD_SIZE=1")),
]  # fmt: skip
