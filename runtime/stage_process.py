"""The process of an experiment's stage: its output as it is, or a line for the eye and the rest in a file."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from runtime.log import PROGRESS_SECONDS

ROOT = Path(__file__).resolve().parents[1]
TAIL_LINES = 15  # of a failed stage's log
KNOWN_ENOUGH = 1.0  # minutes of finished stages that tell how fast this machine is


def call(command: Sequence[str], log: Path | None = None, head: str = "") -> int:
    """Run a command from the repository's root; signals go on to it. Returns its exit code, 128 + n for signal n.

    Args:
        command: words.
        log: gets its output; by default that goes where ours goes.
        head: with ``log``, on a terminal: what the line begins with that shows its last output.
    """
    if log is None:
        process = subprocess.Popen(command, cwd=ROOT)
    else:
        environment = os.environ | {PROGRESS_SECONDS: "2"}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    previous = {n: signal.signal(n, lambda received, frame: process.send_signal(received)) for n in numbers}
    previous[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends Ctrl-C to the child too
    try:
        if log is not None:
            _keep(process, log, head)
        code = process.wait()
    finally:
        for n, handler in previous.items():
            signal.signal(n, handler)
    return 128 - code if code < 0 else code


def _keep(process: subprocess.Popen, log: Path, head: str) -> None:
    """Write the output to a file as it comes; on a terminal show the last line of it, in place."""
    log.parent.mkdir(parents=True, exist_ok=True)
    shown, line = sys.stdout.isatty(), b""
    with open(log, "wb", buffering=0) as file:
        while part := os.read(process.stdout.fileno(), 1 << 16):
            file.write(part)
            line = (line + part)[-4096:]
            if shown:
                whole = [text for text in line.replace(b"\r", b"\n").split(b"\n") if text.strip()]
                width = max(0, shutil.get_terminal_size().columns - len(head) - 2)
                last = whole[-1].decode(errors="replace").strip()[:width] if whole else ""
                print(f"\r\x1b[K{head} {last}", end="", flush=True)
    if shown:
        print(f"\r\x1b[K{head}", end="", flush=True)


def said(log: Path) -> str:
    """A log without its progress bars."""
    lines = log.read_bytes().decode(errors="replace").split("\n")
    return "\n".join(line for line in lines if line.strip() and "\r" not in line)


def tail(log: Path) -> str:
    """The last lines of a log; of a progress bar its last state."""
    lines = [line.rsplit("\r", 1)[-1] for line in log.read_bytes().decode(errors="replace").split("\n")]
    lines = [line for line in lines if line.strip()]
    return "\n".join(lines[-TAIL_LINES:])


class Expectation:
    """Minutes that stages are expected to take, corrected by what the finished ones took.

    Args:
        minutes: of each stage on the machine where the preset was measured; None where nobody did.
    """

    def __init__(self, minutes: Sequence[float | None]):
        self.minutes = minutes
        self._expected = self._taken = 0.0
        self._begin = time.monotonic()

    def begin(self) -> None:
        self._begin = time.monotonic()

    def end(self, number: int) -> float:
        """A stage is done; returns the seconds that it took."""
        seconds = time.monotonic() - self._begin
        if self.minutes[number] is not None:
            self._expected += self.minutes[number]
            self._taken += seconds / 60
        return seconds

    def left(self, numbers: Sequence[int]) -> float | None:
        """Minutes for stages; None where one of them was never measured."""
        expected = [self.minutes[number] for number in numbers]
        if None in expected:
            return None
        pace = self._taken / self._expected if self._expected > KNOWN_ENOUGH else 1.0
        return sum(expected) * pace
