"""Damage in packed data is told by the file's name: at opening, as it is read into memory or copied, or by --verify."""

import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

import cache_latents
import evaluate
import preprocessing
import train_ldm
from dataset.images import open_images
from dataset.latents import LatentDataset
from dataset.loader import stage_dataset
from dataset.shards import PackedReader
from dataset.verification import verify
from errors import UserError
from formats.vae import load_tokenizer
from metrics.sources import open_image_set
from runtime.cli import EXIT_USER_ERROR, run
from tests.latent_caches import save_vae, write_cache
from tests.photographs import write_class_folders


def flip_bit(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def pack(folder: Path, codec: str = "raw") -> Path:
    tree = write_class_folders(folder / "tree")
    argv = ["--imagenet-path", str(tree), "--output-path", str(folder / "set"), "--resolution", "32"]
    preprocessing.main([*argv, "--shard-size", "10", "--num-workers", "1", "--codec", codec])
    return folder / "set"


def read(images) -> None:
    images.read_into(range(len(images)), np.empty((len(images), 3, 32, 32), np.uint8))


@pytest.mark.parametrize("place", [-1, -5, 140])  # the last label's bytes, and the first's
def test_labels_are_compared_at_opening(tmp_path, place):
    packed = pack(tmp_path)
    flip_bit(packed / "labels.npy", place)
    with pytest.raises(UserError, match=r"labels\.npy is damaged.*preprocessing"):
        open_images(packed)


def test_labels_of_no_class_are_refused(tmp_path):
    packed = pack(tmp_path)
    index = json.loads((packed / "index.json").read_text())
    index["class_names"].pop()
    (packed / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"labels\.npy has labels of 0 to 2 for 2 classes"):
        open_images(packed)


@pytest.mark.parametrize("place", [0, 8, 60])  # magic, length and text of an array's header
def test_a_shard_s_header_is_named(tmp_path, place):
    packed = pack(tmp_path)
    flip_bit(packed / "images-00001.npy", place)
    with pytest.raises(UserError, match=r"images-00001\.npy (is damaged|holds)"):
        read(open_images(packed))


def test_offsets_are_compared_as_the_shard_is_opened(tmp_path):
    packed = pack(tmp_path, "png")
    flip_bit(packed / "images-00002-offsets.npy", -8)
    with pytest.raises(UserError, match=r"images-00002-offsets\.npy is damaged"):
        read(open_images(packed))


@pytest.mark.parametrize("place", [0, 20, 45, 200])  # signature, width, and compressed pixels
def test_a_damaged_png_is_named(tmp_path, place):
    packed = pack(tmp_path, "png")
    reader = PackedReader(packed)
    start = len((packed / "images-00001.npy").read_bytes()) - int(np.load(packed / "images-00001-offsets.npy")[-1])
    flip_bit(packed / "images-00001.npy", start + place)
    with pytest.raises(UserError, match=r"images-00001\.npy\[0\] is damaged"):
        read(open_images(packed))
    with pytest.raises(UserError, match=r"images-00001\.npy is damaged"):
        reader.verify()


def test_pixels_are_compared_by_verify_each_process_its_share(tmp_path):
    packed = pack(tmp_path)
    verify([open_images(packed), None])
    flip_bit(packed / "images-00001.npy", -1)
    images = open_images(packed)
    read(images)  # nobody would notice
    found = []
    for rank in range(3):
        try:
            verify([images], rank, 3)
        except UserError as error:
            found.append((rank, str(error).partition(" ")[0]))
    assert found == [(2, str(packed / "images-00001.npy"))]  # labels, images-00000, images-00001, …


def test_staging_does_not_copy_damage(tmp_path):
    packed = pack(tmp_path)
    flip_bit(packed / "images-00001.npy", -1)
    with pytest.raises(UserError, match=r"set/images-00001\.npy is damaged"):
        stage_dataset(packed, tmp_path / "local")
    assert not list((tmp_path / "local").rglob("*00001*"))


def test_latents_are_compared_as_they_are_read_into_memory(tmp_path):
    cache = tmp_path / "cache"
    write_cache(cache)
    LatentDataset(cache)
    shard = sorted(cache.glob("latents-*.npy"))[-1]
    flip_bit(shard, -1)
    with pytest.raises(UserError, match=rf"{shard.name} is damaged"):
        LatentDataset(cache)
    item_by_item = LatentDataset(cache, memory_limit=0)
    with pytest.raises(UserError, match=rf"{shard.name} is damaged"):
        verify([item_by_item])


def test_scripts_verify_before_they_begin(tmp_path, capsys):
    packed = pack(tmp_path)
    flip_bit(packed / "images-00003.npy", -1)
    cache = ["--data-dir", str(packed), "--vae", "f4d4-tiny", "--vae-ckpt", "none", "--dry-run"]
    assert run(cache_latents.main, [*cache, "--verify"]) == EXIT_USER_ERROR
    assert "images-00003.npy is damaged" in capsys.readouterr().err
    write_cache(tmp_path / "cache")
    exps = tmp_path / "exps"
    train = ["--data-dir", str(packed), "--output-dir", str(exps), "--exp-name", "a"]
    train += ["--vae-latents-name", str(tmp_path / "cache"), "--model", "SiT-Ti/2", "--proj-coeff", "0"]
    flip_bit(sorted((tmp_path / "cache").glob("latents-*.npy"))[0], -1)
    assert run(train_ldm.main, [*train, "--verify"]) == EXIT_USER_ERROR
    assert ".npy is damaged" in capsys.readouterr().err
    assert not exps.exists()


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "latents_stats.safetensors"])
def test_a_vae_is_compared_with_the_checksum_in_its_files(tmp_path, name):
    """Which diffusers passes over; a file that somebody wrote anew has none, and is taken."""
    vae = save_vae(tmp_path)
    whole = (vae / name).read_bytes()
    assert AutoencoderKL.from_pretrained(vae).config.latent_channels == 4
    for place in (len(whole) - 1, len(whole) - 17, whole.index(b"sha256") + 20):
        flip_bit(vae / name, place)
        with pytest.raises(UserError, match=rf"{name}.*differs from the checksum in its header"):
            load_tokenizer(str(vae))
        (vae / name).write_bytes(whole)
    save_file({key: 2 * tensor for key, tensor in load_file(vae / name).items()}, vae / name)
    load_tokenizer(str(vae))


def test_images_are_compared_before_they_are_measured(tmp_path, capsys):
    packed = pack(tmp_path)
    flip_bit(packed / "images-00001.npy", -1)
    vae = ["--vae", str(save_vae(tmp_path)), "--metrics", "psnr"]
    assert run(evaluate.main, ["reconstruction", "--data", str(packed), *vae]) == EXIT_USER_ERROR
    assert "images-00001.npy is damaged" in capsys.readouterr().err
    assert not (tmp_path / "metrics").exists()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=pixels)
    open_image_set(tmp_path / "images.npz", "--samples")
    flip_bit(tmp_path / "images.npz", 5000)
    with pytest.raises(UserError, match=r"images\.npz is damaged"):
        open_image_set(tmp_path / "images.npz", "--samples")
