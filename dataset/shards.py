"""The packed format: a folder of large .npy shards, labels and an index, for images and for latents alike. numpy only.

::

    index.json            format version, kind, shape, dtype, codec, class names, source, shards: counts and checksums
    labels.npy            int64 [N]
    rejected.csv          name, reason: source files that could not be used
    images-00000.npy      codec raw: [n, *shape];  codec png: uint8 [bytes], n files one after the other, and
    images-00000-offsets.npy  int64 [n + 1], where each begins and the last ends

A shard covers a fixed count of source files and is shorter where files were rejected, so its bytes depend on nothing
but the source and the settings. Until the index is written, each complete shard has a record next to it
(``images-00000.json``); a writer that was killed skips those. Everything appears under its name only when it is
complete and on disk.
"""

import bisect
import csv
import functools
import hashlib
import io
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from dataset.open_files import OpenShards, ShardFile
from errors import UserError, one_line
from files import FileEntry, checksum, write_atomically
from schema import MalformedError, check, read_json

FORMAT_VERSION = 1
INDEX_NAME = "index.json"
LABELS_NAME = "labels.npy"
REJECTED_NAME = "rejected.csv"
KINDS, CODECS = ("images", "latents", "features", "class-tokens"), ("raw", "png")
MOST_VALUES = 1 << 32  # of an item: beyond that an index is damaged
_READ_BYTES = 1 << 22
# Up to this many files a dataset is measured when it is opened, so that a damaged copy is found before hours of work
# and not after (all of ImageNet: seconds on a slow file server). Every process doing so with those of 100 million
# images would keep the server busy for minutes: of those the names are checked, and the sizes as shards are opened.
MOST_FILES_MEASURED = 4096


@dataclass(frozen=True)
class ShardSpec:
    """What all shards of a packed dataset have in common.

    Attributes:
        kind: of :data:`KINDS`; also the first part of the file names.
        shape: of one item, ``(3, H, W)``, ``(2C, h, w)``, ``(N, D)`` or ``(D,)``.
        dtype: numpy's name of the item's type, ``"uint8"``, ``"float16"`` or ``"float32"``.
        codec: of :data:`CODECS`: ``"raw"`` for arrays, ``"png"`` for encoded files.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: str
    codec: str = "raw"

    @property
    def item_bytes(self) -> int:
        """Bytes of one item, uncompressed."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def slot_bytes(self) -> int:
        """Bytes set aside for an item while its shard is written; deflate adds under 1 % to what it cannot compress."""
        return self.item_bytes if self.codec == "raw" else self.item_bytes + self.item_bytes // 100 + (1 << 16)

    def file_name(self, number: int) -> str:
        return f"{self.kind}-{number:05d}.npy"

    def offsets_name(self, number: int) -> str:
        return f"{self.kind}-{number:05d}-offsets.npy"

    def record_name(self, number: int) -> str:
        return f"{self.kind}-{number:05d}.json"


class IndexedShard(TypedDict):
    """Of an index."""

    count: int
    files: dict[str, FileEntry]


class Index(TypedDict):
    """``index.json``."""

    format_version: int
    kind: str
    shape: list[int]
    dtype: str
    codec: str
    count: int
    rejected: int
    source: dict  # what the dataset was made from and how
    labels: dict[str, FileEntry]
    shards: list[IndexedShard]
    class_names: list[str]


class RecordFile(TypedDict):
    """Of a :class:`ShardRecord`."""

    count: int
    files: dict[str, FileEntry]
    labels: list[int]
    rejected: list[list[str]]


@dataclass
class ShardRecord:
    """What is known of a complete shard: enough to write the index without opening the shard again.

    Attributes:
        count: items in it.
        files: name → {"bytes": size, "sha256": checksum} of its one or two files.
        labels: class of each item.
        rejected: (name, reason) of each source file that is not in it.
    """

    count: int
    files: dict[str, FileEntry]
    labels: list[int]
    rejected: list[list[str]] = field(default_factory=list)


