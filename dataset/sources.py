"""The photographs as people have them on disk: class folders, dataset.json, zips of either, Hugging Face parquet files.

A source is an ordered list of encoded images with labels. It may be pickled or forked into worker processes, each of
which opens the files it needs. No torch.
"""

import hashlib
import json
import os
import re
import threading
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from dataset.transforms import IMAGE_SUFFIXES
from errors import UserError

_SPLITS = ("train", "training", "val", "valid", "validation", "test")
_LAYOUTS = "class folders, a dataset.json, a .zip of either, or .parquet files"


class Source(ABC):
    """Encoded images in a fixed order, with labels.

    Attributes:
        kind: ``"folders"``, ``"dataset.json"``, ``"zip"`` or ``"parquet"``.
        path: where it lies.
        classes: class names; label ``c`` means ``classes[c]``.
        names: one name per image, unique, relative to ``path``, with forward slashes.
        labels: int64 ``[N]``.
    """

    kind: str

    def __init__(self, path: Path, classes: list[str], names: list[str], labels: np.ndarray) -> None:
        self.path = path
        self.classes = classes
        self.names = names
        self.labels = labels

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The encoded bytes of an image. Raises OSError, with the reason, where they cannot be had."""

    @abstractmethod
    def marks(self) -> np.ndarray:
        """int64: what tells, without reading images, that some were replaced under their names."""

    def fingerprint(self) -> str:
        """SHA-256 over classes, names, labels and marks: the same files under another root have the same one."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        digest.update("\n".join(self.names).encode(errors="surrogateescape"))
        digest.update(self.labels.astype("<i8").tobytes())
        digest.update(self.marks().astype("<i8").tobytes())
        return digest.hexdigest()


class FolderSource(Source):
    """Files below a folder, labelled by their class folder or by a dataset.json."""

    def __init__(self, path: Path, kind: str, classes: list[str], names: list[str], labels: np.ndarray) -> None:
        super().__init__(path, classes, names, labels)
        self.kind = kind

    def read(self, index: int) -> bytes:
        return (self.path / self.names[index]).read_bytes()

    def marks(self) -> np.ndarray:
        return _file_sizes(self.path, self.names)


class ZipSource(Source):
    """Members of a zip file.

    Keeps where each member lies instead of a ``ZipFile``: a million ``ZipInfo`` objects in each worker would be
    gigabytes, and positioned reads on one descriptor need no lock between threads.
    """

    kind = "zip"

    def __init__(
        self, path: Path, classes: list[str], names: list[str], labels: np.ndarray, members: list[zipfile.ZipInfo]
    ) -> None:
        super().__init__(path, classes, names, labels)
        self._table = np.array(
            [(m.header_offset, m.compress_size, m.CRC, m.compress_type, m.flag_bits & 1) for m in members], np.int64
        )
        self._descriptor: int | None = None
        self._lock = threading.Lock()

    def read(self, index: int) -> bytes:
        offset, size, crc, method, encrypted = self._table[index].tolist()
        if encrypted or method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise OSError("encrypted or compressed by a method other than deflate in its zip file")
        # APPNOTE.TXT 4.3.7: 30 bytes, the last four being the lengths of the name and the extra field that follow
        header = self._pread(30, offset)
        if header[:4] != b"PK\x03\x04":
            raise OSError("damaged in its zip file")
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        data = self._pread(size, offset + 30 + lengths)
        try:
            if method == zipfile.ZIP_DEFLATED:
                data = zlib.decompress(data, wbits=-zlib.MAX_WBITS)
        except zlib.error as error:
            raise OSError("damaged in its zip file") from error
        if zlib.crc32(data) != crc:
            raise OSError("damaged in its zip file (wrong CRC)")
        return data

    def marks(self) -> np.ndarray:
        return self._table[:, 2]  # CRCs

    def _pread(self, size: int, offset: int) -> bytes:
        with self._lock:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDONLY)
        return os.pread(self._descriptor, size, offset)

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in ("_descriptor", "_lock")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _descriptor=None, _lock=threading.Lock())


