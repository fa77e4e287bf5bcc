"""The shards that are open in this process: as many as its limit allows, whatever the number of shards and readers."""

import functools
import os
import resource
import threading
import weakref
from collections import deque
from contextlib import suppress

import numpy as np

# ImageNet at 512 px, its latents, VFM features and the mirrored copies of both are 6,255 shards. Of 100 million images
# each reader would have 24,414: those are opened and closed in turn, so that a machine's ranks do not hold a file
# server's state for a million files, nor their offsets (32 KiB a shard of PNGs) in memory.
MOST_SHARDS = 8192
OTHER_FILES = 512  # left to the rest of the process: libraries, NCCL's sockets, logs, checkpoints


class ShardFile:
    """A shard open for reading. Closed as the last reference goes, so never while a thread reads from it.

    Attributes:
        descriptor: of the file.
        start: offset in bytes of the first item.
        offsets: int64 ``[n + 1]``, where each encoded item begins and the last ends, counted from ``start``; or None.
        was_read: since it was last spared from being closed.
    """

    __slots__ = ("descriptor", "offsets", "start", "was_read")

    def __init__(self, descriptor: int, start: int, offsets: np.ndarray | None = None) -> None:
        self.descriptor = descriptor
        self.start = start
        self.offsets = offsets
        self.was_read = False

    def __del__(self, close=os.close) -> None:  # a default outlives the module's names when Python ends
        close(self.descriptor)


class OpenShards:
    """The open shards of one reader, by number. Any number of threads may use it.

    The bound is on those of all readers together. Beyond it the oldest in a queue is closed, unless it was read since
    it came there: then it goes to the end of the queue (the "clock" form of LRU, whose hits need no lock). A forked
    process goes on with its parent's; a reader that is gone has closed its own.
    """

    def __init__(self, count: int) -> None:
        self._files: list[ShardFile | None] = [None] * count

    def get(self, number: int) -> ShardFile | None:
        """The shard, if it is open."""
        file = self._files[number]
        if file is not None:
            file.was_read = True
        return file

    def add(self, number: int, file: ShardFile) -> ShardFile:
        """Keep a shard open, which may close another. Returns what to read from: a thread may have come first."""
        with _lock:
            present = self._files[number]
            if present is not None:
                return present
            closed = _make_room()
            self._files[number] = file
            _queue.append((weakref.ref(self), number))
        del closed  # not under the lock: a network file system may take its time
        return file


@functools.cache
def most_open_shards() -> int:
    """How many shards this process keeps open. Raises its soft limit of open files first, as far as is needed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MOST_SHARDS
    wanted = MOST_SHARDS + OTHER_FILES
    raised = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    if soft < raised:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    return min(MOST_SHARDS, max(soft - OTHER_FILES, soft // 2))


_lock = threading.Lock()
_queue: deque[tuple[weakref.ref, int]] = deque()  # reader's OpenShards, number; those of readers that are gone too


def _make_room() -> ShardFile | None:
    """Take one shard from the queue where it is full; under the lock. Returns it, for the caller to let go of."""
    if len(_queue) < most_open_shards():
        return None
    while True:
        owner, number = _queue.popleft()
        shards = owner()
        if shards is None:
            return None
        file = shards._files[number]
        if not file.was_read:
            shards._files[number] = None
            return file
        file.was_read = False
        _queue.append((owner, number))


def _renew_lock() -> None:
    """In a forked process, where no thread is left to release what another thread held."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)