class ShardWriter:
    """One shard in the making: a file with a slot per source file, filled in any order, by any number of processes.

    ``create`` once, ``put`` inside ``with`` in whichever process, and ``finish`` once, when all slots are settled. Only
    ``finish`` makes the shard appear under its name.
    """

    def __init__(self, folder: str | os.PathLike, spec: ShardSpec, number: int) -> None:
        self.folder = Path(folder)
        self.spec = spec
        self.number = number
        self._path = self.folder / f"{spec.file_name(number)}.tmp"
        self._start = len(self._header(0))
        self._descriptor = -1

    def create(self, slots: int) -> None:
        """Make the temporary file, sparse, with room for ``slots`` items; one left by a killed run is replaced."""
        self._path.unlink(missing_ok=True)
        with open(self._path, "xb") as file:
            file.truncate(self._start + slots * self.spec.slot_bytes)

    def link(self, source: Path, entry: FileEntry, labels: Sequence[int]) -> None:
        """Make the shard another name (a hard link) of a file that holds the same, in the place of the other methods.

        Args:
            source: the file.
            entry: of the file, from the index that it belongs to.
            labels: of its items.

        Raises:
            OSError: the file system, or who owns the file, does not allow it.
        """
        self._path.unlink(missing_ok=True)
        os.link(source.resolve(), self._path)
        path = self.folder / self.spec.file_name(self.number)
        os.replace(self._path, path)
        self._record(ShardRecord(len(labels), {path.name: entry}, [int(label) for label in labels]))

    def discard(self) -> None:
        """Remove what was written; whoever makes the shard next begins anew anyway."""
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> "ShardWriter":
        self._descriptor = os.open(self._path, os.O_RDWR)
        return self

    def __exit__(self, *exception) -> None:
        os.close(self._descriptor)
        self._descriptor = -1

    def put(self, slot: int, data: bytes | np.ndarray) -> int:
        """Write an item: a contiguous array of the spec's shape and type, or encoded bytes. Returns its bytes."""
        buffer = memoryview(np.frombuffer(data, np.uint8))
        if self.spec.codec == "raw" and buffer.nbytes != self.spec.item_bytes:
            raise ValueError(f"an item has {buffer.nbytes} bytes, {self.spec.shape} of {self.spec.dtype} was expected")
        if buffer.nbytes > self.spec.slot_bytes:
            raise ValueError(f"an encoded item has {buffer.nbytes} bytes, over the {self.spec.slot_bytes} set aside")
        self._write(buffer, self._start + slot * self.spec.slot_bytes)
        return buffer.nbytes

    def finish(
        self, sizes: Sequence[int | None], labels: Sequence[int], rejected: Iterable[Sequence[str]] = ()
    ) -> ShardRecord:
        """Close the gaps, make checksums, flush to disk, rename, leave the record.

        Args:
            sizes: what ``put`` returned for each slot, None where nothing was put.
            labels: of the items that were put, in the order of their slots.
            rejected: (name, reason) of the slots that stayed empty.
        """
        with self:
            offsets = self._compact(sizes)
            # numpy pads headers so that a longer first axis still fits: the data's start does not depend on the count
            header = self._header(len(labels) if self.spec.codec == "raw" else offsets[-1])
            self._write(memoryview(header), 0)
            os.ftruncate(self._descriptor, self._start + offsets[-1])
            os.fsync(self._descriptor)
        path = self.folder / self.spec.file_name(self.number)
        files = {path.name: checksum(self._path)}
        os.replace(self._path, path)
        if self.spec.codec != "raw":
            offsets_path = self.folder / self.spec.offsets_name(self.number)
            write_atomically(offsets_path, _npy_bytes(np.array(offsets, np.int64)))
            files[offsets_path.name] = checksum(offsets_path)
        record = ShardRecord(len(labels), files, [int(label) for label in labels], [list(pair) for pair in rejected])
        self._record(record)
        return record

    def _record(self, record: ShardRecord) -> None:
        write_atomically(self.folder / self.spec.record_name(self.number), _json_bytes(asdict(record)))

    def _header(self, length: int) -> bytes:
        if self.spec.codec == "raw":
            return _npy_header((length, *self.spec.shape), np.dtype(self.spec.dtype))
        return _npy_header((length,), np.dtype(np.uint8))

    def _compact(self, sizes: Sequence[int | None]) -> list[int]:
        """Move the items together, first to last, so that none is overwritten before it moved. Returns offsets."""
        offsets = [0]
        for slot, size in enumerate(sizes):
            if size is None:
                continue
            source, target = self._start + slot * self.spec.slot_bytes, self._start + offsets[-1]
            if source != target:
                self._write(memoryview(os.pread(self._descriptor, size, source)), target)
            offsets.append(offsets[-1] + size)
        return offsets

    def _write(self, buffer: memoryview, offset: int) -> None:
        while buffer.nbytes:
            written = os.pwrite(self._descriptor, buffer, offset)
            buffer, offset = buffer[written:], offset + written


