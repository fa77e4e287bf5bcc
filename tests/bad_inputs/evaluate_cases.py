"""What a user can get wrong with evaluate.py generation, and what the one line must say."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from metrics.inception import POOLED, SPATIAL
from models.encoders import ENCODERS
from models.encoders.weights import find_weights
from models.weight_files import read_state_dict
from tests.bad_inputs.case import Case
from tests.command_line import argv_of
from tests.image_sets import random_images, write_folder, write_npz, write_packed


def samples(tmp_path: Path) -> Path:
    return write_npz(tmp_path / "samples.npz", random_images(6, 0))


def reference(tmp_path: Path) -> Path:
    return write_npz(tmp_path / "ref.npz", random_images(6, 1))


def with_flags(**changes: object):
    """Good samples and a good reference, changed; callables are given the case's folder. No network is built."""

    def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        values = {"samples": samples, "ref": reference, "features": "efficientnet-lite0"} | changes
        values = {key: value(tmp_path) if callable(value) else value for key, value in values.items()}
        return ["generation", *argv_of(values)]

    return prepare


def no_network(**changes: object):
    """As :func:`with_flags`, where nothing can be downloaded and torch's cache is empty."""

    def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        def refuse(*args, **kwargs):
            raise OSError("no network")

        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
        monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
        monkeypatch.setattr("models.encoders.weights._from_hub", lambda spec: None)
        monkeypatch.delenv("VFM_DIR", raising=False)
        return with_flags(**changes)(tmp_path, monkeypatch)

    return prepare


def npz(**arrays: np.ndarray):
    """An .npz of these arrays and nothing else."""

    def make(tmp_path: Path) -> Path:
        np.savez(tmp_path / "other.npz", **arrays)
        return tmp_path / "other.npz"

    return make


def statistics(**changes: np.ndarray):
    """An ADM reference with some arrays replaced."""
    arrays = {"mu": np.zeros(POOLED), "sigma": np.eye(POOLED), "mu_s": np.zeros(SPATIAL), "sigma_s": np.eye(SPATIAL)}
    return npz(**{"arr_0": random_images(6, 1)} | arrays | changes)


def cut(make: Callable[[Path], Path], share: float):
    """A file of which only the beginning is there."""

    def prepare(tmp_path: Path) -> Path:
        path = make(tmp_path)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        return path

    return prepare


def compressed_and_damaged(tmp_path: Path) -> Path:
    path = write_npz(tmp_path / "samples.npz", random_images(6, 0), compressed=True)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    return path


