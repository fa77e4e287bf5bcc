"""Which layout photographs lie in, and so which images there are and what their labels are.

Class folders, a dataset.json, Hugging Face's .parquet files; a folder and a zip are read alike, through one listing of
their files (``dataset.trees``). What is not taken is listed in the source's ``left_out``. No torch.
"""

import os
import re
from pathlib import Path, PurePosixPath

import numpy as np

from dataset.sources import FolderSource, ParquetSource, Source, ZipSource, import_pyarrow_parquet
from dataset.transforms import IMAGE_SUFFIXES
from dataset.trees import FolderTree, LeftOut, Tree, ZipTree, few, images_in, left_out_by_name
from errors import UserError
from schema import parse_json

MAX_CLASSES = 1_000_000  # a larger class number is no class, and would be given as many names
LABELS_FILE = "dataset.json"
_LAYOUTS = "class folders, a dataset.json, a .zip of either, or .parquet files"
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval", "heldout", "holdout"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def open_source(path: str | os.PathLike) -> Source:
    """Open photographs in any of the supported layouts; which one is told from what is there.

    Raises:
        UserError: nothing there, nothing usable there, or a layout with a mistake in it.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; give a folder with {_LAYOUTS}")
    if path.is_file():
        if path.suffix.lower() != ".zip":
            raise UserError(f"{path} is a file, but no .zip; give a folder with {_LAYOUTS}")
        tree = ZipTree(path)
    else:
        if (path / "index.json").is_file() and (path / "labels.npy").is_file():
            raise UserError(f"{path} is a packed dataset already; give the photographs that it was made from")
        tree = FolderTree(path)
    base = _base(tree)
    if LABELS_FILE in tree.files[base]:
        source = _by_dataset_json(tree, base)
    elif files := _parquet_files(tree, base):
        source = _by_parquet(tree, base, files)
    else:
        source = _by_class_folders(tree, base)
    if base:
        source.note = ", ".join(filter(None, (f"below {base}", source.note)))
        source.left_out += _around(tree, base)
    return source


def _base(tree: Tree) -> str:
    """The folder that the data set begins at: one that wraps the whole of it, as in many zips, is skipped."""
    base = ""
    while True:
        folders = tree.folders(base)
        if len(folders) != 1 or LABELS_FILE in tree.files[base] or _holds_images(tree.files[base]):
            return base
        inner = f"{base}/{folders[0]}" if base else folders[0]
        wraps = tree.folders(inner) and not _holds_images(tree.files[inner])
        if not wraps and LABELS_FILE not in tree.files[inner]:
            return base
        base = inner


def _around(tree: Tree, base: str) -> list[LeftOut]:
    """What lies outside the folder that the data set begins at: no images, or it would not begin there."""
    left_out = [entry for entry in tree.left_out if not entry.name.startswith(f"{base}/")]
    for folder in ("", *(base[: place.start()] for place in re.finditer("/", base))):
        left_out += [left_out_by_name(f"{folder}/{name}" if folder else name) for name in tree.files[folder]]
    return left_out


def _by_class_folders(tree: Tree, base: str) -> Source:
    where = _where(tree, base)
    classes = tree.folders(base)
    _refuse_splits(tree, base)
    found, left_out = images_in(tree, base)
    images: dict[str, list[str]] = {name: [] for name in classes}
    for name in found:
        top, slash, _ = name.partition("/")
        if slash:
            images[top].append(name)
        else:
            left_out.append(LeftOut(name, "lies in no class folder", True))
    lost = [entry for entry in left_out if entry.is_image and "/" in entry.name]
    instead = f"; not read: {lost[0].name} ({lost[0].reason})" if lost else ""
    empty = [name for name in classes if not images[name]]
    if len(empty) == len(classes):
        if not classes and left_out and any(entry.is_image for entry in left_out):
            raise UserError(
                f"{where} holds images, but no class folders: move them into a folder inside it, one for each class"
            )
        if not classes:
            raise UserError(f"{where} holds no class folders with images in them; give a folder with {_LAYOUTS}")
        raise UserError(
            f"no images in the class folders of {where}{instead}; an image is told by its suffix: "
            f"{' '.join(sorted(IMAGE_SUFFIXES))}"
        )
    if empty:
        raise UserError(
            f"{where} has folders without images in them, which would be classes ({few(empty)}): give the folder "
            "that holds the class folders alone, remove them, or say with a dataset.json what belongs to which class"
            f"{instead}"
        )
    names = [name for folder in classes for name in sorted(images[folder])]
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(images[folder]) for folder in classes])
    return _source(tree, base, "folders", classes, names, labels, left_out)


def _by_dataset_json(tree: Tree, base: str) -> Source:
    """Labels by file; ``"labels": null``, of StyleGAN and EDM, says that there are none: one class."""
    where = f"{tree.path}:{base}/{LABELS_FILE}" if isinstance(tree, ZipTree) else str(tree.path / base / LABELS_FILE)
    pairs = _parse_dataset_json(tree.read(f"{base}/{LABELS_FILE}" if base else LABELS_FILE), where)
    images, left_out = images_in(tree, base)
    left_out = [entry for entry in left_out if entry.name != LABELS_FILE]
    if pairs is None:
        if not images:
            raise UserError(f"{where} has no labels, and there are no images beside it; give a dataset with images")
        source = _source(tree, base, LABELS_FILE, ["0"], sorted(images), np.zeros(len(images), np.int64), left_out)
        source.note = "without labels: one class"
        return source
    names = [name for name, _ in pairs]
    labelled = set(names)
    if len(labelled) != len(names):
        raise UserError(f"{where} names a file twice; remove the second entry")
    present = {f"{folder}/{name}" if folder else name for folder, below in tree.below(base) for name in below}
    missing = next((name for name in names if name not in present), None)
    if missing is not None:
        raise UserError(
            f"dataset.json names {missing}, which is not in {_where(tree, base)} (hidden files do not count); add the "
            "file or remove its entry"
        )
    left_out = [entry for entry in left_out if entry.name not in labelled]
    left_out += [LeftOut(name, "has no label in dataset.json", False) for name in images if name not in labelled]
    labels = np.array([label for _, label in pairs], np.int64)
    classes = [str(number) for number in range(int(labels.max()) + 1)]
    return _source(tree, base, LABELS_FILE, classes, names, labels, left_out)


def _parse_dataset_json(text: bytes, where: str) -> list[tuple[str, int]] | None:
    """The (file, label) pairs of ``{"labels": [["00000/img00000000.png", 6], ...]}``, by file, or None for null."""
    try:
        pairs = parse_json(text)["labels"]
        if pairs is None:
            return None
        pairs = sorted((PurePosixPath(name).as_posix(), label) for name, label in pairs)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{where} must read {{"labels": [["file.png", 0], ...]}} with a label for each file') from error
    if not pairs:
        raise UserError(f"{where} lists no files; give a dataset with images")
    if not all(type(label) is int and label >= 0 for _, label in pairs):
        raise UserError(f"{where} has labels that are not class numbers; they must be integers of at least 0")
    _check_largest(*max(pairs, key=lambda pair: pair[1]), where)
    return pairs


def _parquet_files(tree: Tree, base: str) -> list[str]:
    """The .parquet files, if they are the data set: at its top, or below in a folder that holds no class's images."""
    files = [
        f"{folder}/{name}" if folder else name
        for folder, names in tree.below(base)
        for name in names
        if name.lower().endswith(".parquet")
    ]
    if not files or any("/" not in name for name in files):
        return files
    with_images = {name.partition("/")[0] for name in images_in(tree, base)[0]}
    return [] if {name.partition("/")[0] for name in files} <= with_images else files


