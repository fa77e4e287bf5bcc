"""Files that are no VAE, or not the one that was meant, given to export_vae.py: what the one line must say."""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from tests.bad_inputs.case import Case
from tests.vae_files import random_discriminator, tiny_ldm_state

MARK = "THE-CODE-RAN"


class Code:
    """Pickled, it would write a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "ran")


def given(write: Callable[[Path], object], name: str = "vae.pt", *flags: str):
    """A source that ``write`` makes, as the command line of an export."""

    def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        write(tmp_path / name)
        words = [word.replace("TMP", str(tmp_path)) for word in flags]
        return [str(tmp_path / name), str(tmp_path / "out.pt"), "--format", "ldm", *words]

    return prepare


def below_a_file(out: str, layout: str):
    """OUT below a file of the case's folder."""

    def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        torch.save(tiny_ldm_state(), tmp_path / "vae.pt")
        (tmp_path / "thesis.txt").write_text("")
        return [str(tmp_path / "vae.pt"), str(tmp_path / out), "--format", layout, "--vae", "f4d4-tiny"]

    return prepare


def saved(content: object) -> Callable[[Path], object]:
    return lambda path: torch.save(content, path)


def cut(write: Callable[[Path], object]) -> Callable[[Path], object]:
    """What ``write`` makes, without its second half."""

    def prepare(path: Path) -> None:
        write(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return prepare


def with_code(path: Path) -> None:
    torch.save({"state_dict": tiny_ldm_state(), "callback": Code(path.with_name(MARK))}, path)


def pickled_code(path: Path) -> None:
    path.write_bytes(pickle.dumps({"vae": Code(path.with_name(MARK))}))


def changed(**tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    return tiny_ldm_state() | {name.replace("__", "."): tensor for name, tensor in tensors.items()}


def without(part: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tiny_ldm_state().items() if not name.startswith(part)}


def of_statistics(content: dict) -> Callable[[Path], object]:
    """A good VAE, and a file of statistics beside it."""

    def write(path: Path) -> None:
        torch.save(tiny_ldm_state(), path)
        torch.save(content, path.with_name("statistics.pt"))

    return write


def folder_of(config: str | None) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        path.mkdir()
        if config is not None:
            (path / "config.json").write_text(config)

    return write


def moments(channels: int, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"mean": torch.zeros(1, channels, 1, 1), "std": torch.ones(1, channels, 1, 1)} | changes


def spoiled(tensor: object, *flags: str, name: str = "encoder.conv_in.weight"):
    """A VAE with another entry of this name."""
    return given(saved(tiny_ldm_state() | {name: tensor}), "vae.pt", *flags)


def lacking(*names: str, width: int = 16, flags: tuple[str, ...] = ("--vae", "f4d4-tiny")):
    state = {name: tensor for name, tensor in tiny_ldm_state(width=width).items() if name not in names}
    return given(saved(state), "vae.pt", *flags)


def configured(**values: object):
    """A diffusers folder's config.json alone, whose values are looked at before the weights."""
    return given(folder_of(json.dumps({"_class_name": "AutoencoderKL"} | values)), "folder")


FIRST_BLOCKS = tuple(f"encoder.down.{level}.block.0.conv1.weight" for level in (0, 1))
WEIGHT = (16, 3, 3, 3)
STATISTICS = ("vae.pt", "--vae-latents-stats", "TMP/statistics.pt")
UNET = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3)}
SIT = {"x_embedder.proj.weight": torch.zeros(8, 4, 2, 2), "pos_embed": torch.zeros(1, 16, 8)}
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
OTHER_CLASS = json.dumps({"_class_name": "UNet2DModel"})
NOT_A_NUMBER = moments(4, mean=torch.full((4,), torch.nan))
OPTIMIZER = torch.optim.AdamW(nn.Linear(2, 2).parameters()).state_dict()

