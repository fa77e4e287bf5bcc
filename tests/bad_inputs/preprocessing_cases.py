"""What a user can get wrong with preprocessing.py, and what the one line must say."""

import json
import shutil
import zipfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import preprocessing
from tests.bad_inputs.case import Case


def command(photographs: Path, output: Path, *flags: str) -> list[str]:
    shape = ["--resolution", "32"] if "--resolution" not in flags else []
    return ["--imagenet-path", str(photographs), "--output-path", str(output), "--num-workers", "1", *shape, *flags]


def class_folders(root: Path, bad: int = 0) -> Path:
    """Two classes with two images each, and ``bad`` files in one of them that are none."""
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (40, 48), (50 * number, 0, 0)).save(root / name / f"{number}.png")
    for number in range(bad):
        (root / "a" / f"bad{number}.jpg").write_bytes(b"no image")
    return root


def with_flags(*flags: str):
    """Good photographs, bad flags."""
    return lambda tmp_path, monkeypatch: command(class_folders(tmp_path / "in"), tmp_path / "out", *flags)


def with_source(make: Callable[[Path], None], name: str = "in"):
    """Good flags, and a source that ``make`` spoils."""

    def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        make(tmp_path / name)
        return command(tmp_path / name, tmp_path / "out")

    return prepare


def with_dataset_json(content: str):
    def make(path: Path) -> None:
        path.mkdir()
        Image.new("RGB", (40, 40)).save(path / "0.png")
        (path / "dataset.json").write_text(content)

    return with_source(make)


def flat_folder(path: Path) -> None:
    path.mkdir()
    Image.new("RGB", (40, 40)).save(path / "0.png")


def parquet(path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    path.mkdir()
    table = pyarrow.table({"picture": [b"x"], "label": [0]})
    pytest.importorskip("pyarrow.parquet").write_table(table, path / "train-0.parquet")


def damaged_parquet(path: Path) -> None:
    pytest.importorskip("pyarrow")
    path.mkdir()
    (path / "train-0.parquet").write_bytes(b"x")


def empty_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "nothing here")


def parquet_named(*names: str, label: int = 0, classes: tuple[str, ...] | None = None):
    """Readable files of these names, of a row each."""

    def make(path: Path) -> None:
        pyarrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        table = pyarrow.table({"image": [{"bytes": b"x", "path": ""}], "label": [label]})
        if classes is not None:
            features = {"info": {"features": {"label": {"names": classes}}}}
            table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        for name in names:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            writer.write_table(table, path / f"{name}.parquet")

    return make


def two_parquets(path: Path) -> None:
    parquet_named("train-0", classes=("a", "b"))(path)
    parquet_named("train-1", classes=("c", "d"))(path)


