"""What is seen in an image: attribute tables of CelebA, DeepFashion, AwA2, or any ``attributes.csv``.

Each reader takes the folder as the data set's authors lay it out; annotation files may lie in it or one folder below
(``Anno/``, ``Eval/``…). No torch.
"""

import csv
import glob
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataset.images import SourceImages
from dataset.sources import FolderSource
from dataset.trees import FolderTree, LeftOut, describe_left_out, images_in
from errors import UserError
from runtime.log import logger

TRAIN, VALIDATION, TEST = 0, 1, 2
SHARES = (0.7, 0.1)  # of the images, for training and for validation, where the authors give no split
MAX_VALUES = 100  # of a column of attributes.csv: beyond that it is a number or a name, not an attribute
CSV_NAME = "attributes.csv"
_BINARY = ({"0", "1"}, {"-1", "1"}, {"false", "true"}, {"no", "yes"})  # what says itself whether it is there
_SPLIT_NAMES = {"train": TRAIN, "val": VALIDATION, "test": TEST}


@dataclass(frozen=True)
class AttributeTable:
    """Images with binary attributes.

    Attributes:
        kind: of :data:`READERS`.
        folder: where the images lie.
        files: of the images, relative to ``folder``, with forward slashes.
        names: of the attributes.
        values: bool ``[N, A]``.
        split: int8 ``[N]``, :data:`TRAIN`, :data:`VALIDATION` or :data:`TEST`; None where the authors give none.
        labels: int64 ``[N]``, a class for each image; zeros where there are no classes.
        class_names: label ``c`` means ``class_names[c]``.
    """

    kind: str
    folder: Path
    files: list[str]
    names: list[str]
    values: np.ndarray
    split: np.ndarray | None
    labels: np.ndarray
    class_names: list[str]

    def images(self, resolution: int) -> SourceImages:
        """The images, cropped to ``resolution`` pixels at each use."""
        return SourceImages(FolderSource(self.folder, "folders", self.class_names, self.files, self.labels), resolution)


def read_attributes(root: str | os.PathLike, kind: str = "auto") -> AttributeTable:
    """Read the attributes of a data set.

    Args:
        root: its folder.
        kind: of :data:`READERS`, or ``auto``: told from the annotation files that are there.

    Raises:
        UserError: no such files, or a mistake in one of them.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; attributes are read from the folder of the photographs: {_layouts()}")
    if kind == "auto":
        kind = attributes_kind(root) or ""
        if not kind:
            raise UserError(f"{root} holds no attributes: none of {_layouts()}")
    return READERS[kind](root)


def attributes_kind(root: str | os.PathLike) -> str | None:
    """Which reader a folder's annotation files ask for; None where there are none."""
    for kind, names in MARKS.items():
        if Path(root).is_dir() and _search(Path(root), *names):
            return kind
    return None


def split_at_random(count: int, seed: int) -> np.ndarray:
    """int8 ``[count]``: 70 % training, 10 % validation, 20 % test, a pure function of count and seed."""
    order = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, count]))).permutation(count)
    split = np.full(count, TEST, np.int8)
    train, validation = int(SHARES[0] * count), max(1, int(SHARES[1] * count))
    split[order[:train]] = TRAIN
    split[order[train : train + validation]] = VALIDATION
    return split


def read_celeba(root: Path) -> AttributeTable:
    """CelebA (Liu et al. 2015): 40 attributes of −1 and 1, and the authors' split.

    ``list_attr_celeba`` and ``list_eval_partition``, each as ``.txt`` (the authors') or ``.csv`` (Kaggle's).
    """
    path = _find(root, *MARKS["celeba"])
    if path.suffix == ".csv":
        header, *rows = [row for row in _csv_rows(path) if row] or [[]]
        names, count = header[1:], len(rows)
        if not names or not rows:
            raise UserError(f"{path} has no rows of a file and its attributes below a header; download it again")
    else:
        lines = _lines(path)
        count, names = _count(path, next(lines, "")), next(lines, "").split()
        rows = map(str.split, lines)
    files, values = [], np.zeros((count, len(names)), bool)
    for place, (file, *row) in enumerate(rows):
        _check_row(path, place, count, row, len(names))
        files.append(file)
        values[place] = [value.strip() == "1" for value in row]
    _check_count(path, len(files), count)
    split = _celeba_split(_find(root, "list_eval_partition.txt", "list_eval_partition.csv"), files)
    return AttributeTable("celeba", _image_folder(root, files[0]), files, names, values, split, *_one_class(count))


