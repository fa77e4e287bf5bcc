"""What every resumable job that makes a packed folder shares: its settings, its locks, its end. numpy only.

Two ways to work on a folder. One process holds :meth:`PackingJob.lock` from beginning to end and hands work to its own
workers (preprocessing.py). Or any number of independent processes, which need no process group and never wait for each
other, take whole shards (:meth:`PackingJob.begin`, :meth:`PackingJob.shard`, :meth:`PackingJob.finish`): whoever finds
all shards complete writes the index. Either way the same command again makes what is missing.
"""

import errno
import fcntl
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dataset.shards import ShardSpec, ShardWriter, read_index, read_record, read_records, remove_leftovers, write_index
from errors import UserError
from files import missing_folders, remove_empty, write_atomically
from runtime.cli import flag_of
from schema import MalformedError, read_json

SETTINGS_NAME = "settings.json"
LOCK_NAME = ".lock"
LOCK_SECONDS = 5.0  # the workers of a killed run notice within a second, and hold its lock until then
SHARED_LOCK_SECONDS = 3600.0  # independent processes hold the folder to claim it, and to write the index and an .npz


def images_per_shard(resolution: int) -> int:
    """Source files in a shard by default: as many as make about 800 MB of uint8 images."""
    return max(1, 4096 * 256**2 // resolution**2)


@dataclass(frozen=True)
class PackingJob:
    """A packed folder in the making.

    Args:
        folder: where it lies.
        spec: of its shards.
        settings: all that its bytes depend on, plain JSON values: kept in the folder and then in its index, and another
            run must agree with them.
        output_flag: the flag that names the folder, for messages.
        flags: which flag a setting comes from; by default ``--`` and its name.
        defaults: what it means that an older folder lacks a setting.
    """

    folder: Path
    spec: ShardSpec
    settings: dict
    output_flag: str = "--output-path"
    flags: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, object] = field(default_factory=dict)
    _claimed: list[Path] = field(default_factory=list, init=False, repr=False, compare=False)  # the settings, if ours
    _made: list[Path] = field(default_factory=list, init=False, repr=False, compare=False)  # folders, innermost first

    def is_complete(self) -> bool:
        """Whether there is a complete dataset with these settings; tidies up if a run was killed right before its end.

        Call it under the lock.
        """
        index = read_index(self.folder)
        if index is None:
            return False
        if index["kind"] != self.spec.kind:
            raise UserError(
                f"{self.output_flag} {self.folder} holds packed {index['kind']}; give an empty or new folder"
            )
        self.check_settings(index["source"])
        remove_leftovers(self.folder, self.spec.kind)
        for path in [self.folder / SETTINGS_NAME, *self.folder.glob(f".{self.spec.kind}-?????.npy.lock")]:
            path.unlink(missing_ok=True)
        return True

    def refuse_strangers(self) -> None:
        """A folder with other files in it is not taken; asked before anything is written, the lock included."""
        if not self.folder.is_dir():
            return
        # listed before it is asked whether the folder is ours: another process may claim it at this moment
        names = sorted(entry.name for entry in self.folder.iterdir())
        strangers = [name for name in names if name != SETTINGS_NAME and not name.endswith((LOCK_NAME, ".tmp"))]
        is_ours = (self.folder / SETTINGS_NAME).exists() or read_index(self.folder) is not None
        if strangers and not is_ours:
            raise UserError(
                f"{self.output_flag} {self.folder} holds other files ({strangers[0]}); give an empty or new folder"
            )

    def claim(self) -> None:
        """Note the settings in a new folder, or compare them with those of the run that began there. Under the lock."""
        path = self.folder / SETTINGS_NAME
        if path.exists():
            try:
                settings = read_json(path)
            except MalformedError as error:
                raise UserError(
                    f"{path}, which says how {self.folder} was begun, is damaged ({error}); empty the folder and run "
                    "the same command again"
                ) from error
            self.check_settings(settings)
            return
        self.refuse_strangers()
        write_atomically(path, (json.dumps(self.settings) + "\n").encode())
        self._claimed.append(path)

    def give_back(self) -> None:
        """Leave a folder that this job claimed as it was, if nothing has been made in it."""
        if not self._claimed:
            return
        files = [path for path in self.folder.rglob("*") if not path.is_dir()]
        if all(path.name == SETTINGS_NAME or path.name.endswith(LOCK_NAME) for path in files):
            for path in files:
                path.unlink(missing_ok=True)
            remove_empty(self._made)

    def check_settings(self, found: dict) -> None:
        """Refuse to go on with what was made otherwise."""
        for key, value in self.settings.items():
            before = found.get(key, self.defaults.get(key))
            if before != value:
                flag = self.flags.get(key, flag_of(key))
                before, now = _short(before), _short(value)
                raise UserError(
                    f"{self.folder} was begun with another {flag} ({key}: {before}, now {now}); "
                    f"use the same or another {self.output_flag}"
                )

    @contextmanager
    def lock(self, seconds: float | None = None) -> Iterator[None]:
        """Make the folder and keep others out of it; one that does not get in for ``seconds`` ends in one line.

        Forked workers hold the lock too: it outlasts a kill until all of them are gone.
        """
        self._made.extend(missing_folders(self.folder))
        self.folder.mkdir(parents=True, exist_ok=True)
        busy = f"another run is writing into {self.folder}; wait for it or give another {self.output_flag}"
        descriptor = _lock_file(self.folder / LOCK_NAME, LOCK_SECONDS if seconds is None else seconds, busy)
        try:
            yield
        finally:
            os.close(descriptor)

    def begin(self) -> bool:
        """Make or join the folder as one of several independent processes; whether it is complete already."""
        self.refuse_strangers()
        with self.lock(SHARED_LOCK_SECONDS):
            if self.is_complete():
                return True
            self.claim()
            return False

    def missing(self, shards: Sequence[int]) -> list[int]:
        """Which of these shards are still to be made."""
        if read_index(self.folder) is not None:
            return []
        records = read_records(self.folder, self.spec)
        return [number for number in shards if number not in records]

    @contextmanager
    def shard(self, number: int) -> Iterator[ShardWriter | None]:
        """Hold a shard while it is made; gives None where it is complete. Two processes never write one shard.

        The block calls the writer's ``create``, ``put`` and ``finish``; if it is left earlier, the shard stays missing.
        """
        name = self.spec.file_name(number)
        path = self.folder / f".{name}.lock"
        busy = f"another process is writing {self.folder / name}; wait for it or give another {self.output_flag}"
        descriptor = _lock_file(path, LOCK_SECONDS, busy)
        try:
            # In this order: records are removed only after the index was written.
            if read_record(self.folder, self.spec, number) is not None:
                yield None
            elif read_index(self.folder) is not None:
                path.unlink(missing_ok=True)
                yield None
            else:
                writer = ShardWriter(self.folder, self.spec, number)
                try:
                    yield writer
                finally:
                    writer.discard()  # what is not finished is begun anew; and a full disk has room again
        finally:
            os.close(descriptor)

    def finish(self, shards: int, class_names: Sequence[str], before_index: Callable[[], None] | None = None) -> bool:
        """Write labels and index if all shards are complete, whichever process made them; every process calls it.

        Args:
            shards: how many there are.
            class_names: label ``c`` means ``class_names[c]``.
            before_index: makes what else belongs to a complete folder; called once, under the lock.

        Returns:
            whether the dataset is complete.
        """
        with self.lock(SHARED_LOCK_SECONDS):
            if self.is_complete():
                return True
            records = read_records(self.folder, self.spec)
            if any(number not in records for number in range(shards)):
                return False
            if before_index is not None:
                before_index()
            write_index(
                self.folder, self.spec, [records[number] for number in range(shards)], class_names, self.settings
            )
            return self.is_complete()


