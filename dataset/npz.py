"""Images as one ``.npz`` (``arr_0``, uint8 ``[N, H, W, 3]``), which the public evaluators of generated images read."""

import io
import zipfile
from pathlib import Path

import numpy as np

from dataset.images import ImageDataset
from files import whole_file

CHUNK_BYTES = 1 << 26
_EPOCH = (1980, 1, 1, 0, 0, 0)  # zip's first; so that the same images are the same bytes


def write_npz(images: ImageDataset, path: Path) -> None:
    """Stream all images into an uncompressed ``.npz``: complete or not at all, the same bytes again."""
    side = images.resolution
    chunk = max(1, CHUNK_BYTES // (3 * side * side))
    buffer = np.empty((min(chunk, len(images)), 3, side, side), np.uint8)
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        member = zipfile.ZipInfo("arr_0.npy", _EPOCH)
        with (
            zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
            archive.open(member, "w", force_zip64=True) as array,
        ):
            array.write(_header((len(images), side, side, 3)))
            for first in range(0, len(images), chunk):
                items = range(first, min(first + chunk, len(images)))
                out = buffer[: len(items)]
                images.read_into(items, out)
                array.write(np.ascontiguousarray(out.transpose(0, 2, 3, 1)).reshape(-1))


def npz_bytes(count: int, resolution: int) -> int:
    """Bytes of such a file, but for its header."""
    return count * 3 * resolution**2


def _header(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()