def read_deepfashion(root: Path) -> AttributeTable:
    """DeepFashion, category and attribute prediction (Liu et al. 2016).

    ``list_attr_cloth.txt`` names the attributes, ``list_attr_img.txt`` has 1, −1 and 0 (unknown) of each image: only 1
    counts as there. ``list_category_img.txt`` has the categories, which become the classes (their names from
    ``list_category_cloth.txt`` where that is there), ``list_eval_partition.txt`` the split.
    """
    names_path, path = _find(root, "list_attr_cloth.txt"), _find(root, "list_attr_img.txt")
    names = [line.rsplit(maxsplit=1)[0] for line in _table(names_path)]
    rows = _table(path)
    values = np.zeros((len(rows), len(names)), bool)
    files = []
    for place, line in enumerate(rows):
        file, *row = line.split()
        _check_row(path, place, len(rows), row, len(names))
        files.append(file)
        values[place] = [value == "1" for value in row]
    category = _pairs(_find(root, "list_category_img.txt"))
    split = _pairs(partition := _find(root, "list_eval_partition.txt"))
    numbers = np.array([_number(category, file, root / "list_category_img.txt") for file in files], np.int64)
    present, labels = np.unique(numbers, return_inverse=True)
    return AttributeTable(
        "deepfashion",
        _image_folder(root, files[0]),
        files,
        names,
        values,
        np.array([_split_code(split, file, partition) for file in files], np.int8),
        labels.astype(np.int64),
        _category_names(root, present.tolist()),
    )


def read_awa2(root: Path) -> AttributeTable:
    """Animals with Attributes 2 (Xian et al. 2018): each image has the attributes of its class.

    ``classes.txt`` and ``predicates.txt`` number classes and attributes, ``predicate-matrix-binary.txt`` has a row a
    class, images lie in ``JPEGImages/CLASS/``. The authors' split is by classes, for zero-shot learning; a probe splits
    the images of every class.
    """
    path = _find(root, "predicate-matrix-binary.txt")
    classes = [line.split(maxsplit=1)[1] for line in _numbered(_find(root, "classes.txt"))]
    names = [line.split(maxsplit=1)[1] for line in _numbered(_find(root, "predicates.txt"))]
    matrix = [line.split() for line in _lines(path)]
    if len(matrix) != len(classes) or any(len(row) != len(names) for row in matrix):
        raise UserError(
            f"{path} is not a matrix of {len(classes)} classes × {len(names)} attributes, which classes.txt and "
            "predicates.txt name; restore it"
        )
    folder = path.parent / "JPEGImages"
    folder = folder if folder.is_dir() else path.parent
    images, left_out = images_in(FolderTree(folder))
    number = {name: label for label, name in enumerate(classes)}
    files = [file for file in images if file.partition("/")[0] in number]
    files.sort(key=lambda file: (number[file.partition("/")[0]], file))
    taken = set(files)
    left_out += [LeftOut(file, "in no folder of classes.txt", True) for file in images if file not in taken]
    for line in describe_left_out(entry for entry in left_out if entry.is_image):
        logger.warning("%s: %s", folder, line)
    labels = [number[file.partition("/")[0]] for file in files]
    if not files:
        raise UserError(f"{folder} holds no images in folders of AwA2's classes ({classes[0]}…); give AwA2's folder")
    labels = np.array(labels, np.int64)
    values = np.array([[value == "1" for value in row] for row in matrix])
    return AttributeTable("awa2", folder, files, names, values[labels], None, labels, classes)


def read_csv(root: Path) -> AttributeTable:
    """``attributes.csv``: a header, then a file (relative to the CSV's folder) and categorical values a row.

    A column of 0 and 1, −1 and 1, false and true, or no and yes is one attribute. Any other becomes one attribute a
    value, ``COLUMN=VALUE``; a column that is the same everywhere says nothing and is left out. Upper and lower case are
    the same. A column ``split`` of train, val and test is the split. Where all files lie in folders, these are the
    classes.
    """
    path = _find(root, CSV_NAME)
    header, *rows = _csv_rows(path) or [[]]
    if len(header) < 2 or not rows:
        raise UserError(f"{path} has no rows of a file and its attributes below a header; write some")
    for place, row in enumerate(rows):
        if len(row) != len(header):
            raise UserError(f"{path}, line {place + 2}: {len(row)} columns where the header has {len(header)}; mend it")
    files = [row[0] for row in rows]
    columns = {name: [row[place + 1] for row in rows] for place, name in enumerate(header[1:])}
    split = columns.pop("split", None)
    if split is not None:
        pairs = dict(zip(files, split, strict=True))
        split = np.array([_split_code(pairs, file, path) for file in files], np.int8)
    attributes = {}
    for name, column in columns.items():
        attributes |= _binary_attributes(path, name, column)
    if not attributes:
        raise UserError(f"{path} has no column with different values; there is nothing to probe")
    classes = sorted({file.partition("/")[0] for file in files}) if all("/" in file for file in files) else [""]
    labels = np.array([classes.index(file.partition("/")[0]) if "/" in file else 0 for file in files], np.int64)
    values = np.stack(list(attributes.values()), 1)
    return AttributeTable("csv", path.parent, files, list(attributes), values, split, labels, classes)


def _csv_rows(path: Path) -> list[list[str]]:
    content = path.read_bytes()
    try:
        reader = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""))
        return list(reader)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text; save the file in UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}; is a quotation mark not closed? mend it") from error