class ParquetSource(Source):
    """Rows of Hugging Face parquet files (columns ``image`` {bytes, path} and ``label``), a row group at a time."""

    kind = "parquet"

    def __init__(
        self, path: Path, classes: list[str], names: list[str], labels: np.ndarray, groups: list[tuple[str, int, int]]
    ) -> None:
        """``groups``: file name, number of the row group in that file, number of rows, in the order of ``names``."""
        super().__init__(path, classes, names, labels)
        self._groups = groups
        self._starts = np.cumsum([0] + [rows for _, _, rows in groups])
        self._held: tuple[int, list] | None = None

    def read(self, index: int) -> bytes:
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        if self._held is None or self._held[0] != group:
            self._held = group, self._read_group(group)
        data = self._held[1][index - int(self._starts[group])].as_py()
        if not data:
            raise OSError("the row holds no image bytes")
        return data

    def marks(self) -> np.ndarray:
        return _file_sizes(self.path, dict.fromkeys(file for file, _, _ in self._groups))

    def _read_group(self, group: int):
        parquet = _import_pyarrow_parquet(self.path)
        file, number, _ = self._groups[group]
        with parquet.ParquetFile(self.path / file) as opened:
            column = opened.read_row_group(number, columns=["image.bytes"], use_threads=False).column("image")
        return column.combine_chunks().field("bytes")

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_held": None}


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
        return _open_zip(path)
    if (path / "index.json").is_file() and (path / "labels.npy").is_file():
        raise UserError(f"{path} is a packed dataset already; give the photographs that it was made from")
    if (path / "dataset.json").is_file():
        return _open_dataset_json(path)
    parquet_files = sorted(file.name for file in path.glob("*.parquet"))
    return _open_parquet(path, parquet_files) if parquet_files else _open_class_folders(path)


def _open_class_folders(path: Path) -> Source:
    classes = sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))
    images = {folder: _images_in(os.listdir(path / folder)) for folder in classes}
    files = [f"{folder}/{name}" for folder in classes for name in images[folder]]
    if files and (empty := [folder for folder in classes if not images[folder]]):
        raise UserError(
            f"{path} has folders without images in them, which would be classes ({_few(empty)}): remove them, or say "
            "with a dataset.json what belongs to which class"
        )
    if not files:
        raise UserError(
            _explain_no_images(path, classes, lambda name: any(e.is_dir() for e in os.scandir(path / name)))
        )
    return FolderSource(path, "folders", classes, *_label_by_folder(files, classes))


def _open_dataset_json(path: Path) -> Source:
    pairs = _parse_dataset_json((path / "dataset.json").read_bytes(), path / "dataset.json")
    present = {
        (Path(folder) / name).relative_to(path).as_posix() for folder, _, names in os.walk(path) for name in names
    }
    return FolderSource(path, "dataset.json", *_label_by_pairs(pairs, present, path))


def _open_zip(path: Path) -> Source:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist() if _is_visible(info)}
            base = _common_base(members)
            labels_file = archive.read(base + "dataset.json") if base + "dataset.json" in members else None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path} is not a readable zip file ({error}); copy or download it again") from error
    relative = [name.removeprefix(base) for name in members]
    if labels_file is not None:
        pairs = _parse_dataset_json(labels_file, f"{path}:{base}dataset.json")
        classes, names, labels = _label_by_pairs(pairs, set(relative), path)
    else:
        classes = sorted({name.split("/")[0] for name in relative if "/" in name})
        files = [name for name in _images_in(relative) if name.count("/") == 1]
        if not files:
            raise UserError(_explain_no_images(path, classes, lambda name: False))
        names, labels = _label_by_folder(files, classes)
    return ZipSource(path, classes, names, labels, [members[base + name] for name in names])


def _open_parquet(path: Path, files: list[str]) -> Source:
    parquet = _import_pyarrow_parquet(path)
    classes, names, labels, groups = None, [], [], []
    for file in _one_split(path, files):
        try:
            with parquet.ParquetFile(path / file) as opened:
                _check_columns(path / file, opened.schema_arrow)
                classes = classes or _class_names_in(opened.schema_arrow.metadata)
                column = opened.read(columns=["label"], use_threads=False).column("label")
                rows = [opened.metadata.row_group(number).num_rows for number in range(opened.num_row_groups)]
        except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
            raise UserError(
                f"{path / file} is not a readable parquet file ({_first_line(error)}); download it again"
            ) from error
        if column.null_count:
            raise UserError(f"{path / file} has rows without a label; give files whose rows are all labelled")
        labels.append(np.asarray(column, dtype=np.int64))
        names += [f"{file}/{row}" for row in range(len(column))]
        groups += [(file, number, count) for number, count in enumerate(rows)]
    labels = np.concatenate(labels)
    if not len(labels):
        raise UserError(f"the .parquet files in {path} have no rows; download them again")
    if labels.min() < 0 or (classes and labels.max() >= len(classes)):
        raise UserError(f"{path} has labels outside the classes (a test split?); give the files of a labelled split")
    classes = classes or [str(number) for number in range(int(labels.max()) + 1)]
    return ParquetSource(path, classes, names, labels, groups)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _file_sizes(root: Path, names: Iterable[str]) -> np.ndarray:
    """Bytes of each file, -1 where it is gone."""

    def size(name: str) -> int:
        try:
            return os.stat(root / name).st_size
        except OSError:
            return -1

    return np.array([size(name) for name in names], np.int64)