def read_records(folder: str | os.PathLike, spec: ShardSpec) -> dict[int, ShardRecord]:
    """The records of the complete shards in an unfinished folder, by number of the shard."""
    records = {}
    for path in sorted(Path(folder).glob(f"{spec.kind}-?????.json")):
        number = int(path.stem.rsplit("-", 1)[1])
        if (record := read_record(folder, spec, number)) is not None:
            records[number] = record
    return records


def read_record(folder: str | os.PathLike, spec: ShardSpec, number: int) -> ShardRecord | None:
    """The record of a complete shard in an unfinished folder; None where it is missing or does not fit its shard."""
    path = Path(folder) / spec.record_name(number)
    with suppress(MalformedError, TypeError, OSError):  # a record or shard that someone damaged is made again
        record = ShardRecord(**read_json(path, RecordFile))
        if all((path.parent / name).stat().st_size == file["bytes"] for name, file in record.files.items()):
            return record
    return None


def write_rejected(
    folder: str | os.PathLike, records: Iterable[ShardRecord], left_out: Iterable[Sequence] = ()
) -> None:
    """Write rejected.csv: a header, then name and reason of each source file that is not in the shards.

    Args:
        folder: where it is written.
        records: of the shards, with the files that could not be used.
        left_out: (name, reason, …) of the files that no shard was to have.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("name", "reason"))
    writer.writerows(pair for record in records for pair in record.rejected)
    writer.writerows(entry[:2] for entry in left_out)
    write_atomically(Path(folder) / REJECTED_NAME, text.getvalue().encode(errors="surrogateescape"))


def write_index(
    folder: str | os.PathLike,
    spec: ShardSpec,
    records: Sequence[ShardRecord],
    class_names: Sequence[str],
    source: dict,
    left_out: Iterable[Sequence] = (),
) -> None:
    """Complete a dataset: labels, rejected files, and last of all the index. The records are then in the index.

    Args:
        folder: where all shards lie.
        spec: of the shards.
        records: of all shards, in order.
        class_names: label ``c`` means ``class_names[c]``.
        source: what the dataset was made from and how; plain JSON values, the same for the same bytes.
        left_out: as of :func:`write_rejected`.
    """
    folder = Path(folder)
    labels = np.array([label for record in records for label in record.labels], np.int64)
    write_atomically(folder / LABELS_NAME, _npy_bytes(labels))
    write_rejected(folder, records, left_out)
    index = {
        "format_version": FORMAT_VERSION,
        **asdict(spec),
        "count": len(labels),
        "rejected": sum(len(record.rejected) for record in records),
        "source": source,
        "labels": {LABELS_NAME: checksum(folder / LABELS_NAME)},
        "shards": [{"count": record.count, "files": record.files} for record in records],
        "class_names": list(class_names),
    }
    write_atomically(folder / INDEX_NAME, _json_bytes(index))


def _is_number_type(name: str) -> bool:
    try:
        return np.dtype(name).kind in "iuf"
    except (TypeError, ValueError, SyntaxError):  # numpy parses it
        return False


def remove_leftovers(folder: str | os.PathLike, kind: str) -> None:
    """Remove the records and temporary files next to a complete dataset."""
    for pattern in (f"{kind}-?????.json", "*.tmp"):
        for path in Path(folder).glob(pattern):
            path.unlink(missing_ok=True)  # another process may tidy up at the same time


def read_index(folder: str | os.PathLike) -> Index | None:
    """The index of a packed dataset as a dict, or None where the folder has none (or someone else's index.json).

    Raises:
        UserError: the index cannot be read, or is of a newer format.
    """
    path = Path(folder) / INDEX_NAME
    try:
        index = read_json(path, Any)
        if not isinstance(index, dict) or "format_version" not in index:
            return None
        if index["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {index['format_version']}, this code reads {FORMAT_VERSION}; update the "
                "code"
            )
        check(index, Index)
        _check_index(index)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except MalformedError as error:
        raise UserError(f"{path} is damaged ({error}); {_rerun(None)}") from error
    return index


def _check_index(index: Index) -> None:
    """Refuse what has the right types and yet cannot be."""
    spec = ShardSpec(index["kind"], tuple(index["shape"]), index["dtype"], index["codec"])
    is_array = spec.shape and all(0 < side < MOST_VALUES for side in spec.shape) and math.prod(spec.shape) < MOST_VALUES
    if spec.kind not in KINDS or spec.codec not in CODECS or not is_array or not _is_number_type(spec.dtype):
        raise MalformedError(f"no {spec.kind} are {spec.shape} of {spec.dtype} in codec {spec.codec}"[:200])
    for number, shard in enumerate(index["shards"]):
        names = [spec.file_name(number), *([spec.offsets_name(number)] if spec.codec != "raw" else [])]
        if list(shard["files"]) != names or shard["count"] < 0:
            raise MalformedError(f"shards[{number}] is not of {' and '.join(names)}")
    if list(index["labels"]) != [LABELS_NAME] or index["count"] != sum(shard["count"] for shard in index["shards"]):
        raise MalformedError(f"its shards hold other than its {index['count']} items, or its labels are elsewhere")


def is_unfinished(folder: str | os.PathLike) -> bool:
    """Whether the folder holds shards or their beginnings, but no index yet."""
    folder = Path(folder)
    patterns = ("*-[0-9][0-9][0-9][0-9][0-9].npy", "*-[0-9][0-9][0-9][0-9][0-9].npy.tmp")
    return not (folder / INDEX_NAME).exists() and any(True for pattern in patterns for _ in folder.glob(pattern))


class PackedReader:
    """Random access to a packed dataset: one positioned read per item, from any number of threads.

    No memory maps: their page faults block the whole process on network file systems, and each costs a trap.

    Attributes:
        spec: shape, type and codec of the items.
        index: the whole index.json.
        labels: int64 ``[N]``.
        class_names: label ``c`` means ``class_names[c]``.
        shard_starts: the first item of each shard, and behind the last the number of items.

    Raises:
        UserError: no such dataset, another kind, or shards missing or cut short (of more than
            ``MOST_FILES_MEASURED`` files, those cut short are found when they are read).
    """

    def __init__(self, folder: str | os.PathLike, kind: str = "images") -> None:
        self.folder = Path(folder)
        index = read_index(self.folder)
        if index is None:
            raise UserError(_explain_no_index(self.folder))
        if index["kind"] != kind:
            raise UserError(f"{self.folder} holds packed {index['kind']}, not {kind}; give another folder")
        self.index = index
        self.spec = ShardSpec(index["kind"], tuple(index["shape"]), index["dtype"], index["codec"])
        self.class_names: list[str] = index["class_names"]
        self.shard_starts: list[int] = np.cumsum([0] + [shard["count"] for shard in index["shards"]]).tolist()
        self._check_files()
        self.labels = self._load_verified(LABELS_NAME, index["labels"][LABELS_NAME])
        if self.labels.shape != (len(self),) or self.labels.dtype != np.int64:
            raise UserError(
                f"{self.folder / LABELS_NAME} holds {self.labels.shape} labels of {self.labels.dtype} for {len(self)} "
                f"items; {self._rerun}"
            )
        if len(self) and not 0 <= self.labels.min() <= self.labels.max() < len(self.class_names):
            raise UserError(
                f"{self.folder / LABELS_NAME} has labels of {self.labels.min()} to {self.labels.max()} for "
                f"{len(self.class_names)} classes; {self._rerun}"
            )
        self._shards = OpenShards(len(index["shards"]))

    def __len__(self) -> int:
        return self.shard_starts[-1]

    def locate(self, item: int) -> tuple[int, int]:
        """Shard number and place in that shard."""
        if not 0 <= item < len(self):
            raise IndexError(f"item {item} of {len(self)}")
        shard = bisect.bisect_right(self.shard_starts, item) - 1
        return shard, item - self.shard_starts[shard]

    def read_into(self, item: int, out: np.ndarray) -> None:
        """Read an item of a raw dataset into a contiguous array of its shape and type."""
        shard, place = self.locate(item)
        file = self._open(shard)
        size = self.spec.item_bytes
        if out.nbytes != size or not out.flags.c_contiguous:
            raise ValueError(f"a contiguous array of {size} bytes is needed, got {out.shape} of {out.dtype}")
        if os.preadv(file.descriptor, (out,), file.start + place * size) != size:
            self._read_rest(shard, file, memoryview(out.reshape(-1).view(np.uint8)), place * size)

    def read_bytes(self, item: int) -> bytes:
        """Read the encoded bytes of an item of a png dataset."""
        shard, place = self.locate(item)
        file = self._open(shard)
        begin, end = int(file.offsets[place]), int(file.offsets[place + 1])
        data = os.pread(file.descriptor, end - begin, file.start + begin)
        if len(data) != end - begin:
            raise UserError(f"{self._shard_path(shard)} is cut short; {self._rerun}")
        return data

    def read_all(self, out: np.ndarray, progress: Callable[[int], object] | None = None) -> None:
        """Read a whole raw dataset into a contiguous array ``[N, *shape]``, compared with its checksums on the way.

        ``progress`` is told the bytes read.
        """
        for shard, (first, last) in enumerate(itertools.pairwise(self.shard_starts)):
            if last > first:
                data = memoryview(out[first:last].reshape(-1).view(np.uint8))
                file = self._open_shard(shard)  # once, so it need not stay open
                self._read_rest(shard, file, data, 0)
                digest = hashlib.sha256(os.pread(file.descriptor, file.start, 0))
                digest.update(data)
                self._check_digest(self._shard_path(shard).name, digest.hexdigest())
                if progress is not None:
                    progress((last - first) * self.spec.item_bytes)

    def shard_file(self, shard: int) -> tuple[Path, FileEntry]:
        """The file of a raw shard, of the size that the index says, and what the index says of it."""
        path = self._shard_path(shard)
        entry = self.index["shards"][shard]["files"][path.name]
        with self._open_file(shard, path.name):
            return path, entry

    def fingerprint(self) -> str:
        """SHA-256 of all checksums: the same for the same bytes; cheap."""
        return hashlib.sha256(" ".join(file["sha256"] for _, file in self._files()).encode()).hexdigest()

    def verify(self, rank: int = 0, world_size: int = 1, progress: Callable[[int], object] | None = None) -> None:
        """Compare files with their checksums; the processes that share the work read the whole dataset.

        Args:
            rank, world_size: this process takes file ``rank``, ``rank + world_size``, ….
            progress: is told the bytes read.

        Raises:
            UserError: at the first file that differs.
        """
        for name, _ in itertools.islice(self._files(), rank, None, world_size):
            found = checksum(self.folder / name)
            self._check_digest(name, found["sha256"])
            if progress is not None:
                progress(found["bytes"])

    @property
    def total_bytes(self) -> int:
        """Of all files."""
        return sum(file["bytes"] for _, file in self._files())

    def _open(self, shard: int) -> ShardFile:
        """A shard, opened unless it is open; hold on to it while reading."""
        return self._shards.get(shard) or self._shards.add(shard, self._open_shard(shard))

    def _open_shard(self, shard: int) -> ShardFile:
        path = self._shard_path(shard)
        count = self.index["shards"][shard]["count"]
        offsets = None
        if self.spec.codec == "raw":
            expected = ((count, *self.spec.shape), np.dtype(self.spec.dtype))
        else:
            name = self.spec.offsets_name(shard)
            offsets = self._load_verified(name, self.index["shards"][shard]["files"][name])
            expected = ((int(offsets[-1]),), np.dtype(np.uint8))
        with self._open_file(shard, path.name) as file:
            try:
                shape, dtype, start = _read_npy_header(file)
            except OSError:
                raise
            except Exception as error:  # numpy evaluates it, and what it raises depends on its version
                raise UserError(f"{path} is damaged ({one_line(error)}); {self._rerun}") from error
            if (shape, dtype) != expected or (offsets is not None and len(offsets) != count + 1):
                raise UserError(
                    f"{path} holds {shape} of {dtype}, the index says {expected[0]} of {expected[1]}; {self._rerun}"
                )
            return ShardFile(os.dup(file.fileno()), start, offsets)

    @contextmanager
    def _open_file(self, shard: int, name: str) -> Iterator[io.BufferedReader]:
        """One of a shard's files, measured, because it may have been too many to do so when the dataset was opened."""
        try:
            file = open(self.folder / name, "rb")  # noqa: SIM115  closed below
        except FileNotFoundError:
            raise self._missing(name) from None
        with file:
            self._check_size(name, os.fstat(file.fileno()).st_size, self.index["shards"][shard]["files"][name])
            yield file

    def _load_verified(self, name: str, expected: FileEntry) -> np.ndarray:
        """A small array, which is worth comparing with its checksum each time."""
        path = self.folder / name
        data = path.read_bytes()
        self._check_size(name, len(data), expected)
        self._check_digest(name, hashlib.sha256(data).hexdigest())
        try:
            return np.load(io.BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise UserError(f"{path} is no array ({one_line(error)}); {self._rerun}") from error

    def _check_digest(self, name: str, digest: str) -> None:
        if digest != self._digests[name]:
            raise UserError(f"{self.folder / name} is damaged (it differs from its checksum); {self._rerun}")

    @functools.cached_property
    def _digests(self) -> dict[str, str]:
        return {name: file["sha256"] for name, file in self._files()}

    def _read_rest(self, shard: int, file: ShardFile, out: memoryview, offset: int) -> None:
        """Read on where preadv gave less than was asked for, which it may do on a network file system."""
        done = 0
        while done < out.nbytes:
            count = os.preadv(file.descriptor, (out[done:],), file.start + offset + done)
            if not count:
                raise UserError(f"{self._shard_path(shard)} is cut short; {self._rerun}")
            done += count

    @property
    def _rerun(self) -> str:
        return _rerun(self.index["kind"])

    def _shard_path(self, shard: int) -> Path:
        return self.folder / self.spec.file_name(shard)

    def _files(self) -> Iterator[tuple[str, dict]]:
        yield from self.index["labels"].items()
        for shard in self.index["shards"]:
            yield from shard["files"].items()

    def _check_files(self) -> None:
        """Refuse a dataset with files missing, and, unless there are very many, with files cut short."""
        files = dict(self._files())
        if len(files) > MOST_FILES_MEASURED:
            present = set(os.listdir(self.folder))
            if (missing := next((name for name in files if name not in present), None)) is not None:
                raise self._missing(missing)
            files = self.index["labels"]
        for name, expected in files.items():
            try:
                size = (self.folder / name).stat().st_size
            except FileNotFoundError:
                raise self._missing(name) from None
            self._check_size(name, size, expected)

    def _check_size(self, name: str, size: int, expected: dict) -> None:
        if size != expected["bytes"]:
            raise UserError(f"{self.folder / name} has {size} bytes instead of {expected['bytes']}; {self._rerun}")

    def _missing(self, name: str) -> UserError:
        return UserError(f"{self.folder / name} is missing; {self._rerun}")

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_shards"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _shards=OpenShards(len(state["index"]["shards"])))


def _rerun(kind: str | None) -> str:
    command = "preprocessing" if kind == "images" else "the command that made it"
    return f"run {command} into an empty folder again, or copy the dataset again"


def _explain_no_index(folder: Path) -> str:
    if not folder.exists():
        return f"{folder} does not exist; make it with preprocessing.py, or correct the path"
    if is_unfinished(folder):
        return f"{folder} is not finished; run the same preprocessing command again, it continues"
    return f"{folder} is not a packed dataset (it has no {INDEX_NAME}); make one with preprocessing.py"


def _npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    buffer = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


def _npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _read_npy_header(file: io.BufferedReader) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, type and the offset of the data."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype, file.tell()


def _json_bytes(value: dict) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=True) + "\n").encode()
