"""Disks that are full or read-only: one line, nothing half-written, and with room the same bytes as on a good disk.

Root mounts a small one in memory; for everybody else no file may grow beyond a limit.
"""

import errno
import os
import subprocess
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

from tests.faults import points
from tests.faults.bench import Bench, Command, Trial
from tests.faults.compare import differences, half_written, leftovers
from tests.faults.refusals import not_refused

PAGE = 4096
ROOM = "size=512m,remount"
FULL = ("no space left", "GB are free", "may not become that large")
QUICK = ("preprocessing png", "generate", "export_vae ldm")


def trials(bench: Bench, quick: bool) -> Iterator[Trial]:
    """Disks of several sizes, disks that fill up at a point, disks that cannot be written."""
    for name in QUICK if quick else bench.commands:
        command = bench.commands[name]
        for share in (0.4,) if quick else (0.05, 0.5, 0.9):
            attempt = partial(_too_small if can_mount(bench.folder) else _too_large, bench, command, share)
            yield Trial("full disk", command.name, f"{share} of what it takes", attempt)
        if can_mount(bench.folder):
            yield Trial("read-only disk", command.name, "", partial(_read_only, bench, command))
        numbers = points.kinds_of(bench.reference(command).points[0])
        for number in bench.sample(numbers, 1 if quick else 4):
            detail = f"from {number} on: {bench.reference(command).points[0][number - 1]}"
            yield Trial("disk full from a point on", command.name, detail, partial(_fails, bench, command, number))


@cache
def can_mount(folder: Path) -> bool:
    """Whether this process may mount a disk in memory."""
    place = folder / "mounted"
    place.mkdir(exist_ok=True)
    if os.geteuid() or _mount(place, "size=1m"):
        return False
    _unmount(place)
    return True


def _too_small(bench: Bench, command: Command, share: float) -> list[str] | None:
    pages = sum(-(-path.stat().st_size // PAGE) for path in bench.reference(command).folder.rglob("*"))
    inputs = sum(-(-path.stat().st_size // PAGE) for path in command.copies.values())
    place = bench.folder / "mounted"
    _mount(place, f"size={max(1, int(pages * share)) * PAGE + inputs * PAGE}")
    try:
        folder = command.prepare(place / "work")
        problems = _refused(bench, command, folder, {})
        _mount(place, ROOM)
        return None if problems is None else problems + bench.rerun(command, folder)
    finally:
        _unmount(place)


def _too_large(bench: Bench, command: Command, share: float) -> list[str] | None:
    size = int(bench.reference(command).sizes()[-1] * share)
    folder = bench.fresh(command)
    problems = _refused(bench, command, folder, {0: points.files_up_to(size)})
    return _ended(bench, command, folder, problems)


def _fails(bench: Bench, command: Command, number: int) -> list[str] | None:
    folder = bench.fresh(command)
    problems = _refused(bench, command, folder, {0: points.fail_from(folder, number, errno.ENOSPC)})
    return _ended(bench, command, folder, problems)


def _refused(bench: Bench, command: Command, folder: Path, before: dict[int, points.Install]) -> list[str] | None:
    """None: there was room enough."""
    job, expected = bench.start(command, folder, before=before), bench.reference(command).folder
    codes = job.wait()
    if not any(codes):  # or what could not be written is not needed, and can be made up for
        return [] if differences(expected, folder) else None
    return not_refused(job, codes, *FULL) + half_written(expected, folder) + leftovers(folder)


def _ended(bench: Bench, command: Command, folder: Path, problems: list[str] | None) -> list[str] | None:
    problems = None if problems is None else problems + bench.rerun(command, folder)
    if not problems:
        bench.remove(folder)
    return problems


def _read_only(bench: Bench, command: Command) -> list[str]:
    place = bench.folder / "mounted"
    _mount(place, "size=64m")
    try:
        folder = command.prepare(place / "work")
        _mount(place, "remount,ro")
        job = bench.start(command, folder)
        return not_refused(job, job.wait(), "read-only")
    finally:
        _unmount(place)


def _mount(place: Path, options: str) -> int:
    return subprocess.run(
        ["/bin/mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True
    ).returncode


def _unmount(place: Path) -> None:
    subprocess.run(["/bin/umount", "-l", str(place)], check=True)
