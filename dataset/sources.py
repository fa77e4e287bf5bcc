"""Encoded images with labels, in a fixed order, wherever they lie: files of a folder, members of a zip, parquet rows.

A source may be pickled or forked into worker processes, each of which opens the files it needs. Which images and labels
a folder or zip holds is told by ``dataset.layouts``. No torch.
"""

import hashlib
import json
import os
import threading
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dataset.trees import LeftOut
from errors import UserError

MAX_FILE_BYTES = 1 << 29  # of an encoded image: what is larger is a mistake or a trap, and is not read into memory


class Source(ABC):
    """Encoded images in a fixed order, with labels.

    Attributes:
        kind: ``"folders"``, ``"dataset.json"``, ``"zip"`` or ``"parquet"``.
        path: where it lies.
        classes: class names; label ``c`` means ``classes[c]``.
        names: one name per image, unique, relative to ``path``, with forward slashes.
        labels: int64 ``[N]``.
        left_out: files that lie there, too, and are not among the images.
        note: what else a user should know of how it is read; empty where there is nothing.
    """

    kind: str

    def __init__(self, path: Path, classes: list[str], names: list[str], labels: np.ndarray) -> None:
        self.path = path
        self.classes = classes
        self.names = names
        self.labels = labels
        self.left_out: list[LeftOut] = []
        self.note = ""

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
        with open(self.path / self.names[index], "rb") as file:
            _check_bytes(os.fstat(file.fileno()).st_size)
            return file.read()

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
            [(m.header_offset, m.compress_size, m.CRC, m.compress_type, m.flag_bits & 1, m.file_size) for m in members],
            np.int64,
        )
        self._descriptor: int | None = None
        self._lock = threading.Lock()

    def read(self, index: int) -> bytes:
        offset, size, crc, method, encrypted, unpacked = self._table[index].tolist()
        if encrypted or method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise OSError("encrypted or compressed by a method other than deflate in its zip file")
        _check_bytes(max(size, unpacked))
        # APPNOTE.TXT 4.3.7: 30 bytes, the last four being the lengths of the name and the extra field that follow
        header = self._pread(30, offset)
        if header[:4] != b"PK\x03\x04":
            raise OSError("damaged in its zip file")
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        data = self._pread(size, offset + 30 + lengths)
        try:
            if method == zipfile.ZIP_DEFLATED:
                data = zlib.decompressobj(wbits=-zlib.MAX_WBITS).decompress(data, unpacked + 1)  # and no bomb
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
        parquet = import_pyarrow_parquet(self.path)
        file, number, _ = self._groups[group]
        with parquet.ParquetFile(self.path / file) as opened:
            column = opened.read_row_group(number, columns=["image.bytes"], use_threads=False).column("image")
        return column.combine_chunks().field("bytes")

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_held": None}


def _check_bytes(size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise OSError(f"{size} bytes are over the limit of {MAX_FILE_BYTES} for an image file")


def _file_sizes(root: Path, names: Iterable[str]) -> np.ndarray:
    """Bytes of each file, -1 where it is gone."""

    def size(name: str) -> int:
        try:
            return os.stat(root / name).st_size
        except OSError:
            return -1

    return np.array([size(name) for name in names], np.int64)


def import_pyarrow_parquet(path: Path):
    """The module ``pyarrow.parquet``, which only these files need."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path} holds .parquet files, which need pyarrow: pip install pyarrow") from error
    return pyarrow.parquet
