"""Files and folders that are there whole or not at all, for whom the umask says, and why one cannot be read or written.

Everything that the project writes for later goes through here; needs torch for tensors alone.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    import torch

CHECKSUM_KEY = "sha256"  # in the header of a safetensors file
_READ_BYTES = 1 << 22
_RANDOM = "[0-9a-f]" * 8  # in the names of files that are being written
# Of the file system or of rights: they say nothing of what a file holds.
OUT_OF_REACH = frozenset(
    {errno.EACCES, errno.EPERM, errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.ETIMEDOUT, errno.EREMOTEIO}
)


class FileEntry(TypedDict):
    """What is noted of a file to tell damage: see :func:`checksum`."""

    bytes: int
    sha256: str


# writing


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a file under another name, of this process alone on any machine; it takes its place when it is complete.

    It gets the rights of the umask, whatever library wrote it, and is on the disk before it has its name. What a killed
    process left of it is removed by :func:`remove_leftovers` alone, because a folder may be too long to be listed.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "xb") as held:
            _hold(held.fileno())
            mode = stat.S_IMODE(temporary.stat().st_mode)
            yield temporary
            temporary.chmod(mode)
            flush(temporary)
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # a full disk must have room again for what is said of it
            temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Write a folder under another name, ``.NAME.tmp``; it takes its place, and replaces another, when it is complete.

    Its files get the rights of the umask, whatever library wrote them, and are on the disk before it has its name.

    Raises:
        OSError: EBUSY, another process is writing it.
    """
    folder = Path(folder)
    temporary, replaced = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("tmp", "old"))
    if _is_being_written(temporary):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(folder))
    _put_back(replaced)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    held = os.open(temporary, os.O_RDONLY)
    try:
        _hold(held)
        mode = stat.S_IMODE(temporary.stat().st_mode) & 0o666  # a folder's rights without those of going through it
        yield temporary
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                path.chmod(mode)
            flush(path)
        flush(temporary)
        shutil.rmtree(replaced, ignore_errors=True)
        if folder.exists():
            folder.rename(replaced)  # so that no half-deleted folder ever has the name
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        _put_back(replaced)
        raise
    finally:
        os.close(held)
    flush(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that, whenever the machine stops, it is there whole or not at all."""
    with whole_file(path) as temporary, as_os_error(temporary):
        temporary.write_bytes(data)


def write_json(path: Path, content: dict) -> None:
    """Replace a JSON file in one move."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def write_safetensors(tensors: Mapping[str, "torch.Tensor"], path: Path, with_checksum: bool = False) -> None:
    """Tensors by name. The library's files are the owner's alone, and a kill leaves one more: in a whole folder only.

    Args:
        tensors: by name.
        path: of the file.
        with_checksum: keep theirs in the header, for :func:`read_safetensors`: of files that no manifest lists.

    Raises:
        OSError: in the place of safetensors' own error, so that a full disk is told as one.
    """
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with as_os_error(path):
        # one entry alone: the library writes several in any order
        save_file(tensors, path, {CHECKSUM_KEY: weights_checksum(tensors)} if with_checksum else None)


def add_checksum(path: Path) -> None:
    """Write a file of :func:`write_safetensors`, or of another library, anew with the checksum in its header."""
    from safetensors.torch import load_file

    # cloned, because the library maps the file that is replaced
    write_safetensors({name: tensor.clone() for name, tensor in load_file(path).items()}, path, with_checksum=True)


def write_safetensors_file(tensors: Mapping[str, "torch.Tensor"], path: Path) -> None:
    """As :func:`write_safetensors` with a checksum, inside :func:`whole_file`; held in memory a second time."""
    from safetensors.torch import save

    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with as_os_error(path):
        Path(path).write_bytes(save(tensors, {CHECKSUM_KEY: weights_checksum(tensors)}))


def write_torch(content: object, path: Path) -> None:
    """``torch.save``.

    Raises:
        OSError: in the place of the RuntimeError that torch makes of it.
    """
    import torch

    # through Python, because torch's own files do not say what went wrong
    with as_os_error(path), open(path, "wb") as file:
        torch.save(content, file)


def missing_folders(folder: Path) -> list[Path]:
    """The folder and those above it that are not there yet, innermost first: what making it makes."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, innermost first, up to the first that holds something."""
    with suppress(OSError):
        for path in folders:
            path.rmdir()


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk; some file systems cannot flush a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(*([OSError] if path.is_dir() else [])):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path, *names: str) -> None:
    """Delete what interrupted writes left of files and folders of these names, but nothing that is being written.

    Args:
        folder: that they lie in; may be absent.
        names: patterns, e.g. ``vae`` or ``[0-9]*``.
    """
    for name in names:
        for replaced in folder.glob(f".{name}.old"):
            _put_back(replaced)
        for path in (*folder.glob(f".{name}.tmp"), *folder.glob(f".{name}.old"), *folder.glob(f"{name}.{_RANDOM}.tmp")):
            if not _is_being_written(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _hold(descriptor: int) -> None:
    """Say, for as long as it is open, that a temporary file or folder is being written."""
    with suppress(OSError):  # no locks here
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)


def _is_being_written(temporary: Path) -> bool:
    """Whether a process holds it; unknown, and taken for no, where there are no locks."""
    try:
        descriptor = os.open(temporary, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    finally:
        os.close(descriptor)
    return False


def _put_back(replaced: Path) -> None:
    """Killed between its two renames, :func:`whole_folder` leaves the only good copy as ``.NAME.old``."""
    folder = replaced.with_name(replaced.name.removeprefix(".").removesuffix(".old"))
    if replaced.exists() and not folder.exists():
        replaced.rename(folder)


@contextmanager
def as_os_error(path: Path) -> Iterator[None]:
    """While a library writes this file or folder: what the system refused is an OSError with its name."""
    try:
        yield
    except OSError as error:
        if error.filename is None:  # of a write
            error.filename = str(path)
        raise
    except Exception as error:
        number = re.search(r"(?:\(os error |Os \{ code: )(\d+)", str(error))  # safetensors, now and to 0.5
        cause = error.__context__ if isinstance(error, RuntimeError) else None  # what torch hides
        code = int(number[1]) if number else cause.errno if isinstance(cause, OSError) else None
        if code is None:
            raise
        raise OSError(code, os.strerror(code), str(path)) from error


# reading


def read_safetensors(path: Path) -> dict[str, "torch.Tensor"]:
    """``safetensors.torch.load_file``; a file that may not be read is a PermissionError, not an absent one.

    Raises:
        SafetensorError: it is damaged; where its header holds a checksum, to the last bit.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    open(path, "rb").close()
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        expected = (file.metadata() or {}).get(CHECKSUM_KEY)
    if expected is not None and weights_checksum(tensors) != expected:
        raise SafetensorError("it differs from the checksum in its header; copy it again")
    return tensors


def is_out_of_reach(error: BaseException) -> bool:
    """Whether an error is about rights or the file system, so that the file may be as good as ever."""
    return isinstance(error, OSError) and error.errno in OUT_OF_REACH


def weights_checksum(state: Mapping[str, "torch.Tensor"]) -> str:
    """SHA-256 over names, types, shapes and values, in the order of the names; wherever the tensors lie."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def checksum(path: Path) -> FileEntry:
    """{"bytes": size, "sha256": hexadecimal digest} of a file."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}