CASES = [
    Case("a file below a file", below_a_file("thesis.txt/out.pt", "ldm"), ("thesis.txt", "file", "folder")),
    Case("a folder below a file", below_a_file("thesis.txt/out", "diffusers"), ("thesis.txt", "file", "folder")),
    Case("deep below a file", below_a_file("thesis.txt/a/b/out.pt", "ldm"), ("thesis.txt", "file", "folder")),
    Case("too long a name", below_a_file("x" * 300 + ".pt", "ldm"), ("name is too long",)),
    Case("no such file", given(lambda path: None), ("vae.pt",)),
    Case("empty", given(lambda path: path.write_bytes(b"")), ("vae.pt", "empty")),
    Case("text", given(lambda path: path.write_text("weights, soon")), ("vae.pt", "text")),
    Case("web page", given(lambda path: path.write_text("<!DOCTYPE html><html></html>")), ("web page",)),
    Case(
        "git-LFS pointer", given(lambda path: path.write_text("version https://git-lfs.github.com/spec/v1")), ("LFS",)
    ),
    Case("image", given(lambda path: Image.new("RGB", (8, 8)).save(path, "PNG")), ("an image",)),
    Case("NumPy array", given(lambda path: np.save(path.open("wb"), np.zeros(3))), ("NumPy",)),
    Case("npz", given(lambda path: np.savez(path.open("wb"), a=np.zeros(3))), ("vae.pt",)),
    Case("zip of something", given(lambda path: zipfile.ZipFile(path, "w").close()), ("vae.pt",)),
    Case("truncated zip", given(cut(saved(tiny_ldm_state()))), ("vae.pt", "truncated")),
    Case("truncated safetensors", given(cut(lambda path: save_file(tiny_ldm_state(), path))), ("vae.pt", "truncated")),
    Case("pickle with code", given(pickled_code), ("vae.pt",)),
    Case("code in a checkpoint", given(with_code), ("vae.pt", "code")),
    Case("a list", given(saved([1, 2])), ("vae.pt", "list")),
    Case("optimizer only", given(saved({"optimizer": OPTIMIZER, "step": 3})), ("vae.pt", "optimizer")),
    Case("a discriminator", given(saved(random_discriminator().state_dict())), ("vae.pt", "discriminator")),
    Case("a SiT", given(saved({"ema": SIT, "model": SIT, "steps": 3})), ("vae.pt",)),
    Case("a U-Net", given(saved({"state_dict": UNET})), ("vae.pt",)),
    Case("encoder only", given(saved(without("decoder."))), ("vae.pt", "decoder")),
    Case("decoder only", given(saved(without("encoder."))), ("vae.pt", "encoder")),
    Case("missing key", given(saved(without("decoder.conv_out.bias"))), ("decoder.conv_out.bias",)),
    Case("vector-quantised", given(saved(changed(quantize__embedding__weight=torch.zeros(8, 4)))), ("quantize",)),
    Case("another architecture", given(saved(tiny_ldm_state()), "vae.pt", "--vae", "f8d4"), ("--vae f8d4", "vae.pt")),
    Case("folder without config", given(folder_of(None), "folder"), ("folder", "config.json")),
    Case("config that is not JSON", given(folder_of("{"), "folder"), ("folder", "config.json")),
    Case("config of another class", given(folder_of(OTHER_CLASS), "folder"), ("UNet2DModel",)),
    Case("statistics of other channels", given(of_statistics(moments(7)), *STATISTICS), ("statistics.pt", "7")),
    Case(
        "statistics with NaN",
        given(of_statistics(NOT_A_NUMBER), *STATISTICS),
        ("stat",),
    ),
    Case(
        "statistics of zero std",
        given(of_statistics(moments(4, std=torch.zeros(4))), *STATISTICS),
        ("stat", "not positive"),
    ),
    Case(
        "REPA's statistics for other channels",
        given(saved(tiny_ldm_state(latent_channels=8, width=32)), "vae.pt", "--vae-latents-stats", "repa"),
        ("--vae-latents-stats repa", "4 channels", "8"),
    ),
    *(Case(f"{name} missing", lacking(name), (f"1 missing: {name}",)) for name in FIRST_BLOCKS),
    *(
        Case(f"{name} missing, no --vae", lacking(name, width=32, flags=()), (f"1 missing: {name}",))
        for name in FIRST_BLOCKS
    ),
    Case("the first layer missing", lacking("encoder.conv_in.weight"), ("1 missing: encoder.conv_in.weight",)),
    Case("1-D convolution", spoiled(torch.ones(5)), ("encoder.conv_in.weight", "(5,)")),
    Case("0-D convolution", spoiled(torch.ones(()), "--vae", "f4d4-tiny"), ("encoder.conv_in.weight", "()")),
    Case("sparse", spoiled(torch.ones(WEIGHT).to_sparse()), ("encoder.conv_in.weight is sparse",)),
    Case("on the meta device", spoiled(torch.ones(WEIGHT, device="meta")), ("encoder.conv_in.weight has no values",)),
    Case("complex", spoiled(torch.ones(WEIGHT, dtype=torch.complex64)), ("encoder.conv_in.weight is complex",)),
    Case("int8", spoiled(torch.ones(WEIGHT, dtype=torch.int8), "--vae", "f4d4-tiny"), ("torch.int8", "unquantised")),
    Case("NaN", spoiled(torch.full(WEIGHT, torch.nan), "--vae", "f4d4-tiny"), ("conv_in.weight is not finite",)),
    Case(
        "a mean that is not a tensor",
        given(saved(tiny_ldm_state() | {"statistics.mean": [0], "statistics.var": torch.ones(4)}), "vae.pt"),
        ("statistics.mean is not a tensor",),
    ),
    Case(
        "variances of zero",
        given(of_statistics({"mean": torch.zeros(4), "var": torch.zeros(4)}), *STATISTICS, "--vae", "f4d4-tiny"),
        ("statistics.pt", "variance is 0 in every channel"),
    ),
    Case("no widths", configured(block_out_channels=[]), ("config.json", "block_out_channels is []")),
    Case("a mean of text", configured(latents_mean="x", latents_std=[1.0]), ("config.json", 'latents_mean is "x"')),
    Case("a mean of null", configured(latents_mean=[None]), ("config.json", "latents_mean is [null]")),
    Case("no factor", configured(scaling_factor=None), ("config.json", "scaling_factor is null")),
    Case("no statistics in the file", given(of_statistics({"a": torch.ones(4)}), *STATISTICS), ("statistics.pt",)),
]
