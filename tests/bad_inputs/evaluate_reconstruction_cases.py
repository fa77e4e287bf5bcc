"""What a user can get wrong with evaluate.py reconstruction, and what the one line must say."""

from pathlib import Path

import pytest
import torch

from tests.bad_inputs.cache_latents_cases import (
    RUNNING,
    other_statistics,
    packed,
    status,
    unfinished_dataset,
    unreadable_image,
    vae_that,
)
from tests.bad_inputs.case import Case
from tests.bad_inputs.train_sendvae_cases import another_class, photographs, truncated, written
from tests.command_line import argv_of
from tests.latent_caches import save_vae


def with_flags(**changes):
    """A case that differs from a working command in some flags; callables are given the case's folder."""

    def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        values = {"data": packed, "vae": lambda folder: save_vae(folder / "run"), "num_workers": 0} | changes
        values = {"metrics": "psnr,ssim"} | values
        values = {key: value(tmp_path) if callable(value) else value for key, value in values.items()}
        return ["reconstruction", *argv_of(values)]

    return prepare


def lpips_unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    def unreachable(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", unreachable)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    return with_flags(metrics="psnr,lpips-alex")(tmp_path, monkeypatch)


def diverged(folder: Path) -> Path:
    def spoil(tokenizer) -> None:
        with torch.no_grad():
            tokenizer.network.quant_conv.weight.fill_(float("nan"))

    return save_vae(folder / "run", change=spoil)


CASES = [
    Case("no data", with_flags(data=None), ("--data", "packed dataset")),
    Case("training not finished", with_flags(vae=status(RUNNING)), ("running at step 7", "--allow-unfinished")),
    Case("data missing", with_flags(data="/no/such/folder"), ("/no/such/folder",)),
    Case("data unfinished", with_flags(data=unfinished_dataset), ("not finished", "preprocessing.py")),
    Case("another resolution", with_flags(resolution=64), ("32 px", "64 px")),
    Case("unreadable image", with_flags(data=unreadable_image, resolution=32), ("0.png", "preprocessing.py")),
    Case("resolution does not fit the VAE", with_flags(data=lambda f: photographs(f / "images"), resolution=42),
         ("42", "downsampling 4")),
    Case("no VAE", with_flags(vae=None), ("--vae is needed",)),
    Case("unknown VAE", with_flags(vae="f3d7"), ("f3d7", "f16d32")),
    Case("architecture without weights", with_flags(vae="f4d4-tiny", output_dir=lambda f: f / "out"), ("--vae-ckpt",)),
    Case("random VAE without a place", with_flags(vae="f4d4-tiny", vae_ckpt="none"), ("--output-dir is needed",)),
    Case("not a VAE's folder", with_flags(vae=vae_that(another_class)), ("UNet2DModel",)),
    Case("VAE weights truncated", with_flags(vae=vae_that(truncated)), ("do not load",)),
    Case("statistics of another VAE", with_flags(vae=vae_that(other_statistics)), ("8 channels", "with 4")),
    Case("VAE diverged", with_flags(vae=diverged), ("not finite", "diverged")),
    Case("unknown metric", with_flags(metrics="psnr,fvd"), ("fvd", "lpips-alex")),
    Case("LPIPS asked for without weights", lpips_unreachable,
         ("alexnet-owt-7be5be79.pth", "--lpips-alex-ckpt", "--metrics psnr")),
    Case("LPIPS weights missing", with_flags(metrics="lpips-vgg", lpips_ckpt="/no/vgg.pth"),
         ("--lpips-ckpt /no/vgg.pth", "no such file")),
    Case("LPIPS weights of nothing",
         with_flags(metrics="lpips-alex", lpips_alex_ckpt=written("alexnet.pth", b"no weights")), ("alexnet.pth",)),
    Case("too small for LPIPS",
         with_flags(data=lambda f: photographs(f / "images"), resolution=28, metrics="lpips-alex"),
         ("31 px", "not 28", "--metrics psnr")),
    Case("unknown features", with_flags(metrics="rfid", features="efficientnet-lite"),
         ("did you mean efficientnet-lite0",)),
    Case("rFID of one image", with_flags(metrics="rfid", num_images=1), ("at least 2 images",)),
    Case("Inception weights missing", with_flags(metrics="rfid", inception_ckpt="/no/inception.pth"),
         ("--inception-ckpt /no/inception.pth", "no such file")),
    Case("output is a file", with_flags(output_dir=written("out", "x")), ("--output-dir", "is a file")),
    Case("name is a path", with_flags(name="a/b"), ("--name a/b",)),
    Case("no images", with_flags(num_images=0), ("--num-images", "at least 1")),
]  # fmt: skip