def _by_parquet(tree: Tree, base: str, files: list[str]) -> Source:
    where = tree.path / base
    if isinstance(tree, ZipTree):
        raise UserError(f"{tree.path} holds .parquet files, which are not read in a zip; unpack it, give the folder")
    parquet = import_pyarrow_parquet(where)
    taken, split = _one_split(where, sorted(files))
    classes, names, labels, groups = None, [], [], []
    for file in taken:
        try:
            with parquet.ParquetFile(where / file) as opened:
                _check_columns(where / file, opened.schema_arrow)
                named = _class_names_in(opened.schema_arrow.metadata)
                column = opened.read(columns=["label"], use_threads=False).column("label")
                rows = [opened.metadata.row_group(number).num_rows for number in range(opened.num_row_groups)]
        except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
            raise UserError(
                f"{where / file} is not a readable parquet file ({_first_line(error)}); download it again, or, of a "
                "git clone, run: git lfs pull"
            ) from error
        if column.null_count:
            raise UserError(f"{where / file} has rows without a label; give files whose rows are all labelled")
        if classes and named and named != classes:
            raise UserError(f"{where / file} names other classes than {taken[0]}; give the files of one data set alone")
        classes = classes or named
        labels.append(np.asarray(column, dtype=np.int64))
        names += [f"{file}/{row}" for row in range(len(column))]
        groups += [(file, number, count) for number, count in enumerate(rows)]
    labels = np.concatenate(labels)
    if not len(labels):
        raise UserError(f"the .parquet files in {where} have no rows; download them again")
    if labels.min() < 0 or (classes and labels.max() >= len(classes)):
        raise UserError(f"{where} has labels outside the classes (a test split?); give the files of a labelled split")
    _check_largest(names[int(labels.argmax())], int(labels.max()), str(where))
    source = ParquetSource(
        where, classes or [str(number) for number in range(int(labels.max()) + 1)], names, labels, groups
    )
    source.note = f"the split {split}" if len(taken) < len(files) else ""
    others = dict.fromkeys(sorted(set(files) - set(taken)), f"not of the split {split}")
    images, source.left_out = images_in(tree, base)
    source.left_out = [
        entry._replace(reason=others.get(entry.name, entry.reason), is_image=False)
        for entry in source.left_out
        if entry.name not in taken
    ]
    source.left_out += [LeftOut(name, "lies beside the .parquet files, which are read", False) for name in images]
    return source