@contextmanager
def lock_if_free(path: Path) -> Iterator[bool]:
    """Hold a lock file unless another process does; gives whether it is held now."""
    try:
        descriptor = _lock_file(path, 0.0, "")
    except UserError:
        yield False
        return
    try:
        yield True
    finally:
        os.close(descriptor)


def _short(value: object) -> str:
    """A setting in a message: of a checksum, its beginning."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:24]}…"


def check_space(folder: Path, needed: int, advice: str, approximate: bool = False) -> None:
    """Print the bytes needed and free, and refuse what does not fit.

    Args:
        folder: where they will be written.
        needed: bytes.
        advice: what makes it smaller, for the message: "take ...".
        approximate: whether ``needed`` is an estimate.
    """
    free = shutil.disk_usage(folder).free
    print(f"needs {'about ' if approximate else ''}{needed / 1e9:.2f} GB, {free / 1e9:.2f} GB free in {folder}")
    if needed > free:
        raise UserError(
            f"{folder} needs {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free; free some, write elsewhere, or "
            f"{advice}"
        )


@contextmanager
def given_back_if_refused(*jobs: PackingJob, alone: bool = True) -> Iterator[None]:
    """A command that is refused after it claimed its folders leaves none: its advice can then be followed.

    Args:
        jobs: whose folders.
        alone: no other process is at the same work; else one may have joined, and they stay.
    """
    try:
        yield
    except UserError:
        for job in reversed(jobs) if alone else ():
            job.give_back()
        raise


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM, and the SIGUSR1 of a batch system, stop the run as Ctrl-C does."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _lock_file(path: Path, seconds: float, busy: str) -> int:
    """The descriptor that holds the lock until it is closed; UserError ``busy`` where another process holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    deadline = time.monotonic() + seconds
    try:
        while not _try_lock(descriptor):
            if time.monotonic() > deadline:
                raise UserError(busy)
            time.sleep(0.1)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        print("this file system has no locks: be sure that no second run writes into the folder", file=sys.stderr)
    return True
