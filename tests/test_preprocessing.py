import csv
import filecmp
import importlib.util
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import preprocessing
from dataset import packing
from dataset.images import open_images
from dataset.layouts import open_source
from dataset.shards import PackedReader, ShardSpec
from errors import UserError
from runtime.cli import run
from tests.photographs import PHOTOGRAPHS, needs_photographs, write_class_folders
from tests.test_transforms import plain_center_crop

ROOT = Path(preprocessing.__file__).parent


def pack(source: Path, output: Path, *flags: str, resolution: int = 32, workers: int = 1) -> Path:
    argv = ["--imagenet-path", str(source), "--output-path", str(output), "--resolution", str(resolution)]
    assert preprocessing.main([*argv, "--num-workers", str(workers), *flags]) == 0
    return output


def assert_same_bytes(first: Path, second: Path) -> None:
    names = sorted(entry.name for entry in first.iterdir())
    assert names == sorted(entry.name for entry in second.iterdir())
    assert filecmp.cmpfiles(first, second, names, shallow=False)[0] == names


def everything(folder: Path) -> np.ndarray:
    images = open_images(folder)
    pixels = np.empty((len(images), 3, images.resolution, images.resolution), np.uint8)
    images.read_into(range(len(images)), pixels)
    return pixels


def as_dataset_json(tree: Path, root: Path) -> Path:
    """The same files under other folders, with their labels in dataset.json."""
    source, pairs = open_source(tree), []
    for index, name in enumerate(source.names):
        target = f"{index // 10:05d}/img{index:08d}{Path(name).suffix}"
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tree / name, root / target)
        pairs.append([target, int(source.labels[index])])
    random.Random(0).shuffle(pairs)
    (root / "dataset.json").write_text(json.dumps({"labels": pairs}))
    return root


def as_zip(folder: Path, path: Path, method: int, prefix: str = "") -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, prefix + file.relative_to(folder).as_posix())
    return path


