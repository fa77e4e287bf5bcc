"""Images of an ``.npz`` in ADM's layout, read one by one from where they lie in the file. numpy only."""

import hashlib
import os
import threading
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from errors import UserError

ARRAY = "arr_0"
LAYOUT = "uint8 [N, H, W, 3], square"
_READ_BYTES = 1 << 22


class NpzImages:
    """``arr_0`` of an ``.npz``, uint8 ``[N, H, H, 3]``, as a :class:`dataset.images.ImageDataset` without labels.

    Uncompressed (``np.savez``) each image is one positioned read. Compressed, the array is unpacked from its beginning
    on: items must then be asked for in ascending order, by one thread at a time (:attr:`is_sequential`).

    Raises:
        UserError: no such file, not an ``.npz``, no ``arr_0``, or an array of another type or shape.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        with open_npz(self.path) as archive:
            try:
                member = archive.getinfo(f"{ARRAY}.npy")
            except KeyError:
                raise UserError(
                    f"{self.path} has no {ARRAY} (it has {', '.join(array_names(archive)) or 'nothing'}); images must "
                    f"be its {ARRAY}, {LAYOUT}"
                ) from None
            with archive.open(member) as file:
                shape, dtype, self._start = self._read_header(file)
            if member.compress_type == zipfile.ZIP_STORED:  # else zipfile compares it as the array is unpacked
                _check_crc(archive, member, self.path)
            self._digest = hashlib.sha256(
                repr([(m.filename, m.CRC, m.file_size) for m in archive.infolist()]).encode()
            ).hexdigest()
        self._check_layout(shape, dtype)
        self._count, self.resolution = shape[0], shape[1]
        self.labels = np.zeros(self._count, np.int64)
        self.class_names = [""]
        self.shard_counts = [self._count]
        self.is_sequential = member.compress_type != zipfile.ZIP_STORED
        self._descriptor = os.open(self.path, os.O_RDONLY)
        if not self.is_sequential:
            # APPNOTE.TXT 4.3.7: 30 bytes, the last four being the lengths of the name and the extra field that follow
            header = os.pread(self._descriptor, 30, member.header_offset)
            lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            self._start += member.header_offset + 30 + lengths
        self._lock, self._stream, self._next = threading.Lock(), None, 0

    def __len__(self) -> int:
        return self._count

    def __del__(self) -> None:
        if (descriptor := getattr(self, "_descriptor", None)) is not None:
            os.close(descriptor)

    def name(self, item: int) -> str:
        return f"{self.path.name}[{item}]"

    @property
    def readers(self) -> list:
        """None are packed; the file was compared with its checksum when it was opened."""
        return []

    def fingerprint(self) -> str:
        """By the checksums that a zip file keeps of its members: cheap, whatever the size."""
        return f"npz:{self._digest}"

    def read_into(self, items: Sequence[int] | np.ndarray, out: np.ndarray) -> None:
        read = self._unpack if self.is_sequential else self._read
        pixels = np.empty((self.resolution, self.resolution, 3), np.uint8)
        for item, planes in zip(items, out, strict=True):
            read(int(item), pixels)
            planes[...] = pixels.transpose(2, 0, 1)

    def _read(self, item: int, pixels: np.ndarray) -> None:
        done, buffer = 0, memoryview(pixels.reshape(-1))
        while done < pixels.nbytes:
            count = os.preadv(self._descriptor, (buffer[done:],), self._start + item * pixels.nbytes + done)
            if not count:
                raise UserError(f"{self.path} is cut short; copy or make it again")
            done += count

    def _unpack(self, item: int, pixels: np.ndarray) -> None:
        with self._lock:
            if self._stream is None or item < self._next:
                self._stream, self._next = open_npz(self.path).open(f"{ARRAY}.npy"), 0
                self._stream.seek(self._start)
            try:
                self._stream.seek((item - self._next) * pixels.nbytes, os.SEEK_CUR)
                data = self._stream.read(pixels.nbytes)
            except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
                raise UserError(f"{self.path} is damaged ({error}); copy or make it again") from error
            if len(data) != pixels.nbytes:
                raise UserError(f"{self.path} is cut short; copy or make it again")
            self._next = item + 1
        pixels[...] = np.frombuffer(data, np.uint8).reshape(pixels.shape)

    def _read_header(self, file) -> tuple[tuple[int, ...], np.dtype, int]:
        """Shape, type, and bytes of the header."""
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, is_fortran, dtype = read(file)
        except (ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise UserError(f"{self.path}: {ARRAY} is not readable ({error}); copy or make it again") from error
        if is_fortran and len(shape) > 1:
            raise UserError(f"{self.path}: {ARRAY} is in Fortran order; save np.ascontiguousarray of it")
        return shape, dtype, file.tell()

    def _check_layout(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        if dtype.hasobject:
            raise UserError(f"{self.path}: {ARRAY} holds pickled Python objects; images must be {LAYOUT}")
        if dtype != np.uint8:
            raise UserError(
                f"{self.path}: {ARRAY} is {dtype}; images must be {LAYOUT}, 0…255 (of floats in [-1, 1]: "
                "np.clip(np.round((x + 1) * 127.5), 0, 255).astype(np.uint8))"
            )
        if len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2]:
            raise UserError(f"{self.path}: {ARRAY} has shape {list(shape)}; images must be {LAYOUT}")


def _check_crc(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    """Read a member once, which zipfile compares with its checksum: about 1 GB a second."""
    try:
        with archive.open(member) as file:
            while file.read(_READ_BYTES):
                pass
    except (zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}); copy or make it again") from error


def open_npz(path: Path) -> zipfile.ZipFile:
    """The archive; a :class:`UserError` where the file is none."""
    try:
        return zipfile.ZipFile(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; correct the path") from None
    except (zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{path} is not a complete .npz ({error}); copy or make it again") from error


def array_names(archive: zipfile.ZipFile) -> list[str]:
    """Of the arrays in an ``.npz``."""
    return [name.removesuffix(".npy") for name in archive.namelist()]
