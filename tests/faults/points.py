"""Points at which a process may die: before each call that changes something in its folder, and inside of writes.

The calls are seen by Python's audit hooks, the same in every run of the same script; writes of libraries are not, but a
limit on the size of files ends the process in the middle of those.
"""

import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path

Install = Callable[[], None]

# Which argument of an audited call is the path that it changes.
PATHS = dict.fromkeys(("open", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"), 0)
PATHS |= {"os.rename": 1, "os.link": 1, "os.symlink": 1}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
GIVING_BACK = ("os.remove", "os.rmdir", "fsync")  # what a full disk still does


def watch(folder: Path, react: Callable[[int, str, str], bool | None], alone: bool = False) -> None:
    """Call ``react`` with number, name and path before each call that changes something below a folder; for good.

    Processes that this one forks go on counting where it is.

    Args:
        folder: whose changes count.
        react: whether the process dies now, of a write after half of it.
        alone: only the process whose call it is dies, and not its whole group.
    """
    root, counter = f"{folder.resolve()}{os.sep}", get_context("fork").Value("q", 0)

    def is_last(call: str, path: object) -> bool | None:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        place = os.path.abspath(os.fsdecode(path))
        if not place.startswith(root):
            return False
        with counter.get_lock():
            counter.value += 1
            number = counter.value
        return react(number, call, place.removeprefix(root))

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL) if alone else os.killpg(0, signal.SIGKILL)

    def audit(event: str, arguments: tuple) -> None:
        if event not in PATHS or not isinstance(arguments[PATHS[event]], int | str | bytes | os.PathLike):
            return
        # a descriptor that becomes a file object was opened before
        if event == "open" and (isinstance(arguments[0], int) or not (arguments[2] or 0) & WRITING):
            return
        if is_last(event, arguments[PATHS[event]]):
            die()

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        if is_last("pwrite", descriptor):
            original_pwrite(descriptor, data[: len(data) // 2], offset)
            die()
        return original_pwrite(descriptor, data, offset)

    def fsync(descriptor: int) -> None:
        if is_last("fsync", descriptor):
            die()
        original_fsync(descriptor)

    original_pwrite, original_fsync = os.pwrite, os.fsync
    os.pwrite, os.fsync = pwrite, fsync
    sys.addaudithook(audit)


def record(folder: Path, file: Path) -> Install:
    """Write all points of a run into a file, one a line: the name of the call and its path."""

    def install() -> None:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        watch(folder, lambda number, call, path: not os.write(descriptor, f"{call} {path}\n".encode()))

    return install


def die_at(folder: Path, number: int, alone: bool = False) -> Install:
    """SIGKILL at the point of that number, from 1."""
    return lambda: watch(folder, lambda found, call, path: found == number, alone)


def die_beyond(size: int) -> Install:
    """End as soon as a file becomes larger than ``size`` bytes: inside of a write, whichever library does it."""

    def install() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        files_up_to(size)()

    return install


def files_up_to(size: int) -> Install:
    """No file may become larger than ``size`` bytes: a full disk for whoever may not mount one."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def fail_from(folder: Path, number: int, code: int) -> Install:
    """From the point of that number on, what needs space fails as the system would let it."""

    def react(found: int, call: str, path: str) -> None:
        if found >= number and call not in GIVING_BACK:
            raise OSError(code, os.strerror(code), path)

    return lambda: watch(folder, react)


def kinds_of(points: Sequence[str]) -> list[int]:
    """The numbers of the first and the last point of each kind: a call, and the name of a file without its digits."""
    numbers: dict[str, list[int]] = {}
    for number, point in enumerate(points, start=1):
        numbers.setdefault(re.sub(r"\.[0-9a-f]{8}\.|\d+", "#", point), []).append(number)
    return sorted({number for found in numbers.values() for number in (found[0], found[-1])})


def record_reads(folder: Path, file: Path) -> Install:
    """Write the paths of all files below a folder that are opened for reading into a file, one a line."""

    def install() -> None:
        descriptor, root = (
            os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND),
            f"{folder.resolve()}{os.sep}",
        )

        def audit(event: str, arguments: tuple) -> None:
            if event == "open" and isinstance(arguments[0], str | os.PathLike) and not (arguments[2] or 0) & WRITING:
                place = os.path.abspath(arguments[0])
                if place.startswith(root) and os.path.isfile(place):
                    os.write(descriptor, f"{place.removeprefix(root)}\n".encode())

        sys.addaudithook(audit)

    return install