def as_parquet(tree: Path, root: Path) -> Path:
    """Two train files with small row groups, and a validation file that must not be taken."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    source = open_source(tree)
    rows = [{"bytes": source.read(index), "path": name} for index, name in enumerate(source.names)]
    features = {"info": {"features": {"label": {"names": source.classes, "_type": "ClassLabel"}}}}
    root.mkdir()

    def write(name: str, first: int, last: int) -> None:
        table = pyarrow.table({"image": rows[first:last], "label": source.labels[first:last]})
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        parquet.write_table(table, root / name, row_group_size=4)

    write("train-00000-of-00002.parquet", 0, 17)
    write("train-00001-of-00002.parquet", 17, len(rows))
    write("validation-00000-of-00001.parquet", 0, 3)
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return write_class_folders(tmp_path_factory.mktemp("photographs") / "tree")


@pytest.fixture(scope="module")
def packed(tree, tmp_path_factory) -> Path:
    return pack(tree, tmp_path_factory.mktemp("packed") / "set", "--shard-size", "10")


def test_images_labels_and_index(tree, packed):
    source, images = open_source(tree), open_images(packed)
    assert (len(images), images.resolution, images.class_names) == (36, 32, ["n01", "n02", "n10"])
    assert images.labels.tolist() == [0] * 12 + [1] * 12 + [2] * 12
    for index, pixels in enumerate(everything(packed)):
        with Image.open(io.BytesIO(source.read(index))) as image:
            expected = plain_center_crop(image.convert("RGB"), 32)
        np.testing.assert_array_equal(pixels.transpose(1, 2, 0), expected)
    index = json.loads((packed / "index.json").read_text())
    assert [shard["count"] for shard in index["shards"]] == [10, 10, 10, 6]
    assert np.load(packed / "images-00003.npy").shape == (6, 3, 32, 32)
    assert (packed / "rejected.csv").read_text() == "name,reason\n"
    PackedReader(packed).verify()


def test_every_kind_of_source_gives_the_same_dataset(tree, packed, tmp_path):
    flat = as_dataset_json(tree, tmp_path / "flat")
    sources = [
        flat,
        as_zip(tree, tmp_path / "stored.zip", zipfile.ZIP_STORED),
        as_zip(tree, tmp_path / "deflated.zip", zipfile.ZIP_DEFLATED, prefix="train/"),
        as_zip(flat, tmp_path / "flat.zip", zipfile.ZIP_DEFLATED, prefix="flat/"),
    ]
    for number, path in enumerate(sources):
        output = pack(path, tmp_path / str(number), "--shard-size", "10")
        for shard in sorted(packed.glob("*.npy")):
            assert filecmp.cmp(shard, output / shard.name, shallow=False), (path, shard)
        names = ["0", "1", "2"] if path.name.startswith("flat") else ["n01", "n02", "n10"]
        assert open_images(output).class_names == names


def test_parquet_gives_the_same_dataset(tree, packed, tmp_path):
    output = pack(as_parquet(tree, tmp_path / "parquet"), tmp_path / "out", "--shard-size", "10", workers=2)
    for shard in sorted(packed.glob("*.npy")):
        assert filecmp.cmp(shard, output / shard.name, shallow=False)
    assert open_images(output).class_names == ["n01", "n02", "n10"]


def test_workers_change_nothing(tree, packed, tmp_path):
    assert_same_bytes(packed, pack(tree, tmp_path / "out", "--shard-size", "10", workers=3))


def test_png_codec_is_lossless(tree, packed, tmp_path):
    output = pack(tree, tmp_path / "out", "--shard-size", "7", "--codec", "png", workers=2)
    np.testing.assert_array_equal(everything(output), everything(packed))
    assert np.load(output / "images-00000-offsets.npy").shape == (8,)
    PackedReader(output).verify()


def test_a_complete_dataset_is_left_alone(tree, packed, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in packed.iterdir()}
    pack(tree, packed, "--shard-size", "10")
    assert "complete already: 36 images" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in packed.iterdir()} == before


def test_other_images_under_the_same_names_are_another_source(tree, tmp_path):
    """For folders, zips and parquet files; the same ones elsewhere are the same."""
    copies = {name: tmp_path / name / "tree" for name in ("same", "other")}
    for copy in copies.values():
        shutil.copytree(tree, copy)
    first = next(iter(sorted(copies["other"].glob("*/*.jpg"))))
    Image.new("RGB", (50, 60), (1, 2, 3)).save(first)
    makers = [
        lambda folder: folder,
        lambda folder: as_zip(folder, folder.with_suffix(".zip"), zipfile.ZIP_STORED),
        lambda folder: as_dataset_json(folder, folder.parent / "json"),
    ]
    if importlib.util.find_spec("pyarrow"):
        makers.append(lambda folder: as_parquet(folder, folder.parent / "parquet"))
    shutil.copytree(tree, tmp_path / "original" / "tree")
    for make in makers:
        prints = [open_source(make(path)).fingerprint() for path in (tmp_path / "original" / "tree", *copies.values())]
        assert prints[0] == prints[1] != prints[2]


def test_max_images_are_spread_over_the_classes(tree, packed, tmp_path):
    output = pack(tree, tmp_path / "out", "--max-images", "9")
    assert open_images(output).labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    np.testing.assert_array_equal(everything(output), everything(packed)[::4])


def test_bad_files_are_listed_and_left_out(tree, packed, tmp_path, capsys):
    spoiled = shutil.copytree(tree, tmp_path / "in")
    (spoiled / "n01" / "001.JPEG").write_bytes((tree / "n01" / "001.JPEG").read_bytes()[:300])
    (spoiled / "n02" / "002.png").write_bytes(b"GIF89 it is not")
    Image.new("1", (300, 200)).save(spoiled / "n10" / "002.png")
    flags = ("--shard-size", "10", "--max-pixels", "30000")
    output = tmp_path / "out"
    with pytest.raises(UserError, match=r"3 of 36 files \(8\.3 %\).*--allow-rejected"):
        pack(spoiled, output, *flags)
    rejected = list(csv.reader((output / "rejected.csv").open()))
    assert [row[0] for row in rejected] == ["name", "n01/001.JPEG", "n02/002.png", "n10/002.png"]
    assert "truncated" in rejected[1][1].lower() and "known format" in rejected[2][1] and "300 x 200" in rejected[3][1]
    with pytest.raises(UserError, match="not finished"):
        open_images(output)

    shards = {path: path.stat().st_mtime_ns for path in output.glob("*.npy")}
    pack(spoiled, output, *flags, "--allow-rejected")
    assert shards == {path: path.stat().st_mtime_ns for path in shards}
    kept = [index for index in range(36) if index not in (1, 14, 26)]
    np.testing.assert_array_equal(everything(output), everything(packed)[kept])
    assert open_images(output).labels.tolist() == [0] * 11 + [1] * 11 + [2] * 11
    assert len(list(csv.reader((output / "rejected.csv").open()))) == 4
    assert_same_bytes(output, pack(spoiled, tmp_path / "two", *flags, "--allow-rejected", workers=2))
    png = pack(spoiled, tmp_path / "png", *flags, "--allow-rejected", "--codec", "png")
    np.testing.assert_array_equal(everything(png), everything(output))


def test_damaged_members_of_a_zip_are_rejected(tree, tmp_path):
    path = as_zip(tree, tmp_path / "in.zip", zipfile.ZIP_STORED)
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("n02/003.png")
    data = bytearray(path.read_bytes())
    data[member.header_offset + 100] ^= 255
    path.write_bytes(data)
    output = pack(path, tmp_path / "out", "--allow-rejected")
    assert (output / "rejected.csv").read_text().splitlines()[1:] == [
        "n02/003.png,cannot be read: damaged in its zip file (wrong CRC)"
    ]
    assert len(open_images(output)) == 35


def start(source: Path, output: Path, workers: int) -> subprocess.Popen:
    command = [sys.executable, "preprocessing.py", "--imagenet-path", str(source), "--output-path", str(output)]
    command += ["--resolution", "64", "--shard-size", "50", "--num-workers", str(workers)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """600 files, a few of them bad: some seconds of work."""
    root = write_class_folders(tmp_path_factory.mktemp("many") / "tree", per_class=12)
    for folder in sorted(root.iterdir()):
        files = sorted(folder.iterdir())
        for copy in range(200 - len(files)):
            os.link(files[copy % len(files)], folder / f"copy{copy:03d}{files[copy % len(files)].suffix}")
    for name in ("n01/a.png", "n02/b.png", "n10/c.png"):
        (root / name).write_bytes(b"bad")
    return root


def test_killed_anywhere_it_continues_to_the_same_bytes(many, tmp_path):
    expected = pack(many, tmp_path / "expected", "--shard-size", "50", resolution=64)
    output = tmp_path / "out"
    for kill, workers in enumerate((1, 3, 2)):
        process = start(many, output, workers)
        wait_for(lambda kill=kill: len(list(output.glob("images-?????.json"))) >= 1 + 3 * kill)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (output / "index.json").exists()
    process = start(many, output, 2)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 0, text
    assert_same_bytes(expected, output)


@pytest.mark.parametrize("name", ["before settings", "before the first shard", "before tidying up"])
def test_killed_at_an_awkward_moment(name, tree, packed, tmp_path, monkeypatch):
    output = tmp_path / "out"

    def killed(*arguments, **options):
        raise SystemExit(name)

    place = {
        "before settings": "dataset.packing.PackingJob.claim",
        "before the first shard": "preprocessing.Packer",
        "before tidying up": "dataset.packing.remove_leftovers",
    }
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(place[name], killed)
        pack(tree, output, "--shard-size", "10")
    assert_same_bytes(packed, pack(tree, output, "--shard-size", "10"))


def test_sigterm_stops_cleanly(many, tmp_path):
    process = start(many, tmp_path / "out", 2)
    wait_for(lambda: list((tmp_path / "out").glob("images-?????.npy")))
    process.terminate()
    text = process.communicate(timeout=30)[0]
    assert process.returncode == 130 and "interrupted" in text and "Traceback" not in text


def test_a_second_run_is_kept_out(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "LOCK_SECONDS", 0.2)
    (tmp_path / "out").mkdir()
    other = packing.PackingJob(tmp_path / "out", ShardSpec("images", (3, 32, 32), "uint8"), {})
    with other.lock(), pytest.raises(UserError, match="another run is writing"):
        pack(tree, tmp_path / "out")
    pack(tree, tmp_path / "out")


def test_dry_run_writes_nothing(tree, tmp_path, capsys):
    pack(tree, tmp_path / "out", "--dry-run")
    text = capsys.readouterr().out
    assert "36 of 36 images in 3 classes" in text and f"{36 * 3 * 32 * 32} bytes" in text
    assert not (tmp_path / "out").exists()


def test_full_disk_while_writing_is_one_line(tree, tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dataset.shards.os.pwrite", full)
    argv = ["--imagenet-path", str(tree), "--output-path", str(tmp_path / "out"), "--resolution", "32"]
    assert run(preprocessing.main, [*argv, "--num-workers", "1"]) == 2
    assert "no space left on the device" in capsys.readouterr().err


def test_torch_is_not_imported():
    code = "import sys, preprocessing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


class TestPhotographs:
    pytestmark = needs_photographs

    def test_equal_to_the_definition_on_every_pixel(self, tmp_path):
        pixels = everything(pack(PHOTOGRAPHS, tmp_path / "out", resolution=256, workers=2))
        files = sorted(PHOTOGRAPHS.glob("*/*.JPEG"), key=lambda path: (path.parent.name, path.name))
        assert len(files) == len(pixels) == 200
        for path, ours in zip(files, pixels, strict=True):
            with Image.open(path) as image:
                expected = plain_center_crop(image.convert("RGB"), 256)
            np.testing.assert_array_equal(ours.transpose(1, 2, 0), expected, err_msg=path.name)
