"""What the folder of a run says of it, ours or somebody else's; reads no weights and needs no torch."""

import os
import shlex
from pathlib import Path
from typing import TypedDict

from errors import UserError
from formats import averages
from schema import MalformedError, read_json

MANIFEST = "manifest.json"
ARGUMENTS = "args.json"
PLACES = ("checkpoints", "milestones")
# A run that trains its VAE along keeps it in every checkpoint, with the statistics that belong to the averaged SiT.
OWN_VAE, OWN_STATISTICS = "vae", averages.statistics_of(averages.MAIN)
WEIGHT_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")


class Status(TypedDict):
    """``status.json``."""

    state: str  # starting, running, finished, stopped or failed
    step: int
    max_train_steps: int | None
    reason: str | None


class Record(TypedDict):
    """``args.json``."""

    args: dict  # all resolved flags
    command: list[str] | None
    versions: dict | None
    git_commit: str | None


class Line(TypedDict):
    """Of ``metrics.jsonl`` and ``timing.jsonl``; the other keys are metrics."""

    step: int


def status_of(folder: Path) -> Status | None:
    """The content of a run's ``status.json``, or None where there is none.

    Raises:
        MalformedError: it is damaged.
    """
    path = Path(folder) / "status.json"
    if not path.exists():
        return None
    return read_json(path, Status)


def arguments_of(folder: Path) -> dict | None:
    """The resolved flags of a run, or None where it never started."""
    path = Path(folder) / "args.json"
    if not path.exists():
        return None
    try:
        return read_json(path, Record)["args"]
    except MalformedError as error:
        raise UserError(f"{path} is damaged ({error}); restore it or start under another --exp-name") from error


def refuse_unfinished(*paths: str | None) -> None:
    """Refuse VAEs next to the status of a training that has not finished; other names are passed over."""
    for path in paths:
        if path is None or not Path(path).exists():
            continue
        file = Path(path).parent / "status.json"
        try:
            status = status_of(file.parent)
            state = None if status is None else status["state"]
        except ValueError as error:
            raise UserError(f"{file} is damaged ({error}); add --allow-unfinished") from error
        if state not in (None, "finished"):
            raise UserError(
                f"{path} is of a training that is {state} at step {status.get('step')}; run the same training command "
                "again to finish it, or add --allow-unfinished"
            )


def is_run(path: Path) -> bool:
    return (Path(path) / ARGUMENTS).is_file()


def is_foreign_experiment(path: Path) -> bool:
    """Whether a folder is an experiment of REPA or REPA-E: ``checkpoints/`` holds .pt files, not folders."""
    return any((Path(path) / "checkpoints").glob("*.pt"))


def refuse_own_file(path: Path, flag: str, instead: str) -> None:
    """Refuse a single file of a run of ours, which says more than the file; as :func:`refuse_foreign`."""
    if path.is_file() and (path.parent / MANIFEST).is_file():
        run = os.path.relpath(path.resolve().parents[2])
        raise UserError(f"{flag} {path} belongs to a run of this project: give {instead} {run}")


def refuse_foreign(path: Path, flag: str, instead: str, *flags: str) -> None:
    """Refuse a checkpoint of REPA or REPA-E, which is not a run yet, naming the command that makes one of it.

    Args:
        path: that may be one; a single file of a run of ours is refused too.
        flag: that it was given with.
        instead: the flag that takes a run.
        flags: for the command, in words.
    """
    path = Path(path)
    refuse_own_file(path, flag, instead)
    if path.is_file() and path.suffix not in WEIGHT_SUFFIXES:
        raise UserError(f"{flag} {path} is a file, and none of weights: give {instead} a run, exps/NAME")
    if path.is_file() or is_foreign_experiment(path):
        run = os.path.join("exps", f"{path.stem if path.is_file() else path.resolve().name}-run")
        command = shlex.join(["python", "export_ldm.py", str(path), run, "--format", "run", *flags])
        raise UserError(
            f"{flag} {path} is not a run of this project: make one of it with {command}, and give {instead} {run}"
        )


def steps(run: Path) -> dict[int, Path]:
    """The checkpoints and milestones of a run by step; a whole checkpoint before a milestone."""
    found = {}
    for place in PLACES:
        for folder in (Path(run) / place).glob("[0-9]*"):
            if folder.name.isdigit() and (folder / MANIFEST).is_file():
                found.setdefault(int(folder.name), folder)
    return found


def vae_label(source: str) -> str:
    """A name for what a VAE makes: that of its run, with the step of a checkpoint; of its file, folder or hub name."""
    path = Path(source)
    if not path.exists():  # a hub's name; slashes and colons are no part of a folder's name
        return path.name.replace(":", "-")
    path = path.resolve()
    if path.parent.name in PLACES:
        return f"{path.parent.parent.name}-{path.name}"
    return path.parent.name if path.name == "vae" else path.stem if path.is_file() else path.name
