"""What of a folder, zip or hub clone is taken, and that nothing else goes missing without a word."""

import csv
import io
import json
import logging
import os
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import preprocessing
from dataset.images import open_images
from dataset.layouts import open_source
from errors import UserError
from metrics.sources import FolderImages
from runtime.cli import run


def encoded(shade: int, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), (shade, 0, 0)).save(buffer, kind, **options)
    return buffer.getvalue()


PNG, NO_IMAGE = encoded(9), b"no image"
TWO_CLASSES = {"a/0.png": PNG, "a/1.png": PNG, "b/0.png": PNG}


def write_tree(root: Path, files: dict[str, bytes | None]) -> Path:
    """Files by name; None makes a folder."""
    root.mkdir()
    for name, content in files.items():
        path = root / name
        (path if content is None else path.parent).mkdir(parents=True, exist_ok=True)
        if content is not None:
            path.write_bytes(content)
    return root


def write_zip(path: Path, files: dict[str, bytes | None]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"{name}/" if content is None else name, content or b"")
    return path


def write_parquet(root: Path, files: dict[str, int], classes: tuple[str, ...] = ("a", "b")) -> Path:
    """Files of so many rows, each of its own shade."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    features = {"info": {"features": {"label": {"names": classes}}}}
    shade = 0
    for name, rows in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        images = [{"bytes": encoded(shade + row), "path": ""} for row in range(rows)]
        shade += rows
        table = pyarrow.table({"image": images, "label": [row % 2 for row in range(rows)]})
        parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), root / name)
    return root


class Packed:
    """What preprocessing.py made of a source, and what it said."""

    def __init__(self, source: Path, capsys: pytest.CaptureFixture, *flags: str, expect: int = 0) -> None:
        self.folder = source.parent / f"{source.name}-packed"
        argv = ["--imagenet-path", str(source), "--output-path", str(self.folder), "--resolution", "32"]
        capsys.readouterr()
        code = run(preprocessing.main, [*argv, "--num-workers", "1", *flags])
        self.said, self.error = capsys.readouterr()
        assert code == expect, self.error

    @property
    def labels(self) -> list[int]:
        return np.load(self.folder / "labels.npy").tolist()

    @property
    def classes(self) -> list[str]:
        return json.loads((self.folder / "index.json").read_text())["class_names"]

    @property
    def rejected(self) -> dict[str, str]:
        with (self.folder / "rejected.csv").open(encoding="utf-8", errors="surrogateescape") as file:
            return {row[0]: row[1] for row in list(csv.reader(file))[1:]}

    @property
    def shades(self) -> list[int]:
        return sorted(np.load(next(self.folder.glob("images-*.npy")))[:, 0, 16, 16].tolist())


def test_images_deeper_in_a_class_are_taken_as_torchvision_does(tmp_path, capsys):
    deep = {f"{name}/{sub}/{number}.png": PNG for name in "ab" for sub in ("x", "y/z") for number in range(2)}
    packed = Packed(write_tree(tmp_path / "in", TWO_CLASSES | deep), capsys)
    assert packed.labels == [0] * 6 + [1] * 5 and packed.rejected == {}
    names = open_source(tmp_path / "in").names
    assert names[:3] == ["a/0.png", "a/1.png", "a/x/0.png"]
    torchvision = pytest.importorskip("torchvision.datasets")
    theirs = torchvision.ImageFolder(str(tmp_path / "in")).samples
    assert sorted(names) == sorted(os.path.relpath(path, tmp_path / "in") for path, _ in theirs)


def test_tiny_imagenet(tmp_path, capsys):
    tree = {f"{wnid}/images/{wnid}_{n}.JPEG": encoded(n, "JPEG") for wnid in ("n01", "n02") for n in range(3)}
    boxes = {f"{wnid}/{wnid}_boxes.txt": b"n01_0.JPEG 0 0 62 62" for wnid in ("n01", "n02")}
    packed = Packed(write_tree(tmp_path / "train", tree | boxes), capsys)
    assert packed.labels == [0] * 3 + [1] * 3 and packed.classes == ["n01", "n02"]
    assert packed.rejected == dict.fromkeys(boxes, "not an image by its name")
    assert "left out: 2 files, not an image by its name: n01/n01_boxes.txt, n02/n02_boxes.txt" in packed.said


def test_other_spellings_of_known_types_are_taken(tmp_path, capsys):
    files = {f"a/{name}": encoded(50, "JPEG") for name in ("0.jpg", "1.jfif", "2.JPE", "3.Mpo")}
    packed = Packed(write_tree(tmp_path / "in", files | {"b/0.apng": PNG, "b/1.pnm": encoded(50, "PPM")}), capsys)
    assert packed.labels == [0] * 4 + [1] * 2 and packed.rejected == {}


def test_what_is_not_taken_is_counted_and_listed(tmp_path, capsys):
    others = {"a/2.heic": NO_IMAGE, "a/notes.txt": NO_IMAGE, "loose.png": PNG, "README": NO_IMAGE, ".hidden.png": PNG}
    tree = write_tree(tmp_path / "in", TWO_CLASSES | others | {"__MACOSX/a/._0.png": NO_IMAGE})
    (tree / "b" / "gone.png").symlink_to(tmp_path / "gone.png")
    refused = Packed(tree, capsys, expect=2)
    assert "3 of 6 images (50.0 %)" in refused.error and "--allow-rejected" in refused.error
    assert not refused.folder.exists()
    packed = Packed(tree, capsys, "--allow-rejected")
    assert packed.labels == [0, 0, 1]
    assert packed.rejected == {
        "README": "not an image by its name",
        "a/2.heic": ".heic files are not read: convert them to PNG or JPEG",
        "a/notes.txt": "not an image by its name",
        "b/gone.png": "a link that leads nowhere",
        "loose.png": "lies in no class folder",
    }
    assert "left out: 2 files, not an image by its name: README, a/notes.txt" in packed.said
    assert "0 rejected, 5 left out" in packed.said


def test_files_that_are_no_images_need_no_flag_and_change_no_byte(tmp_path, capsys):
    plain = Packed(write_tree(tmp_path / "plain", TWO_CLASSES), capsys)
    noted = Packed(write_tree(tmp_path / "noted", TWO_CLASSES | {"a/notes.txt": b"", "b/Thumbs.db": b""}), capsys)
    for name in ("images-00000.npy", "labels.npy", "index.json"):
        assert (plain.folder / name).read_bytes() == (noted.folder / name).read_bytes()


@pytest.mark.parametrize("write", [write_tree, write_zip])
def test_files_that_dataset_json_does_not_label_are_listed(write, tmp_path, capsys):
    labels = {"labels": [["00/0.png", 1], ["00/1.png", 0]]}
    files = {f"00/{n}.png": encoded(n) for n in range(4)} | {"dataset.json": json.dumps(labels).encode(), "x.md": b""}
    packed = Packed(write(tmp_path / "in.zip", files), capsys)  # chosen so: no flag is asked for
    assert packed.labels == [1, 0]
    unlabelled = dict.fromkeys(("00/2.png", "00/3.png"), "has no label in dataset.json")
    assert packed.rejected == unlabelled | {"x.md": "not an image by its name"}
    assert "left out: 2 files, has no label in dataset.json: 00/2.png, 00/3.png" in packed.said


@pytest.mark.parametrize("write", [write_tree, write_zip])
def test_an_unlabelled_dataset_json_is_one_class(write, tmp_path, capsys):
    files = {f"0000{n}/img.png": encoded(n) for n in range(3)} | {"dataset.json": b'{"labels": null}'}
    packed = Packed(write(tmp_path / "in.zip", files), capsys)
    assert packed.labels == [0, 0, 0] and packed.classes == ["0"] and packed.rejected == {}
    assert "3 of 3 images in 1 classes" in packed.said and "without labels: one class" in packed.said


TREES = {
    "classes": TWO_CLASSES,
    "an empty class": TWO_CLASSES | {"c": None},
    "a class of notes": TWO_CLASSES | {"c/notes.txt": b""},
    "a wrapped tree": {f"top/inner/{name}": data for name, data in TWO_CLASSES.items()},
    "a wrapped tree with a note": {
        "top/readme.txt": b"",
        **{f"top/{name}": data for name, data in TWO_CLASSES.items()},
    },
    "deeper images": TWO_CLASSES | {"b/x/1.png": PNG, "b/x/y/2.png": PNG},
    "loose images": TWO_CLASSES | {"loose.png": PNG},
    "names that sort around the slash": {"a/z.png": PNG, "a-b/0.png": PNG, "a b/0.png": PNG},
    "hidden folders": TWO_CLASSES | {".cache/0.png": PNG, "__MACOSX/a/0.png": PNG},
    "labels": {"0.png": PNG, "1.png": PNG, "dataset.json": b'{"labels": [["1.png", 0], ["0.png", 1]]}'},
    "wrapped labels": {"in/0.png": PNG, "in/dataset.json": b'{"labels": [["0.png", 0]]}'},
    "labels of hidden files": {".x/0.png": PNG, "dataset.json": b'{"labels": [[".x/0.png", 0]]}'},
    "splits": {f"{split}/{name}": data for split in ("train", "val") for name, data in TWO_CLASSES.items()},
    "images alone": {"0.png": PNG},
    "nothing": {"readme.txt": b""},
}


@pytest.mark.parametrize("name", TREES)
def test_a_folder_and_a_zip_are_read_alike(name, tmp_path):
    def read(path: Path):
        try:
            source = open_source(path)
        except UserError as error:
            return str(error).split("; give ")[0].split("; unpack ")[0].replace(str(path), "IN")
        return source.classes, source.names, source.labels.tolist(), source.left_out, source.note

    folder, zipped = write_tree(tmp_path / "in", TREES[name]), write_zip(tmp_path / "in.zip", TREES[name])
    assert read(folder) == read(zipped)


def test_fingerprints_of_ordinary_layouts_stay(tmp_path):
    """Pinned: half-packed sets of an earlier version go on."""
    files = {"n01/0.JPEG": b"one", "n01/10.png": b"three", "n01/2.JPEG": b"to", "n02/0.jpg": b"seven", "n10/a.PNG": b""}
    folder = write_tree(tmp_path / "in", files)
    zipped = write_zip(tmp_path / "in.zip", {f"train/{name}": data for name, data in files.items()})
    assert open_source(folder).fingerprint()[:16] == "be0b5daf4f4692bb"
    assert open_source(zipped).fingerprint()[:16] == "e7cdc844d32ba34b"
    labels = [[name, place] for place, name in enumerate(reversed(files))]
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    assert open_source(folder).fingerprint()[:16] == "ba0e94a170232f44"


PARQUET_NAMES = [
    ("train-00000-of-00001", "validation-00000-of-00001"),
    ("train", "test"),
    ("imagenet-train-0", "imagenet-val-0"),
    ("train_00", "val_00"),
    ("trainset", "testset"),
    ("cifarTrain", "cifarTest"),
    ("Training", "holdout"),
    ("default/train/0000", "default/test/0000"),
    ("data/train-0", "data/test-0"),
]


@pytest.mark.parametrize(("train", "held_out"), PARQUET_NAMES)
def test_held_out_rows_are_not_trained_on(train, held_out, tmp_path, capsys):
    files = {f"{held_out}.parquet": 3, f"{train}.parquet": 4}
    packed = Packed(write_parquet(tmp_path / "in", files), capsys)
    assert packed.labels == [0, 1, 0, 1] and packed.shades == [3, 4, 5, 6]
    left_out = f"{held_out}.parquet".removeprefix("default/")  # below which the set begins
    assert packed.rejected == {left_out: "not of the split train"}
    assert f"not of the split train: {left_out}" in packed.said and "the split train)" in packed.said


@pytest.mark.parametrize("names", [("a-0", "a-1"), ("test-0", "test-1"), ("cats", "dogs"), ("0000", "0001")])
def test_files_of_one_set_are_all_taken(names, tmp_path, capsys):
    packed = Packed(write_parquet(tmp_path / "in", {f"{name}.parquet": 2 for name in names}), capsys)
    assert packed.labels == [0, 1, 0, 1] and packed.rejected == {}


def test_a_hub_clone(tmp_path, capsys):
    clone = write_parquet(tmp_path / "in", {"data/train-00000-of-00001.parquet": 4})
    for name in ("README.md", ".gitattributes", ".git/config", "assets/preview.png"):
        (clone / name).parent.mkdir(exist_ok=True)
        (clone / name).write_bytes(PNG)
    packed = Packed(clone, capsys)
    assert packed.labels == [0, 1, 0, 1] and set(packed.rejected) == {"README.md", "assets/preview.png"}


def test_parquet_files_of_notes_do_not_hide_the_classes(tmp_path, capsys):
    packed = Packed(
        write_tree(tmp_path / "in", TWO_CLASSES | {"a/notes.parquet": b"", "b/x/more.parquet": b""}), capsys
    )
    assert packed.labels == [0, 0, 1] and set(packed.rejected) == {"a/notes.parquet", "b/x/more.parquet"}


def link_to_itself(folder: Path) -> None:
    (folder / "self.png").symlink_to("self.png")


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "a" / "pipe.png")


def ring(folder: Path) -> None:
    (folder / "a" / "ring").symlink_to(folder)


@pytest.mark.parametrize(
    ("add", "reason"),
    [
        (link_to_itself, "a link that cannot be followed"),
        (pipe, "neither a file nor"),
        (ring, "a folder that holds it"),
    ],
)
def test_what_is_no_file_is_left_out(add: Callable, reason, tmp_path, capsys, caplog):
    tree = write_tree(tmp_path / "in", TWO_CLASSES)
    add(tree)
    packed = Packed(tree, capsys, "--allow-rejected")
    assert packed.labels == [0, 0, 1]
    assert [reason in why for why in packed.rejected.values()] == [True]
    with caplog.at_level(logging.WARNING):
        assert len(FolderImages(tree)) == 3
    assert reason in caplog.text


def test_names_need_not_be_utf_8(tmp_path):
    tree = write_tree(tmp_path / "in", TWO_CLASSES)
    with open(os.fsencode(tree) + b"/a/\xe9t\xe9.png", "wb") as file:
        file.write(PNG)
    with open(os.fsencode(tree) + b"/a/\xe9t\xe9.heic", "wb") as file:
        file.write(PNG)
    (tree / "a" / "0.png").unlink()
    (tree / "a" / "1.png").unlink()
    flags = ("--resolution", "32", "--num-workers", "1", "--allow-rejected")
    argv = ["--imagenet-path", str(tree), "--output-path", str(tmp_path / "out"), *flags]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    script = Path(preprocessing.__file__)
    for extra in ("--dry-run", "--allow-rejected"):
        result = subprocess.run(
            [sys.executable, script, *argv, extra], capture_output=True, env=environment, check=False, timeout=60
        )
        assert result.returncode == 0, result.stderr
        assert b"a/\\udce9t\\udce9.heic" in result.stdout
    assert b"a/\xe9t\xe9.heic,.heic files are not read" in (tmp_path / "out" / "rejected.csv").read_bytes()


def test_a_zip_bomb_is_not_unpacked(tmp_path, capsys, monkeypatch):
    """Neither one that tells its size nor one that lies about it."""
    path = tmp_path / "in.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in TWO_CLASSES.items():
            archive.writestr(name, data)
        archive.writestr("a/bomb.png", bytes(8 << 20))
        archive.writestr("a/liar.png", bytes(8 << 20))
    content = bytearray(path.read_bytes())
    place = content.index(b"a/liar.png", content.index(b"PK\x01\x02"))
    content[place - 22 : place - 18] = (100).to_bytes(4, "little")  # the size in the central directory
    path.write_bytes(content)
    monkeypatch.setattr("dataset.sources.MAX_FILE_BYTES", 1 << 20, raising=False)
    source = open_source(path)
    tracemalloc.start()
    for name, reason in (("a/bomb.png", "8388608 bytes are over the limit"), ("a/liar.png", "wrong CRC")):
        with pytest.raises(OSError, match=reason):
            source.read(source.names.index(name))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6
    packed = Packed(path, capsys, "--allow-rejected")
    assert packed.labels == [0, 0, 1] and set(packed.rejected) == {"a/bomb.png", "a/liar.png"}


def test_photographs_that_are_read_directly_say_what_they_leave_out(tmp_path, caplog):
    tree = write_tree(tmp_path / "in", TWO_CLASSES | {"a/2.heic": NO_IMAGE, "a/notes.txt": b""})
    with caplog.at_level(logging.WARNING):
        assert len(open_images(tree, 32)) == 3
    assert "left out: 1 file, .heic files are not read" in caplog.text
    assert "a/notes.txt" not in caplog.text  # of what is no image preprocessing.py tells


class TestExif:
    @pytest.fixture
    def tree(self, tmp_path) -> Path:
        """Red over blue; the phone was held on its side."""
        image = Image.new("RGB", (64, 64), (255, 0, 0))
        image.paste((0, 0, 255), (32, 0, 64, 64))
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(tmp_path / "0.png", exif=exif)
        return write_tree(tmp_path / "in", {"a/0.png": (tmp_path / "0.png").read_bytes()})

    def test_photographs_are_turned_upright_on_request(self, tree, tmp_path, capsys):
        as_stored = np.load(Packed(tree, capsys).folder / "images-00000.npy")[0]
        tree = tree.rename(tmp_path / "other")
        upright = np.load(Packed(tree, capsys, "--exif-rotate").folder / "images-00000.npy")[0]
        assert as_stored[0, 16, :].tolist() == [255] * 16 + [0] * 16
        assert upright[0, :, 16].tolist() == [255] * 16 + [0] * 16
        np.testing.assert_array_equal(upright, np.rot90(as_stored, -1, (1, 2)))

    def test_older_sets_without_the_setting_are_complete(self, tree, capsys):
        packed = Packed(tree, capsys)
        index = json.loads((packed.folder / "index.json").read_text())
        assert index["source"].pop("exif_rotate") is False
        (packed.folder / "index.json").write_text(json.dumps(index))
        assert "complete already: 1 images" in Packed(tree, capsys).said
        assert (
            "another --exif-rotate (exif_rotate: False, now True)"
            in Packed(tree, capsys, "--exif-rotate", expect=2).error
        )
