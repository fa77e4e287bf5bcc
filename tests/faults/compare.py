"""Whether two results are the same, byte for byte, except for what says when and how fast; and what is half there."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import torch

from runtime.checkpoint import Checkpoint

TIMED = {"log.txt", "timing.jsonl"}  # their presence is compared
GROWING = {*TIMED, "metrics.jsonl", "status.json"}  # what an unfinished run has less of


def differences(expected: Path, found: Path) -> list[str]:
    """What differs between two folders; empty where they are the same."""
    ours, theirs = ({_name(path, root) for path in root.rglob("*")} for root in (expected, found))
    return [
        *(f"{name} is missing" for name in sorted(ours - theirs)),
        *(f"{name} is left over" for name in sorted(theirs - ours)),
        *(f"{name} differs" for name in sorted(ours & theirs) if not is_same(expected / name, found / name)),
    ]


def half_written(expected: Path, found: Path) -> list[str]:
    """What an interrupted job left under a final name that is not what a whole one leaves there."""
    wrong = []
    for path in sorted(found.rglob("*")):
        name = _name(path, found)
        is_hidden = any(part.startswith(".") or part.endswith(".tmp") for part in Path(name).parts)
        whole = expected / name
        if path.is_dir() or is_hidden or path.name in GROWING or not whole.exists():
            continue
        if not is_same(whole, path):
            wrong.append(f"{name} is not what it becomes")
    for folder in _checkpoints(found):
        if fault := Checkpoint(folder).fault():
            wrong.append(f"{_name(folder, found)}: {fault}")
    return wrong


def leftovers(found: Path) -> list[str]:
    """Temporary files and folders."""
    names = (_name(path, found) for path in sorted(found.rglob("*")))
    return [f"{name} is left over" for name in names if name.endswith((".tmp", ".old"))]


def is_same(a: Path, b: Path) -> bool:
    """Whether two files hold the same; folders are always the same."""
    if a.is_dir() or b.is_dir():
        return a.is_dir() and b.is_dir()
    if a.name in TIMED or a.read_bytes() == b.read_bytes():
        return True
    if a.suffix == ".pt":
        try:
            return is_equal(*(torch.load(path, weights_only=True) for path in (a, b)))
        except (OSError, RuntimeError, pickle.UnpicklingError):  # damaged
            return False
    if a.suffix == ".json":
        return _timeless(a) == _timeless(b)
    return False


def is_equal(a: object, b: object) -> bool:
    """Whether two states hold the same bits, in the same containers."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(is_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(is_equal, a, b))
    return type(a) is type(b) and a == b


def _timeless(path: Path) -> object:
    """A JSON file without the time at which it was written, and without checksums of files that hold no fixed bytes."""
    content = json.loads(path.read_text())
    if isinstance(content, dict):
        content.pop("created", None)
        files = content.get("files")
        if isinstance(files, dict):  # torch.save's bytes depend on which equal objects are one
            content["files"] = {name: entry for name, entry in files.items() if not name.endswith(".pt")}
    return content


def _checkpoints(found: Path) -> Iterator[Path]:
    for place in ("checkpoints", "milestones"):
        yield from (path for path in found.rglob(f"{place}/[0-9]*") if path.is_dir())


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()
