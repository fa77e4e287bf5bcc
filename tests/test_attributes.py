"""Attribute tables from small files in the authors' own layouts."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from dataset.attributes import TEST, TRAIN, VALIDATION, attributes_kind, read_attributes, split_at_random
from dataset.toy import write_toy_dataset
from tests.annotated_sets import write_awa2, write_celeba, write_deepfashion, write_kaggle_celeba


def pixels(table, resolution: int = 16) -> np.ndarray:
    images = table.images(resolution)
    out = np.empty((len(images), 3, resolution, resolution), np.uint8)
    images.read_into(range(len(images)), out)
    return out


def test_celeba(tmp_path: Path):
    table = read_attributes(write_celeba(tmp_path))
    assert table.kind == "celeba" and table.names == ["Bald", "Smiling", "Young"]
    assert table.files == ["000001.jpg", "000002.jpg", "000003.jpg", "000004.jpg"]
    assert table.values.tolist() == [[0, 1, 1], [1, 0, 0], [0, 0, 1], [1, 1, 1]]
    assert table.split.tolist() == [TRAIN, TRAIN, VALIDATION, TEST]
    assert table.folder == tmp_path / "img_align_celeba" and pixels(table).shape == (4, 3, 16, 16)


def test_celeba_of_kaggle_is_the_same(tmp_path: Path):
    authors, kaggle = (
        read_attributes(write(tmp_path / write.__name__)) for write in (write_celeba, write_kaggle_celeba)
    )
    assert kaggle.kind == "celeba" and (kaggle.names, kaggle.files) == (authors.names, authors.files)
    np.testing.assert_array_equal(kaggle.values, authors.values)
    np.testing.assert_array_equal(kaggle.split, authors.split)
    np.testing.assert_array_equal(pixels(kaggle), pixels(authors))


def test_images_outside_the_classes_of_awa2_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    root = write_awa2(tmp_path)
    for name in ("mammoth/mammoth_10001.jpg", "antelope/deeper/antelope_10003.jpg"):
        (root / "JPEGImages" / name).parent.mkdir()
        shutil.copy(root / "JPEGImages" / "antelope" / "antelope_10001.jpg", root / "JPEGImages" / name)
    assert read_attributes(root).labels.tolist() == [0, 0, 0, 1]
    assert "left out: 1 file, in no folder of classes.txt: mammoth/mammoth_10001.jpg" in caplog.text


def test_deepfashion(tmp_path: Path):
    table = read_attributes(write_deepfashion(tmp_path))
    assert table.kind == "deepfashion" and table.names == ["a-line", "abstract animal print"]
    assert table.values.tolist() == [[1, 0], [0, 1], [0, 0]]  # −1 and 0 (unknown) both mean: not there
    assert table.split.tolist() == [TRAIN, VALIDATION, TEST]
    assert table.labels.tolist() == [1, 0, 1] and table.class_names == ["Anorak", "Blouse"]
    assert table.files[0] == "img/Sheer_Blouse/img_00000001.jpg" and pixels(table).shape[0] == 3


def test_awa2(tmp_path: Path):
    table = read_attributes(write_awa2(tmp_path))
    assert table.kind == "awa2" and table.names == ["black", "furry", "big teeth"]
    assert table.class_names == ["antelope", "grizzly+bear"] and table.split is None
    assert table.labels.tolist() == [0, 0, 1] and table.values.tolist() == [[0, 1, 0], [0, 1, 0], [1, 1, 1]]
    assert table.files[-1] == "grizzly+bear/grizzly+bear_10001.jpg" and pixels(table).shape[0] == 3


def test_the_toy_set_is_one_hot_and_agrees_with_its_csv(tmp_path: Path):
    write_toy_dataset(tmp_path / "toy", 40, 16, seed=3, num_workers=1)
    table = read_attributes(tmp_path / "toy")
    assert table.kind == "csv" and len(table.files) == 40 and table.class_names == sorted(table.class_names)
    rows = [line.split(",") for line in (tmp_path / "toy" / "attributes.csv").read_text().splitlines()]
    for place, (file, *values) in enumerate(rows[1:]):
        expected = {f"{column}={value}" for column, value in zip(rows[0][1:], values, strict=True)}
        assert {name for name, there in zip(table.names, table.values[place], strict=True) if there} == expected
        assert table.files[place] == file and table.class_names[table.labels[place]] == file.split("/")[0]


def test_columns_of_a_csv(tmp_path: Path):
    (tmp_path / "attributes.csv").write_text(
        "file,smiles,hat,big,colour,planet,split\na.png,1,yes,-1,red,earth,train\nb.png,0,No,1,blue,earth,val\n"
        "c.png,1,yes,1,green,earth,test\n"
    )
    table = read_attributes(tmp_path, "csv")
    assert table.names == ["smiles", "hat", "big", "colour=blue", "colour=green", "colour=red"]
    assert table.values.T.astype(int).tolist() == [[1, 0, 1], [1, 0, 1], [0, 1, 1], [0, 1, 0], [0, 0, 1], [1, 0, 0]]
    assert table.split.tolist() == [TRAIN, VALIDATION, TEST] and table.class_names == [""]


def test_values_that_differ_in_case_are_one(tmp_path: Path):
    rows = [("yes", "Red", "A"), ("Yes", "red", "a"), ("No", "Blue", "A"), ("no", "red", "a"), ("YES", "blue", "a")]
    lines = [f"{place}.png,{','.join(row)}" for place, row in enumerate(rows)]
    (tmp_path / "attributes.csv").write_text("\n".join(["file,hat,colour,same", *lines]), encoding="utf-8-sig")
    table = read_attributes(tmp_path, "csv")
    assert table.names == ["hat", "colour=Blue", "colour=Red"]
    assert table.values.T.astype(int).tolist() == [[1, 1, 0, 0, 1], [0, 0, 1, 0, 1], [1, 1, 0, 1, 0]]


def test_kinds_are_told_from_their_files(tmp_path: Path):
    assert attributes_kind(tmp_path) is None
    for kind, write in (("celeba", write_celeba), ("deepfashion", write_deepfashion), ("awa2", write_awa2)):
        assert attributes_kind(write(tmp_path / kind)) == kind


@pytest.mark.parametrize("count", [10, 1000])
def test_a_random_split_covers_all_in_its_shares(count):
    split = split_at_random(count, 0)
    assert [(split == part).sum() for part in (TRAIN, VALIDATION, TEST)] == [0.7 * count, 0.1 * count, 0.2 * count]
    assert np.array_equal(split, split_at_random(count, 0))
    if count == 1000:
        assert 0.4 < (split != split_at_random(count, 1)).mean() < 0.55  # 1 − 0.7² − 0.1² − 0.2² = 0.46
