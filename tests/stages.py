"""Scripts of this repository as processes of their own, forked from one that has imported the packages already.

A Python that starts anew imports PyTorch, diffusers and the like for six seconds. On Linux a server therefore does so
once for each process of pytest, and computes nothing; what it forks imports this repository's modules, runs the script
and ends as any Python does: tracebacks, exit codes, ``atexit``, signals. Elsewhere, where a fork of a process with such
packages is not safe, every stage is a start of Python.

Three things a fork cannot show, so some tests start Python itself: what importing the packages says or reads from the
environment, what ``torchrun`` does, and that nothing depends on Python's seed of hashes, which all forks share.
"""

import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # networks this small are faster so
PACKAGES = (
    *("torch", "torch._dynamo", "torch.distributed", "torchvision", "timm", "accelerate", "scipy.stats", "lpips"),
    *("diffusers.models.autoencoders.autoencoder_kl", "PIL.Image", "yaml"),
)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
LONGEST_REQUEST = 1 << 17


class Forked:
    """What is needed of :class:`subprocess.Popen`, for a child of the server.

    Args:
        command: the script and its flags.
        environment: variables to add.
        stdout: where its output goes.
        stderr: and its errors.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], stdout: BinaryIO, stderr: BinaryIO):
        self.returncode: int | None = None
        self._answers, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            request = json.dumps({"command": command, "environment": environment}).encode()
            descriptors = [file.fileno() for file in (stdout, stderr, theirs)]
            socket.send_fds(server(), [request], descriptors)
        self.pid = self._answer()

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._answers], [], [], 0)[0]:
            self.returncode = self._answer()
            self._answers.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, number)

    def _answer(self) -> int:
        answer = self._answers.recv(32)
        if not answer:
            raise RuntimeError("the server of tests/stages.py has ended")
        return int(answer)


class Stage:
    """A running script, with the face of :class:`subprocess.Popen`; its output is kept in files, so it never waits.

    Args:
        command: the script, seen from the repository's root, and its flags; or Python's own, and it is started anew.
        processes: how many. As under ``torchrun``, as soon as one of several fails the others are terminated, and the
            exit code is 1.
        place: of one of several processes, instead: its entry of :func:`ranks`.
        anew: start Python itself, on Linux too.
    """

    def __init__(
        self, *command: object, processes: int = 1, place: Mapping[str, str] | None = None, anew: bool = False
    ):
        self.command = [str(word) for word in command]
        self.returncode: int | None = None
        self._files = TemporaryFile(), TemporaryFile()  # noqa: SIM115  nameless: gone with this object
        self._is_ending = False
        places = ranks(processes) if processes > 1 else [place or {}]
        anew = anew or self.command[0].startswith("-") or server() is None
        self._processes = [(start_anew if anew else Forked)(self.command, place, *self._files) for place in places]

    @property
    def pid(self) -> int:
        return self._processes[0].pid

    @property
    def stdout(self) -> str:
        """What was written until now; of all processes."""
        return self._text(0)

    @property
    def stderr(self) -> str:
        return self._text(1)

    def poll(self) -> int | None:
        codes = [process.poll() for process in self._processes]
        if None not in codes:
            self.returncode = codes[0] if len(codes) == 1 else int(any(codes))
        elif any(codes) and not self._is_ending:
            self._is_ending = True
            self.terminate()
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.command, timeout, self.stdout, self.stderr)
            time.sleep(0.01)
        return self.returncode

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        self.wait(timeout)
        return self.stdout, self.stderr

    def send_signal(self, number: int) -> None:
        for process in self._processes:
            process.send_signal(number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _text(self, number: int) -> str:
        descriptor = self._files[number].fileno()
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode(errors="replace")


def run_stage(*command: object, processes: int = 1, check: bool = True, timeout: float = 300) -> Stage:
    """As :func:`subprocess.run`: a stage that has ended, with exit code 0 if that is to be checked."""
    stage = Stage(*command, processes=processes)
    try:
        stage.wait(timeout)
    finally:
        stage.kill()
    assert not check or stage.returncode == 0, f"{stage.command}: exit code {stage.returncode}\n{stage.stderr}"
    return stage


def two_without_launcher(*command: object) -> list[tuple[int, str]]:
    """Exit codes and last lines of two processes that nothing ends when the other one fails, as on two machines."""
    places = [{name: value for name, value in place.items() if "LOCAL" not in name} for place in ranks(2)]
    started = [Stage(*command, place=place) for place in places]
    return [(stage.wait(timeout=100), stage.stderr.splitlines()[-1]) for stage in started]


def ranks(processes: int) -> list[dict[str, str]]:
    """What ``torchrun`` sets that is read: who each process is, and where they meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    count = str(processes)
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def start_anew(
    command: Sequence[str], environment: Mapping[str, str], stdout: BinaryIO, stderr: BinaryIO
) -> subprocess.Popen:
    words = [sys.executable, *command]
    return subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT | environment, stdout=stdout, stderr=stderr)


@lru_cache(maxsize=1)
def server() -> socket.socket | None:
    """Takes requests. It ends with this process, which holds the other end. None: it would not be safe to fork."""
    if sys.platform != "linux":
        return None
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, __file__, str(theirs.fileno())]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, pass_fds=[theirs.fileno()], **quiet)
    theirs.close()
    return ours if ours.recv(1) else None  # nothing comes of one that has ended


def serve(requests: socket.socket) -> str:
    """Fork for each request, and tell who asked the number and the exit code. Returns in forks, with their script."""
    children: dict[int, tuple[int, socket.socket]] = {}
    while True:
        for ready in select.select([requests, *children], [], [])[0]:
            if ready is not requests:
                pid, asker = children.pop(ready)
                os.close(ready)
                tell(asker, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                asker.close()
                continue
            request, descriptors, _, _ = socket.recv_fds(requests, LONGEST_REQUEST, 3)
            if not request:
                sys.exit()
            asker = socket.socket(fileno=descriptors.pop())
            pid = os.fork()
            if not pid:
                for held in (requests, asker, *(other for _, other in children.values())):
                    held.close()
                for descriptor in children:
                    os.close(descriptor)
                return become(descriptors=descriptors, **json.loads(request))
            for descriptor in descriptors:
                os.close(descriptor)
            tell(asker, pid)
            children[os.pidfd_open(pid)] = pid, asker


def tell(asker: socket.socket, number: int) -> None:
    with suppress(BrokenPipeError):  # it does not want to know any more
        asker.send(str(number).encode())


def become(command: Sequence[str], environment: Mapping[str, str], descriptors: Sequence[int]) -> str:
    """Make this fork what a Python that was started with a command is; returns the script."""
    import numpy as np

    for stream, descriptor in enumerate(descriptors, start=1):
        os.dup2(descriptor, stream)
        os.close(descriptor)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    np.random.seed()  # as every start does; Python's own generator does so by itself
    sys.argv = list(command)
    sys.path[0] = str((ROOT / command[0]).parent)
    return command[0]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, which sends it to stages too
    sys.path[0] = str(ROOT)
    for name in PACKAGES:
        import_module(name)
    threads = os.listdir("/proc/self/task")
    if len(threads) > 1:
        sys.exit(f"tests/stages.py: {len(threads)} threads, so that a fork might hang: stages are started anew, slowly")
    gc.freeze()  # a collection in a fork would otherwise write to, and so copy, all that is shared
    os.close(os.pidfd_open(os.getpid()))  # some containers forbid it: then this ends here, and stages are started anew
    requests = socket.socket(fileno=int(sys.argv[1]))
    requests.send(b"1")
    runpy.run_path(serve(requests), run_name="__main__")
