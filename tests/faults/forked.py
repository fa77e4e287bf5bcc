"""A script in a process forked from this one, which has imported everything already: a trial costs no start.

This process must never compute with torch itself: a fork of one with running threads may hang.
"""

import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO, TextIOWrapper
from pathlib import Path

from runtime.cli import run
from tests.stages import ranks

Work = Callable[[], object]
GRACE_SECONDS = 10.0  # between a launcher's SIGTERM to what is left of a job and its SIGKILL
TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True)
class Script:
    """A command line, to be run in some folder.

    Attributes:
        main: of the script, ``main(argv) -> exit code``.
        argv: its flags; paths of what it writes are relative, so that results in two folders can be compared.
        name: of the file, which is what ``sys.argv[0]`` says.
    """

    main: Callable[[Sequence[str]], int | None]
    argv: tuple[str, ...]
    name: str = "script.py"

    def __call__(self) -> int:
        sys.argv = [self.name, *self.argv]
        return run(self.main, self.argv)


class Child:
    """A forked process, the leader of a group of its own.

    Args:
        work: what it does; an integer that it returns is its exit code.
        folder: where it works.
        log: gets its stderr, ``LOG.out`` its stdout.
        before: called before ``work``, to install a fault.
        environment: variables to add.
    """

    def __init__(
        self,
        work: Work,
        folder: Path,
        log: Path,
        before: Callable[[], None] = lambda: None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.log = log
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            _live(work, folder, log, before, environment or {})
        with suppress(OSError):  # done by whichever of both comes first
            os.setpgid(self.pid, self.pid)
        self._descriptor = os.pidfd_open(self.pid)

    def wait(self, seconds: float = TIMEOUT_SECONDS) -> int | None:
        """The exit code, or minus the signal that ended it; None if it is still at work after so many seconds."""
        if not select.select([self._descriptor], [], [], seconds)[0]:
            return None
        os.close(self._descriptor)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def signal(self, number: int, whole_group: bool = True) -> None:
        """Send it a signal, and to all that it started."""
        with suppress(ProcessLookupError):
            (os.killpg if whole_group else os.kill)(self.pid, number)


class Job:
    """One or several processes of one script, as a launcher starts them.

    Args:
        script: what all of them run.
        folder: where.
        logs: gets their logs.
        processes: how many.
        before: of the first process, or of one given by its rank: see :class:`Child`.
    """

    def __init__(
        self,
        script: Work,
        folder: Path,
        logs: Path,
        processes: int = 1,
        before: Mapping[int, Callable[[], None]] | None = None,
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        number = len(list(logs.glob("*-0.txt")))
        (logs / f"{number}-0.txt").touch()  # another job may be begun before this one writes
        environments = ranks(processes) if processes > 1 else [{}]
        self.children = [
            Child(script, folder, logs / f"{number}-{rank}.txt", (before or {}).get(rank, lambda: None), environment)
            for rank, environment in enumerate(environments)
        ]

    def wait(self, seconds: float = TIMEOUT_SECONDS) -> list[int]:
        """All exit codes. As soon as one process fails, the others are terminated, and killed if they do not end."""
        codes: dict[Child, int] = {}
        deadline, is_ending = time.monotonic() + seconds, False
        while left := [child for child in self.children if child not in codes]:
            for child in left:
                code = child.wait(0.02 if len(left) > 1 else max(0.02, deadline - time.monotonic()))
                if code is not None:
                    codes[child] = code
            if any(codes.values()) and not is_ending:
                is_ending, deadline = True, min(deadline, time.monotonic() + GRACE_SECONDS)
                self._signal(left, signal.SIGTERM, codes)
            if time.monotonic() > deadline:
                self._signal(left, signal.SIGKILL, codes)
                deadline += GRACE_SECONDS
        return [codes[child] for child in self.children]

    def kill(self) -> None:
        """As ``kill -9`` of all of them."""
        self._signal(self.children, signal.SIGKILL, {})

    @property
    def errors(self) -> list[str]:
        """What each of them wrote to stderr."""
        return [child.log.read_text(errors="replace") for child in self.children]

    @staticmethod
    def _signal(children: Sequence[Child], number: int, ended: Mapping[Child, int]) -> None:
        for child in children:
            if child not in ended:
                child.signal(number)


def run_forked(work: Work, folder: Path, log: Path) -> None:
    """Do something in a fork that must succeed."""
    if Child(work, folder, log).wait() != 0:
        raise RuntimeError(f"preparing failed:\n{log.read_text()}")


def _live(work: Work, folder: Path, log: Path, before: Callable[[], None], environment: Mapping[str, str]) -> None:
    """The life of a child; never returns."""
    code = 1
    try:
        with suppress(OSError):
            os.setpgid(0, 0)
        os.environ.update(environment)
        for stream, file in ((1, f"{log}.out"), (2, log)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        # those of pytest go elsewhere
        sys.stdout, sys.stderr = (TextIOWrapper(FileIO(stream, "w"), line_buffering=True) for stream in (1, 2))
        os.chdir(folder)
        before()
        answer = work()
        code = answer if isinstance(answer, int) else 0
    except SystemExit as error:  # argparse
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
