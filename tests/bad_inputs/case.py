"""One way to get a command line wrong."""

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
