"""What a user can get wrong with probe.py, and what the one line must say."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from dataset.toy import write_toy_dataset
from metrics.record import Measurement, write_measurement
from tests.annotated_sets import write_awa2, write_celeba, write_deepfashion, write_kaggle_celeba
from tests.bad_inputs.cache_latents_cases import RUNNING, packed, status, vae_that
from tests.bad_inputs.case import Case
from tests.bad_inputs.train_sendvae_cases import photographs, truncated, written
from tests.command_line import argv_of
from tests.latent_caches import save_vae


def toy(folder: Path) -> Path:
    write_toy_dataset(folder / "toy", 30, 32, seed=0, num_workers=1)
    return folder / "toy"


def with_flags(*what: str, **changes):
    """A case that differs from a working command in some flags; callables are given the case's folder."""

    def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        values = {"data": toy, "vae": lambda folder: save_vae(folder / "run"), "resolution": 32, "num_workers": 0}
        values = {key: value(tmp_path) if callable(value) else value for key, value in (values | changes).items()}
        return [*(what or ("attributes",)), *argv_of(values)]

    return prepare


def edited(write: Callable[[Path], Path], file: str, edit: Callable[[str], str] | None):
    """A set with a file changed, or removed where edit is None."""

    def make(folder: Path) -> Path:
        path = write(folder) / file
        if edit is None:
            path.unlink()
        else:
            path.write_text(edit(path.read_text()))
        return next(parent for parent in path.parents if parent.name in ("set", "toy"))

    return make


def made(write: Callable[[Path], Path]):
    """A set below a folder that does not exist yet."""

    def make(folder: Path) -> Path:
        (folder / "set").mkdir()
        return write(folder / "set")

    return make


celeba, kaggle, deepfashion, awa2 = (
    partial(edited, made(write)) for write in (write_celeba, write_kaggle_celeba, write_deepfashion, write_awa2)
)


def numbered(text: str) -> str:
    """Another column, with a number of its own for each file."""
    header, *rows = text.splitlines()
    many = [f"{row},{place}" for place, row in enumerate(rows * 4)]
    return "\n".join([f"{header},serial", *many])


def latin1(folder: Path) -> Path:
    data = toy(folder)
    lines = (data / "attributes.csv").read_bytes().splitlines()
    lines[3] += "café".encode("latin-1")
    (data / "attributes.csv").write_bytes(b"\n".join(lines))
    return data


def without_test_images(text: str) -> str:
    header, *rows = text.splitlines()
    return "\n".join([f"{header},split", *(f"{row},{('train', 'val')[n % 2]}" for n, row in enumerate(rows))])


def collapsed(folder: Path) -> Path:
    def spoil(tokenizer) -> None:
        with torch.no_grad():
            tokenizer.network.quant_conv.weight.zero_()

    return save_vae(folder / "run", change=spoil)


def other_classes(folder: Path) -> Path:
    return photographs(folder / "others")


def one_class(folder: Path) -> Path:
    data = photographs(folder / "one")
    for path in (data / "b").iterdir():
        path.rename(data / "a" / f"b{path.name}")
    (data / "b").rmdir()
    for number in range(8):
        (data / "a" / f"c{number}.png").write_bytes((data / "a" / "0.png").read_bytes())
    return data


def diverged(folder: Path) -> Path:
    def spoil(tokenizer) -> None:
        with torch.no_grad():
            tokenizer.network.quant_conv.weight.fill_(float("nan"))

    return save_vae(folder / "run", change=spoil)


def little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr("metrics.encoding.available_memory", lambda: 1000)
    return with_flags("uniformity")(tmp_path, monkeypatch)


def another_vae_was_probed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    measurement = Measurement("probe-uniformity", "probe", {}, 9, {"path": "raw pixels"}, settings={"data": "x"})
    write_measurement(measurement, tmp_path / "out")
    return with_flags("uniformity", output_dir=tmp_path / "out")(tmp_path, monkeypatch)


def two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("WORLD_SIZE", "2")
    return with_flags()(tmp_path, monkeypatch)


