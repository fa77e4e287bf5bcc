"""CelebA, DeepFashion and AwA2 in miniature, in their authors' layouts."""

from pathlib import Path

import numpy as np

from tests.photographs import random_image


def write_images(root: Path, files: list[str]) -> None:
    generator = np.random.default_rng(0)
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        random_image(generator, 40, 32).save(root / file)


def write_celeba(root: Path) -> Path:
    files = [f"{number:06d}.jpg" for number in range(1, 5)]
    write_images(root / "img_align_celeba", files)
    (root / "Anno").mkdir()
    rows = ["-1  1  1", " 1 -1 -1", "-1 -1  1", " 1  1  1"]
    lines = ["4", "Bald Smiling Young ", *(f"{file} {row}" for file, row in zip(files, rows, strict=True))]
    (root / "Anno" / "list_attr_celeba.txt").write_text("\r\n".join(lines) + "\r\n")
    (root / "Eval").mkdir()
    parts = [f"{file} {part}" for file, part in zip(files, (0, 0, 1, 2), strict=True)]
    (root / "Eval" / "list_eval_partition.txt").write_text("\n".join(parts) + "\n")
    return root


def write_kaggle_celeba(root: Path) -> Path:
    """The same set as Kaggle has it: .csv files, and the images one folder deeper."""
    write_celeba(root)
    (root / "img_align_celeba").rename(root / "inner")
    (root / "img_align_celeba").mkdir()
    (root / "inner").rename(root / "img_align_celeba" / "img_align_celeba")
    for name in ("Anno/list_attr_celeba", "Eval/list_eval_partition"):
        rows = [line.split() for line in (root / f"{name}.txt").read_text().splitlines()]
        rows = [["image_id", *rows[1]], *rows[2:]] if name.startswith("Anno") else [["image_id", "partition"], *rows]
        (root / f"{Path(name).name}.csv").write_text("\n".join(",".join(row) for row in rows) + "\n")
        (root / f"{name}.txt").unlink()
    return root


def write_deepfashion(root: Path) -> Path:
    files = [
        "img/Sheer_Blouse/img_00000001.jpg",
        "img/Hooded_Anorak/img_00000001.jpg",
        "img/Sheer_Blouse/img_00000002.jpg",
    ]
    write_images(root, files)
    tables = {
        "Anno/list_attr_cloth.txt": (
            "attribute_name  attribute_type",
            ["a-line            3", "abstract animal print 1"],
        ),
        "Anno/list_attr_img.txt": ("image_name  attribute_labels", ["  1  -1", " -1   1", "  0  -1"]),
        "Anno/list_category_cloth.txt": ("category_name  category_type", ["Anorak 1", "Blouse 1"]),
        "Anno/list_category_img.txt": ("image_name  category_label", ["2", "1", "2"]),
        "Eval/list_eval_partition.txt": ("image_name  evaluation_status", ["train", "val", "test"]),
    }
    for name, (header, rows) in tables.items():
        if not name.endswith("cloth.txt"):
            rows = [f"{file}   {row}" for file, row in zip(files, rows, strict=True)]
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("\n".join([str(len(rows)), header, *rows]) + "\n")
    return root


def write_awa2(root: Path) -> Path:
    files = ["antelope/antelope_10001.jpg", "antelope/antelope_10002.jpg", "grizzly+bear/grizzly+bear_10001.jpg"]
    write_images(root / "JPEGImages", files)
    (root / "classes.txt").write_text("      1\tantelope\n      2\tgrizzly+bear\n")
    (root / "predicates.txt").write_text("      1\tblack\n      2\tfurry\n      3\tbig teeth\n")
    (root / "predicate-matrix-binary.txt").write_text("0 1 0\n1 1 1\n")
    return root