def empty(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def text_file(tmp_path: Path) -> Path:
    (tmp_path / "samples.txt").write_text("images")
    return tmp_path / "samples.txt"


def missing(tmp_path: Path) -> Path:
    return tmp_path / "none.npz"


def channels_first(tmp_path: Path) -> Path:
    return write_npz(tmp_path / "samples.npz", random_images(6, 0).transpose(0, 3, 1, 2).copy())


def wide(tmp_path: Path) -> Path:
    folder = empty(tmp_path)
    Image.new("RGB", (40, 32)).save(folder / "0.png")
    return folder


def of_two_sizes(tmp_path: Path) -> Path:
    folder = write_folder(tmp_path / "folder", random_images(5, 0))
    Image.new("RGB", (64, 64)).save(folder / "1" / "last.png")
    return folder


def unreadable(tmp_path: Path) -> Path:
    folder = write_folder(tmp_path / "folder", random_images(5, 0))
    (folder / "1" / "last.png").write_bytes(b"not a picture")
    return folder


def unfinished(tmp_path: Path) -> Path:
    folder = write_packed(tmp_path / "packed", random_images(6, 0))
    (folder / "index.json").unlink()
    return folder


def run_without_samples(tmp_path: Path) -> Path:
    folder = empty(tmp_path)
    (folder / "args.json").write_text("{}")
    return folder


def other_weights(tmp_path: Path) -> Path:
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    return tmp_path / "other.safetensors"


def nan_weights(tmp_path: Path) -> Path:
    state = read_state_dict(find_weights("efficientnet-lite0", ENCODERS["efficientnet-lite0"], None))
    next(iter(state.values())).fill_(torch.nan)
    torch.save(state, tmp_path / "diverged.pth")
    return tmp_path / "diverged.pth"


def pickled(tmp_path: Path) -> Path:
    torch.save({"weight": Path("code")}, tmp_path / "pickled.pth")
    return tmp_path / "pickled.pth"


FLOATS = random_images(6, 0).astype(np.float32) / 127.5 - 1
WITH_NAN = np.where(FLOATS > 0.99, np.nan, FLOATS)
OBJECTS = np.array([{"a": 1}, None], dtype=object)
NAN_SIGMA = np.diag(np.r_[np.nan, np.ones(POOLED - 1)])
INCEPTION = {"features": "inception"}
ONLY_STATISTICS = {"mu": np.zeros(POOLED), "sigma": np.eye(POOLED)}

CASES = [
    Case("no command", lambda path, _: [], ("COMMAND",)),
    Case("unknown command", lambda path, _: ["generations"], ("generations", "generation")),
    Case("no reference", lambda path, _: ["generation", "--samples", "x"], ("--ref",)),
    Case("no such samples", with_flags(samples=missing), ("--samples", "none.npz does not exist")),
    Case("no such reference", with_flags(ref=missing), ("--ref", "none.npz does not exist")),
    Case("a file of another kind", with_flags(samples=text_file), ("--samples", "no .npz")),
    Case("an empty folder", with_flags(samples=empty), ("holds no images",)),
    Case("another resolution", with_flags(ref=npz(arr_0=random_images(6, 1, side=64))), ("have 32 px", "64 px")),
    Case("floats", with_flags(samples=npz(arr_0=FLOATS)), ("float32", "uint8", "0…255")),
    Case("NaN images", with_flags(samples=npz(arr_0=WITH_NAN)), ("float", "uint8")),
    Case("one image", with_flags(samples=npz(arr_0=random_images(1, 0)), metrics="fid"), ("(1)", "at least 2")),
    Case("too few for recall", with_flags(samples=npz(arr_0=random_images(3, 0))), ("(3)", "at least 4")),
    Case("a reference of one image", with_flags(ref=npz(arr_0=random_images(1, 0)), metrics="kid"), ("--ref", "(1)")),
    Case("more than there are", with_flags(num_samples=7), ("--num-samples 7", "6 images")),
    Case("no arr_0", with_flags(samples=npz(images=random_images(6, 0))), ("no arr_0", "it has images")),
    Case("channels first", with_flags(samples=channels_first), ("[6, 3, 32, 32]",)),
    Case("Fortran order", with_flags(samples=npz(arr_0=np.asfortranarray(random_images(6, 0)))), ("Fortran",)),
    Case("a pickled array", with_flags(samples=npz(arr_0=OBJECTS)), ("pickled", "uint8")),
    Case("samples without images", with_flags(samples=npz(**ONLY_STATISTICS)), ("--samples", "no images")),
    Case("a truncated npz", with_flags(samples=cut(samples, 0.7)), ("not a complete .npz",)),
    Case("a damaged npz", with_flags(samples=compressed_and_damaged), ("damaged", "samples.npz"), keeps_work=True),
    Case("statistics without images", with_flags(**INCEPTION, ref=npz(**ONLY_STATISTICS), metrics="sfid"), ("sfid",)),
    Case("statistics of another network", with_flags(ref=npz(**ONLY_STATISTICS), metrics="fid"), ("fid", "arr_0")),
    Case("NaN statistics", with_flags(**INCEPTION, ref=statistics(sigma=NAN_SIGMA)), ("mu, sigma", "not finite")),
    Case("pickled statistics", with_flags(**INCEPTION, ref=statistics(mu=OBJECTS)), ("not readable",)),
    Case("statistics of other features", with_flags(ref=statistics(mu=np.zeros(768))), ("[768]", "[2048]")),
    Case("no covariance", with_flags(ref=statistics(sigma_s=np.tri(SPATIAL))), ("sigma_s is not a covariance",)),
    Case("sFID before the ReLU", with_flags(ref=statistics(mu_s=np.full(SPATIAL, -0.5))), ("mu_s", "-0.5", "ReLU")),
    Case("images that are not square", with_flags(samples=wide), ("40×32", "preprocessing.py")),
    Case("images of two sizes", with_flags(samples=of_two_sizes), ("last.png is 64×64", "32×32"), keeps_work=True),
    Case("a file that is not an image", with_flags(samples=unreadable), ("last.png cannot be used",), keeps_work=True),
    Case("unfinished samples", with_flags(samples=unfinished), ("is not finished",)),
    Case("a run without samples", with_flags(samples=run_without_samples), ("generate.py --exp-path",)),
    Case("unknown metric", with_flags(metrics="fid,fvd"), ("--metrics fvd", "sfid")),
    Case("sFID of another network", with_flags(metrics="sfid"), ("--metrics sfid", "Inception")),
    Case("unknown features", with_flags(features="dinov2-vit-bb"), ("did you mean dinov2-vit-b?",)),
    Case("unknown timm network", with_flags(features="timm/resnet5O"), ("did you mean timm/resnet50?",)),
    Case("no Inception weights", no_network(**INCEPTION), ("6726825d.pth", "https://", "--inception-ckpt", "hub"),
         keeps_work=True),
    Case("no such Inception file", with_flags(**INCEPTION, inception_ckpt="none.pth"), ("--inception-ckpt none.pth",)),
    Case("not Inception's weights", with_flags(**INCEPTION, inception_ckpt=other_weights), ("other.safetensors",)),
    Case("pickled weights", with_flags(**INCEPTION, inception_ckpt=pickled), ("pickled.pth", "no weights")),
    Case("no weights of a VFM", no_network(features="dinov2-vit-s"), ("--features dinov2-vit-s", "--enc-ckpt")),
    Case("no weights of timm's", no_network(features="timm/resnet10t"), ("timm/resnet10t", "--enc-ckpt")),
    Case("another timm network's", with_flags(features="timm/resnet10t", enc_ckpt=other_weights), ("no weights",)),
    Case("another VFM's", with_flags(features="dinov2-vit-s", enc_ckpt=other_weights), ("--features dinov2-vit-s",)),
    Case("weights that are not finite", with_flags(enc_ckpt=nan_weights), ("not finite",)),
    Case("a name with slashes", with_flags(name="a/b"), ("--name a/b",)),
]  # fmt: skip