def zipped_parquet(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data/train-0.parquet", "PAR1")


def zipped_splits(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for split in ("train", "val"):
            archive.writestr(f"{split}/a/0.png", "an image")


def named_splits(path: Path) -> None:
    class_folders(path / "training_set")
    class_folders(path / "test_set")


def splits_in_classes(path: Path) -> None:
    for split in ("train", "test"):
        for name in ("a", "b"):
            (path / name / split).mkdir(parents=True)
            Image.new("RGB", (40, 40)).save(path / name / split / "0.png")


def folders_beside(path: Path) -> None:
    class_folders(path / "images")
    (path / "notes").mkdir()
    (path / "notes" / "a.txt").write_text("")


def heic(path: Path) -> None:
    (path / "a").mkdir(parents=True)
    (path / "a" / "0.heic").write_bytes(b"x")


def some_heic(path: Path) -> None:
    class_folders(path)
    (path / "a" / "0.heic").write_bytes(b"x")


def unlabelled_nothing(path: Path) -> None:
    path.mkdir()
    (path / "dataset.json").write_text('{"labels": null}')


def split_folders(path: Path) -> None:
    class_folders(path / "train")
    class_folders(path / "val")


def packed_output(tmp_path: Path, *flags: str) -> Path:
    """A dataset that was packed before."""
    output = tmp_path / "out"
    assert preprocessing.main(command(class_folders(tmp_path / "in"), output, *flags)) == 0
    return output


def packed_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return command(packed_output(tmp_path), tmp_path / "again")


def other_settings(*flags: str):
    def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        return command(tmp_path / "in", packed_output(tmp_path), *flags)

    return prepare


def other_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    output = packed_output(tmp_path)
    (tmp_path / "in" / "b" / "1.png").rename(tmp_path / "in" / "b" / "2.png")
    return command(tmp_path / "in", output)


def shard_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    output = packed_output(tmp_path)
    (output / "images-00000.npy").unlink()
    return command(tmp_path / "in", output)


def output_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (tmp_path / "out").write_text("")
    return command(class_folders(tmp_path / "in"), tmp_path / "out")


def output_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    return command(class_folders(tmp_path / "in"), tmp_path / "out")


def output_in_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return command(class_folders(tmp_path / "in"), tmp_path / "in" / "packed")


def full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 5, 5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    return command(class_folders(tmp_path / "in"), tmp_path / "out")


def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr("dataset.packing.LOCK_SECONDS", 0.0)
    monkeypatch.setattr("dataset.packing._try_lock", lambda descriptor: False)
    return command(class_folders(tmp_path / "in"), tmp_path / "out")


CASES = [
    Case("no such path", lambda path, _: command(path / "none", path / "out"), ("none does not exist",)),
    Case("empty folder", with_source(Path.mkdir), ("no class folders",)),
    Case("class folder without images", with_source(lambda path: (path / "a").mkdir(parents=True)), ("no images",)),
    Case("an empty class", with_source(lambda path: (class_folders(path) / "lost+found").mkdir()), ("(lost+found)",)),
    Case("images without classes", with_source(flat_folder), ("one for each class",)),
    Case("splits instead of classes", with_source(split_folders), ("splits (train, val)", "in/train")),
    Case("splits by other names", with_source(named_splits), ("splits (test_set, training_set)", "in/training_set")),
    Case("splits in a zip", with_source(zipped_splits, "in.zip"), ("splits (train, val)", "unpack it", "folder train")),
    Case("splits in the classes", with_source(splits_in_classes), ("in/a holds splits (test, train)", "of one split")),
    Case("classes beside other folders", with_source(folders_beside), ("(notes)", "give the folder that holds")),
    Case("images of a kind that is not read", with_source(heic), ("a/0.heic", "convert them to PNG or JPEG")),
    Case("some of a kind that is not read", with_source(some_heic),
         ("1 of 5 images (20.0 %)", "in are left out", "a/0.heic", "--allow-rejected")),
    Case("a file that is not a zip", with_source(lambda path: path.write_text("x"), "in.tar"), ("no .zip",)),
    Case("corrupt zip", with_source(lambda path: path.write_bytes(b"PK damaged"), "in.zip"), ("not a readable zip",)),
    Case("zip without images", with_source(empty_zip, "in.zip"), ("no class folders",)),
    Case("dataset.json is not JSON", with_dataset_json("{"), ("dataset.json must read",)),
    Case("dataset.json without labels", with_dataset_json('{"label": []}'), ("dataset.json must read",)),
    Case("dataset.json of no images", with_source(unlabelled_nothing), ("no labels", "no images beside it")),
    Case("dataset.json of huge labels", with_dataset_json('{"labels": [["0.png", 100000000]]}'),
         ("0.png the label 100000000", "below 1000000")),
    Case("dataset.json beyond 64 bits", with_dataset_json('{"labels": [["0.png", 1e400]]}'), ("not class numbers",)),
    Case("dataset.json of a huger label", with_dataset_json(f'{{"labels": [["0.png", {2**70}]]}}'), ("below 1000000",)),
    Case("dataset.json with names", with_dataset_json('{"labels": [["0.png", "cat"]]}'), ("not class numbers",)),
    Case("dataset.json names a missing file", with_dataset_json('{"labels": [["9.png", 0]]}'), ("names 9.png",)),
    Case("parquet without images", with_source(parquet), ("no columns image", "picture")),
    Case("parquet damaged", with_source(damaged_parquet), ("not a readable parquet",)),
    Case("parquet of held-out splits", with_source(parquet_named("test-0", "val-0")), ("none is called train",)),
    Case("parquet in several versions", with_source(parquet_named("full/train-0", "small/train-0")),
         ("several folders (full, small)", "give one of them")),
    Case("parquet in a zip", with_source(zipped_parquet, "in.zip"), ("not read in a zip", "unpack it")),
    Case("parquet of huge labels", with_source(parquet_named("train-0", label=10**8)), ("label 100000000",)),
    Case("parquet of other classes", with_source(two_parquets), ("train-1.parquet names other classes",)),
    Case("packed dataset as the source", packed_source, ("packed dataset already",)),
    Case("too many rejected", lambda path, _: command(class_folders(path / "in", bad=1), path / "out"),
         ("1 of 5 files (20.0 %)", "rejected.csv", "--allow-rejected"), keeps_work=True),
    Case("resolution no multiple of 32", with_flags("--resolution", "100"), ("--resolution", "multiple of 32", "96")),
    Case("no images wanted", with_flags("--max-images", "0"), ("--max-images", "at least 1")),
    Case("no number", with_flags("--num-workers", "many"), ("--num-workers", "not an integer")),
    Case("unknown codec", with_flags("--codec", "jpeg"), ("--codec", "raw", "png")),
    Case("a place where nothing can be made", lambda path, _: command(class_folders(path / "in"), Path("/proc/none")),
         ("/proc/none: no such file or folder",)),
    Case("output is a file", output_is_a_file, ("out is a file",)),
    Case("output holds other files", output_in_use, ("thesis.tex", "empty or new")),
    Case("output inside the source", output_in_source, ("lies in --imagenet-path",)),
    Case("another resolution", other_settings("--resolution", "64"), ("--resolution", "32", "64")),
    Case("another codec", other_settings("--codec", "png"), ("--codec", "raw", "png")),
    Case("another shard size", other_settings("--shard-size", "3"), ("--shard-size", "now 3")),
    Case("another orientation", other_settings("--exif-rotate"), ("--exif-rotate", "False", "True")),
    Case("other photographs", other_photographs, ("another --imagenet-path", "fingerprint")),
    Case("a shard was deleted", shard_deleted, ("images-00000.npy is missing", "preprocessing")),
    Case("not enough space", full_disk, ("0.00 GB are free", "--codec png")),
    Case("two runs at once", locked, ("another run is writing",), keeps_work=True),
]  # fmt: skip
