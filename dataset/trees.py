"""What lies in a folder or in a zip: the files, by the folder that holds them.

One listing for both, so that a layout cannot mean one thing on disk and another in a zip. Names only: no file is opened
or measured. Hidden files (``.git``, ``.DS_Store``, ``__MACOSX``) belong to no data set and are not listed. No torch.
"""

import os
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from dataset.transforms import IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES
from errors import UserError


class LeftOut(NamedTuple):
    """A file that is not taken into a data set, why, and whether it is an image that one would expect to be taken."""

    name: str
    reason: str
    is_image: bool


class Tree(ABC):
    """Files by folder.

    Attributes:
        path: the folder or zip.
        files: names of the files in each folder, sorted; ``""`` is the top, others are ``a`` or ``a/b``. Empty folders
            are in it, too.
        left_out: what is neither a file that can be read nor a folder.
    """

    def __init__(self, path: Path, files: dict[str, list[str]], left_out: list[LeftOut]) -> None:
        self.path = path
        self.files = {folder: sorted(names) for folder, names in sorted(files.items())}
        self.left_out = left_out
        self._folders: dict[str, list[str]] = {}
        for folder in self.files:
            if folder:
                self._folders.setdefault(folder.rpartition("/")[0], []).append(folder.rpartition("/")[2])

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The content of a file."""

    def folders(self, folder: str) -> list[str]:
        """Names of the folders in a folder, sorted."""
        return sorted(self._folders.get(folder, []))

    def below(self, base: str) -> Iterator[tuple[str, list[str]]]:
        """The folders below one, itself included: their names relative to it (``""`` its own), and their files."""
        for folder, names in self.files.items():
            if not base or folder == base:
                yield folder[len(base) :], names
            elif folder.startswith(f"{base}/"):
                yield folder[len(base) + 1 :], names


class FolderTree(Tree):
    """A folder; links are followed."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, *_walk(path))

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()


class ZipTree(Tree):
    """A zip file.

    Attributes:
        members: by name.
    """

    def __init__(self, path: Path) -> None:
        self.members: dict[str, zipfile.ZipInfo] = {}
        files: dict[str, list[str]] = {"": []}
        with _opened(path) as archive:
            for info in archive.infolist():
                name = info.filename.removeprefix("./").lstrip("/")
                if not any(_is_hidden(part) for part in name.split("/")):
                    folder, _, file = name.rpartition("/")
                    _add_folder(files, folder)
                    if file:
                        if name not in self.members:
                            files[folder].append(file)
                        self.members[name] = info  # of two of one name the last one counts
        super().__init__(path, files, [])

    def read(self, name: str) -> bytes:
        with _opened(self.path) as archive:
            return archive.read(self.members[name])


def left_out_by_name(name: str) -> LeftOut | None:
    """Why a file is not taken for an image that can be read; None where it is taken for one. Its suffix alone tells."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix in IMAGE_SUFFIXES:
        return None
    if suffix in OTHER_IMAGE_SUFFIXES:
        return LeftOut(name, f"{suffix} files are not read: convert them to PNG or JPEG", True)
    return LeftOut(name, "not an image by its name", False)


def images_in(tree: Tree, base: str = "") -> tuple[list[str], list[LeftOut]]:
    """The images below a folder of a tree, in the order of the tree, named relative to it; and what is left out."""
    images, left_out = [], [entry for entry in tree.left_out if not base or entry.name.startswith(f"{base}/")]
    left_out = [entry._replace(name=entry.name[len(base) + bool(base) :]) for entry in left_out]
    for folder, names in tree.below(base):
        prefix = f"{folder}/" if folder else ""
        for name in names:
            entry = left_out_by_name(prefix + name)
            if entry is None:
                images.append(prefix + name)
            else:
                left_out.append(entry)
    return images, left_out


def describe_left_out(left_out: Iterable[LeftOut]) -> list[str]:
    """A line for each reason: how many files, and the first of them."""
    names: dict[str, list[str]] = {}
    for name, reason, _ in left_out:
        names.setdefault(reason, []).append(name)
    return [f"left out: {len(those)} file{'s' * (len(those) > 1)}, {why}: {few(those)}" for why, those in names.items()]


def few(names: list[str]) -> str:
    """Names in a message: the first three."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _walk(root: Path) -> tuple[dict[str, list[str]], list[LeftOut]]:
    """A scan of each folder; no file is asked for more than its folder tells, links aside."""
    files: dict[str, list[str]] = {}
    left_out: list[LeftOut] = []
    to_do: list[tuple[str, frozenset]] = [("", frozenset())]
    while to_do:
        folder, above = to_do.pop()
        status = os.stat(root / folder)
        itself = (status.st_dev, status.st_ino)
        if itself in above:
            left_out.append(LeftOut(folder, "a link to a folder that holds it", False))
            continue
        names = files[folder] = []
        with os.scandir(root / folder) as entries:
            for entry in entries:
                if _is_hidden(entry.name):
                    continue
                name = f"{folder}/{entry.name}" if folder else entry.name
                try:
                    if entry.is_file():
                        names.append(entry.name)
                    elif entry.is_dir():
                        to_do.append((name, above | {itself}))
                    elif entry.is_symlink():
                        left_out.append(_special(name, "a link that leads nowhere"))
                    else:
                        left_out.append(_special(name, "neither a file nor a folder (a pipe, socket or device)"))
                except OSError as error:
                    left_out.append(_special(name, f"a link that cannot be followed: {error.strerror}"))
    return files, sorted(left_out)


def _special(name: str, reason: str) -> LeftOut:
    """What is no file and no folder; it counts as an image where it is called one."""
    return LeftOut(name, reason, left_out_by_name(name) is None)


def _add_folder(files: dict[str, list[str]], folder: str) -> None:
    """With those above it, which a zip need not name."""
    while folder not in files:
        files[folder] = []
        folder = folder.rpartition("/")[0]


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path} is not a readable zip file ({error}); copy or download it again") from error
