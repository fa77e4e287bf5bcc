"""One way to get a command line wrong, and the lines that answer it."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Case:
    """What a user does, and what the one line must say.

    Attributes:
        name: of the test.
        prepare: makes what the case needs below a folder and returns the command line without the script.
        expect: parts of the line, in any order.
        keeps_work: what was made before the error stays, as it should; else nothing at all is left behind.
    """

    name: str
    prepare: Callable[[Path, pytest.MonkeyPatch], list[str]]
    expect: tuple[str, ...]
    keeps_work: bool = False


def errors_in(stderr: str) -> list[str]:
    """The lines of stderr, without progress bars (which return to the start of their line) and dated log lines."""
    assert "Traceback" not in stderr
    lines = [line.rsplit("\r", 1)[-1].strip() for line in stderr.splitlines()]
    return [line for line in lines if line and not re.search(r"(it|img|step)/s|s/step|^\d{4}-\d\d-\d\d ", line)]