def _one_split(path: Path, files: list[str]) -> tuple[list[str], str]:
    """The files to train on, and the name of their split.

    Raises:
        UserError: several splits of which none is the training set, or several training sets.
    """
    splits: dict[str, list[str]] = {}
    for file in files:
        # the nearest name that says it: 0000.parquet may lie in train/, and imagenet-val-0.parquet in data/
        said = next(filter(None, map(_split_of, reversed(file.split("/")))), "")
        splits.setdefault(said, []).append(file)
    split = "train" if "train" in splits else next(iter(splits))
    if len(splits) > 1 and split != "train":
        firsts = few([those[0] for those in splits.values()])
        raise UserError(
            f"{path} holds several sets of .parquet files ({firsts}), and none is called train; leave one set in the "
            "folder"
        )
    folders = sorted({file.rpartition("/")[0] for file in splits[split]})
    if len(folders) > 1:
        raise UserError(
            f"{path} holds .parquet files in several folders ({few(folders)}), which may be one data set in several "
            "versions; give one of them, or move all files into one folder"
        )
    return splits[split], split


def _split_of(name: str) -> str:
    """``train``, ``validation`` or ``test``, if a name says just one of them; else the empty string."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)]
    said = {_SPLITS[word] for word in words if word in _SPLITS}
    if not said:  # trainset, cifartest
        said = {split for word, split in _SPLITS.items() if word in name.lower()}
    return said.pop() if len(said) == 1 else ""


def _refuse_splits(tree: Tree, base: str) -> None:
    """Folders of a training and of a held-out set are neither two classes nor parts of one."""
    for below, _ in tree.below(base):
        folder = "/".join(filter(None, (base, below)))
        names = tree.folders(folder)
        splits = {name: split for name in names if (split := _split_of(name))}
        if len(set(splits.values())) < 2 or 2 * len(splits) < len(names):
            continue
        where, give = _where(tree, folder), next((name for name in splits if splits[name] == "train"), min(splits))
        if below:
            advice = "make a tree of class folders of one split"
        else:
            advice = f"unpack it and give its folder {give}" if isinstance(tree, ZipTree) else f"give {where}/{give}"
        raise UserError(f"{where} holds splits ({few(list(splits))}), not classes; {advice}")


def _source(
    tree: Tree, base: str, kind: str, classes: list[str], names: list[str], labels: np.ndarray, left_out: list[LeftOut]
) -> Source:
    """Files of a tree, named relative to ``base``, as a source."""
    if isinstance(tree, ZipTree):
        prefix = f"{base}/" if base else ""
        source = ZipSource(tree.path, classes, names, labels, [tree.members[prefix + name] for name in names])
    else:
        source = FolderSource(tree.path / base, kind, classes, names, labels)
    source.left_out = sorted(left_out)
    return source


def _where(tree: Tree, base: str) -> str:
    """A place in a message."""
    return str(tree.path / base) if base else str(tree.path)


def _holds_images(names: list[str]) -> bool:
    return any(left_out_by_name(name) is None for name in names)


def _check_largest(name: str, label: int, where: str) -> None:
    if label >= MAX_CLASSES:
        raise UserError(
            f"{where} gives {name} the label {label}; class numbers must be below {MAX_CLASSES}: number the classes "
            "0, 1, 2, …"
        )


def _check_columns(file: Path, schema) -> None:
    fields = {field.name: field.type for field in schema}
    image, label = fields.get("image"), str(fields.get("label"))
    has_bytes = image is not None and image.num_fields and image.get_field_index("bytes") >= 0
    if not has_bytes or not label.startswith(("int", "uint")):
        found = ", ".join(f"{name}: {kind}" for name, kind in fields.items())
        raise UserError(f"{file} has no columns image {{bytes, path}} and integer label; it has {found[:200]}")


def _class_names_in(metadata: dict[bytes, bytes] | None) -> list[str] | None:
    """The names of a ClassLabel feature, which the datasets library leaves in the schema's metadata."""
    try:
        names = parse_json(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except (TypeError, KeyError, ValueError):
        return None
    return [str(name) for name in names]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