READERS: dict[str, Callable[[Path], AttributeTable]] = {
    "celeba": read_celeba,
    "deepfashion": read_deepfashion,
    "awa2": read_awa2,
    "csv": read_csv,
}
MARKS = {  # the file that tells a layout from the others, under either of its names
    "celeba": ("list_attr_celeba.txt", "list_attr_celeba.csv"),
    "deepfashion": ("list_attr_img.txt",),
    "awa2": ("predicate-matrix-binary.txt",),
    "csv": (CSV_NAME,),
}


def _layouts() -> str:
    return ", ".join(f"{' or '.join(names)} ({kind})" for kind, names in MARKS.items())


def _search(root: Path, *names: str) -> Path | None:
    """The first of these files that is in the folder or one below."""
    paths = (path for name in names for path in (root / name, *sorted(root.glob(f"*/{name}"))))
    return next((path for path in paths if path.is_file()), None)


def _find(root: Path, *names: str) -> Path:
    found = _search(root, *names)
    if found is None:
        raise UserError(f"{root} has no {' or '.join(names)}, neither in it nor one folder below; copy it there")
    return found


def _lines(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8", errors="replace") as file:
        yield from (line for line in map(str.strip, file) if line)


def _count(path: Path, line: str) -> int:
    if not line.isdecimal():
        raise UserError(f"{path} does not begin with the number of its rows; download it again")
    return int(line)


def _check_count(path: Path, found: int, expected: int) -> None:
    if found != expected or not found:
        raise UserError(f"{path} has {found} rows where its first line says {expected}; download it again")


def _check_row(path: Path, place: int, count: int, row: Sequence[str], columns: int) -> None:
    if place >= count:
        _check_count(path, place + 1, count)
    if len(row) != columns:
        raise UserError(f"{path}, row {place + 1}: {len(row)} values for {columns} attributes; download the file again")


def _table(path: Path) -> list[str]:
    """The rows of a file that begins with their number and a header."""
    lines = _lines(path)
    count = _count(path, next(lines, ""))
    next(lines, None)
    rows = list(lines)
    _check_count(path, len(rows), count)
    return rows


def _numbered(path: Path) -> list[str]:
    """The rows ``NUMBER NAME`` of a file."""
    rows = list(_lines(path))
    if not rows or any(len(row.split(maxsplit=1)) != 2 for row in rows):
        raise UserError(f"{path} must have a number and a name in each row; download it again")
    return rows


def _pairs(path: Path) -> dict[str, str]:
    """A table of two columns."""
    return dict(row.split(maxsplit=1) for row in _table(path) if len(row.split()) == 2)


def _number(pairs: dict[str, str], file: str, path: Path) -> int:
    text = pairs.get(file, "")
    if not text.isdecimal():
        raise UserError(f"{path.name} has no number for {file}; download it again")
    return int(text)


def _split_code(pairs: dict[str, str], file: str, path: Path) -> int:
    name = pairs.get(file)
    if name not in _SPLIT_NAMES:
        raise UserError(f"{path}: {file} is in the split {name!r}; it must be one of {', '.join(_SPLIT_NAMES)}")
    return _SPLIT_NAMES[name]


def _celeba_split(path: Path, files: Sequence[str]) -> np.ndarray:
    rows = [row.replace(",", " ").split() for row in _lines(path)]
    codes = {row[0]: row[-1] for row in rows if row}
    missing = next((file for file in files if codes.get(file) not in ("0", "1", "2")), None)
    if missing is not None:
        raise UserError(f"{path} does not say 0, 1 or 2 of {missing}; download it again")
    return np.array([int(codes[file]) for file in files], np.int8)


def _image_folder(root: Path, first: str) -> Path:
    """The folder that the files' names begin at: the root, or up to two folders below."""
    for pattern in ("", "*/", "*/*/"):
        for found in sorted(root.glob(pattern + glob.escape(first))):
            return Path(str(found)[: -len(first) - 1])
    raise UserError(f"{root} does not hold the image {first}, nor do its folders; unpack the images there")


def _one_class(count: int) -> tuple[np.ndarray, list[str]]:
    return np.zeros(count, np.int64), [""]


def _category_names(root: Path, numbers: Sequence[int]) -> list[str]:
    path = _search(root, "list_category_cloth.txt")
    names = [] if path is None else [row.split()[0] for row in _table(path)]
    return [names[number - 1] if 0 < number <= len(names) else str(number) for number in numbers]


def _binary_attributes(path: Path, name: str, column: Sequence[str]) -> dict[str, np.ndarray]:
    spellings = {value.lower(): value for value in sorted(set(column), reverse=True)}  # of several, the first one
    values = sorted(spellings)
    if len(values) > MAX_VALUES:
        raise UserError(
            f"{path}: column {name} has {len(values)} different values; attributes are categories (up to "
            f"{MAX_VALUES}): remove the column or put its values into classes"
        )
    array = np.array([value.lower() for value in column])
    if len(values) < 2:
        return {}
    if set(values) in _BINARY:
        return {name: array == values[1]}  # the positive word comes later in the alphabet
    return {f"{name}={spellings[value]}": array == value for value in values}