CASES = [
    Case("no probe", lambda folder, monkeypatch: ["--vae", "x"], ("WHAT",)),
    Case("unknown probe", with_flags("attribute"), ("attribute", "uniformity")),
    Case("no data", with_flags(data=None), ("--data is needed",)),
    Case("training not finished", with_flags(vae=status(RUNNING)), ("running at step 7", "--allow-unfinished")),
    Case("data missing", with_flags("classes", data="/no/such/folder"), ("/no/such/folder",)),
    Case("no attributes there", with_flags(data=lambda f: photographs(f / "images")),
         ("holds no attributes", "attributes.csv")),
    Case("a packed set has no attributes", with_flags(data=packed), ("holds no attributes", "list_attr_celeba.txt")),
    Case("another layout", with_flags(attributes="celeba"), ("list_attr_celeba.txt",)),
    Case("CelebA without partition", with_flags(data=celeba("Eval/list_eval_partition.txt", None)),
         ("list_eval_partition.txt",)),
    Case("CelebA truncated", with_flags(data=celeba("Anno/list_attr_celeba.txt", lambda text: text[:-20])),
         ("list_attr_celeba.txt has 3 rows", "says 4")),
    Case("CelebA of ragged rows",
         with_flags(data=celeba("Anno/list_attr_celeba.txt", lambda text: text.rstrip()[:-2])),
         ("row 4", "3 attributes")),
    Case("CelebA of other counts",
         with_flags(data=celeba("Anno/list_attr_celeba.txt", lambda text: text.replace("4\n", "9\n", 1))),
         ("4 rows", "says 9")),
    Case("CelebA without its images", with_flags(data=celeba("img_align_celeba/000001.jpg", None)),
         ("does not hold the image 000001.jpg",)),
    Case("CelebA's partition is strange",
         with_flags(data=celeba("Eval/list_eval_partition.txt", lambda text: text.replace(" 2", " 7"))),
         ("000004.jpg", "0, 1 or 2")),
    Case("CelebA's csv without rows",
         with_flags(data=kaggle("list_attr_celeba.csv", lambda text: text.splitlines()[0])),
         ("list_attr_celeba.csv has no rows",)),
    Case("CelebA's csv of ragged rows",
         with_flags(data=kaggle("list_attr_celeba.csv", lambda text: text.rstrip()[:-2])), ("row 4", "3 attributes")),
    Case("DeepFashion without categories", with_flags(data=deepfashion("Anno/list_category_img.txt", None)),
         ("list_category_img.txt",)),
    Case("DeepFashion's split is strange",
         with_flags(data=deepfashion("Eval/list_eval_partition.txt", lambda text: text.replace("val\n", "dev\n"))),
         ("'dev'", "train, val, test")),
    Case("AwA2's matrix is not whole",
         with_flags(data=awa2("predicate-matrix-binary.txt", lambda text: text.splitlines()[0])),
         ("2 classes × 3 attributes",)),
    Case("csv without rows", with_flags(data=edited(toy, "attributes.csv", lambda text: text.splitlines()[0])),
         ("attributes.csv has no rows",)),
    Case("csv of uneven rows", with_flags(data=edited(toy, "attributes.csv", lambda text: f"{text}circle/9.png,x\n")),
         ("line 32", "7", "2 columns")),
    Case("csv with a serial number", with_flags(data=edited(toy, "attributes.csv", numbered)),
         ("column serial", "120 different values")),
    Case("csv names a file that is not there",
         with_flags(data=edited(toy, "attributes.csv", lambda text: text.replace("00.png", "99999.png"))),
         ("99999.png",)),
    Case("csv not in UTF-8", with_flags(data=latin1), ("attributes.csv, line 4: not UTF-8", "save")),
    Case("csv of an open quotation",
         with_flags(data=edited(toy, "attributes.csv", lambda text: text + '"' + 200_000 * "x")),
         ("attributes.csv, line 32", "field", "quotation")),
    Case("csv whose split has no test images", with_flags(data=edited(toy, "attributes.csv", without_test_images)),
         ("none of 30 images is for test", "complete its split")),
    Case("uniformity of a collapsed VAE", with_flags("uniformity", vae=collapsed), ("has collapsed",)),
    Case("mixtures of a collapsed VAE", with_flags("discrimination", vae=collapsed, components="2"),
         ("latents are constant", "has collapsed")),
    Case("pictures of a collapsed VAE", with_flags("pictures", vae=collapsed), ("has collapsed",), keeps_work=True),
    Case("uniformity of two images", with_flags("uniformity", num_points=2), ("--num-points 2", "at least 3")),
    Case("a measurement of another VAE is there", another_vae_was_probed,
         ("probe-uniformity.json", "raw pixels", "--name")),
    Case("an empty part of the split", with_flags(max_images=1), ("none of 1 images",)),
    Case("one class only", with_flags("classes", data=one_class), ("all of one class",)),
    Case("a test set of other classes", with_flags("classes", val_data=other_classes), ("--val-data", "same classes")),
    Case("a test set for attributes", with_flags(val_data=toy), ("--val-data", "leave it out")),
    Case("no VAE", with_flags(vae=None), ("--vae is needed",)),
    Case("VAE weights truncated", with_flags(vae=vae_that(truncated)), ("do not load",)),
    Case("VAE diverged", with_flags(vae=diverged), ("not finite", "diverged")),
    Case("a VAE beside raw pixels", with_flags(features="pixels"), ("--features pixels", "leave out --vae")),
    Case("a VAE beside a VFM", with_flags(features="dinov2-vit-s"), ("--features dinov2-vit-s", "leave out --vae")),
    Case("an unknown VFM", with_flags(features="dinov2-vit-x", vae=None, output_dir=lambda path: path / "out"),
         ("--features dinov2-vit-x is not known", "did you mean dinov2-vit", "timm/NAME")),
    Case("a grid without a VFM", with_flags(features_grid=4), ("--features-grid is for a VFM", "leave it out")),
    Case("raw pixels without a place", with_flags(features="pixels", vae=None), ("--output-dir is needed",)),
    Case("random VAE without a place", with_flags(vae="f4d4-tiny", vae_ckpt="none"), ("--output-dir is needed",)),
    Case("output is a file", with_flags(output_dir=written("out", "x")), ("--output-dir", "is a file")),
    Case("too many components", with_flags("discrimination", components="400"), ("--components 400", "21 training")),
    Case("components are not numbers", with_flags("discrimination", components="4,x"), ("--components 4,x",)),
    Case("too few images for a mixture", with_flags("discrimination", max_images=12), ("8 training images",)),
    Case("one picture", with_flags("pictures", num_pictures=1), ("--num-pictures 1",)),
    Case("not enough memory", little_memory, ("GB of memory", "--max-images")),
    Case("several processes", two_processes, ("one process", "probe.sh")),
    Case("name is a path", with_flags(name="a/b"), ("--name a/b",)),
]  # fmt: skip