def _images_in(names: Iterable[str]) -> list[str]:
    return sorted(
        name
        for name in names
        if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not os.path.basename(name).startswith(".")
    )


def _label_by_folder(files: list[str], classes: list[str]) -> tuple[list[str], np.ndarray]:
    number = {name: label for label, name in enumerate(classes)}
    return files, np.array([number[name.split("/")[0]] for name in files], np.int64)


def _label_by_pairs(
    pairs: list[tuple[str, int]], present: set[str], path: Path
) -> tuple[list[str], list[str], np.ndarray]:
    """Classes, names and labels from dataset.json's pairs, all of whose files must be among ``present``."""
    names = [name for name, _ in pairs]
    missing = next((name for name in names if name not in present), None)
    if missing is not None:
        raise UserError(f"dataset.json names {missing}, which is not in {path}; add the file or remove its entry")
    if len(set(names)) != len(names):
        raise UserError(f"dataset.json in {path} names a file twice; remove the second entry")
    labels = np.array([label for _, label in pairs], np.int64)
    return [str(number) for number in range(int(labels.max()) + 1)], names, labels


def _parse_dataset_json(text: bytes, where: Path | str) -> list[tuple[str, int]]:
    """The (file, label) pairs of ``{"labels": [["00000/img00000000.png", 6], ...]}``, sorted by file."""
    try:
        pairs = json.loads(text)["labels"]
        pairs = sorted((PurePosixPath(name).as_posix(), label) for name, label in pairs)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{where} must read {{"labels": [["file.png", 0], ...]}} with a label for each file') from error
    if not pairs:
        raise UserError(f"{where} lists no files; give a dataset with images")
    if not all(type(label) is int and label >= 0 for _, label in pairs):
        raise UserError(f"{where} has labels that are not class numbers; they must be integers of at least 0")
    return pairs


def _is_visible(info: zipfile.ZipInfo) -> bool:
    parts = info.filename.split("/")
    return not info.is_dir() and not any(part.startswith((".", "__MACOSX")) for part in parts)


def _common_base(members: Iterable[str]) -> str:
    """The wrapping folder, with its slash, of a zip that was made from one folder; else the empty string."""
    base = ""
    while True:
        below = [name.removeprefix(base) for name in members]
        tops = {name.split("/")[0] for name in below}
        if len(tops) != 1 or any(name.count("/") < 2 and not name.endswith("/dataset.json") for name in below):
            return base
        base += f"{tops.pop()}/"


def _explain_no_images(path: Path, folders: list[str], is_nested: Callable[[str], bool]) -> str:
    if not folders and path.is_dir() and _images_in(os.listdir(path)):
        return f"{path} holds images, but no class folders: move them into a folder inside it, one for each class"
    if not folders:
        return f"{path} holds no class folders with images in them; give a folder with {_LAYOUTS}"
    split = next((name for name in folders if name.lower() in _SPLITS), None)
    if split is not None:
        return f"{path} holds splits ({', '.join(folders)}), not classes; give {path / split}"
    if any(is_nested(name) for name in folders):
        return f"the folders in {path} hold no images, only folders; give the folder whose sub-folders are the classes"
    return f"no images ({' '.join(sorted(IMAGE_SUFFIXES))}) in the class folders of {path}"


def _import_pyarrow_parquet(path: Path):
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path} holds .parquet files, which need pyarrow: pip install pyarrow") from error
    return pyarrow.parquet


def _one_split(path: Path, files: list[str]) -> list[str]:
    splits: dict[str, list[str]] = {}
    for file in files:
        match = re.match(r"([A-Za-z]+)-", file)
        splits.setdefault(match[1].lower() if match else "", []).append(file)
    if len(splits) == 1:
        return files
    if "train" not in splits:
        raise UserError(f"{path} holds several sets of .parquet files and none is train-*; leave one set in the folder")
    return splits["train"]


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
        names = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except (TypeError, KeyError, ValueError):
        return None
    return [str(name) for name in names]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
